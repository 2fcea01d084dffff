"""Writes llama_quantize.json: which format llama.cpp's quantizer gives every matrix of small files.

    .venv/bin/python -m tests.checkpoint.make_llama_quantize .peers/llama.cpp

needs `make peers`; takes about a minute. The files hold noise: only names, shapes and the place of
a layer decide. Formats are written by part of a layer, one word for each layer, or one for all.
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).parent
RECORD = HERE / "llama_quantize.json"
FILE_TYPES = {
    "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "q2_k": 10,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "mxfp4_moe": 38,
}  # fmt: skip
"""llama.cpp's numbers (llama.h, enum llama_ftype)."""
D, V, ODD = 256, 320, 96
"""Hidden width, vocabulary, and a width that no block of 256 divides."""


def tensors(kind: str, layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model; `kind` is the architecture, "fused" and "tied" are variants."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if "tied" not in kind:
        found["output.weight"] = (V, D)
    for layer in range(layers):
        if kind.startswith("deepseek2"):
            parts: dict[str, tuple[int, ...]] = {
                "attn_kv_a_mqa": (D + 32, D),
                "attn_output": (D, D),
            }
            if "fused" in kind:
                parts |= {"attn_q": (4 * ODD, D), "attn_kv_b": (4 * 128, D)}
            else:
                parts |= {"attn_q_a": (ODD, D), "attn_q_b": (4 * ODD, ODD)}
                parts |= {"attn_k_b": (4, D, 64), "attn_v_b": (4, 64, D)}
        else:
            parts = {f"attn_{part}": (D if part == "q" else D // 8, D) for part in "qkv"}
            parts["attn_output"] = (D, D)
        if kind.startswith("deepseek2") and layer == 0:
            parts |= {"ffn_gate": (D, D), "ffn_up": (D, D), "ffn_down": (D, D)}
        else:
            width = D if "even" in kind else ODD
            parts |= {"ffn_gate_inp": (experts, D), "ffn_down_exps": (experts, D, width)}
            parts |= {f"ffn_{part}_exps": (experts, width, D) for part in ("gate", "up")}
            if kind.startswith("deepseek2"):
                parts |= {"ffn_down_shexp": (D, ODD), "ffn_up_shexp": (ODD, D)}
        found |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return found


CASES = {
    "deepseek2": (17, 4),
    "deepseek2 fused": (10, 4),
    "deepseek2 even tied": (9, 4),
    "deepseek2 fused of eight": (8, 8),
    "qwen3moe": (10, 4),
    "qwen3moe of eight": (8, 8),
}
"""{name: (layers, experts)}"""


def metadata(kind: str, layers: int, experts: int) -> dict[str, int | float]:
    """The keys without which llama.cpp refuses to read."""
    common: dict[str, int | float] = {
        "block_count": layers,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": D,
        "attention.head_count": 4,
        "attention.head_count_kv": 4 if "fused" in kind else 1,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": experts,
        "expert_used_count": 2,
        "expert_feed_forward_length": D if "even" in kind else ODD,
        "vocab_size": V,
    }
    if kind.startswith("deepseek2"):
        common |= {
            "leading_dense_block_count": 1,
            "attention.kv_lora_rank": D,
            "attention.q_lora_rank": ODD,
            "attention.key_length": D + 32,
            "attention.value_length": D,
            "attention.key_length_mla": ODD,
            "attention.value_length_mla": 64,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "rope.dimension_count": 32,
        }
    return common


def write(path: Path, kind: str, layers: int, experts: int) -> None:
    """A GGUF of noise."""
    writer = gguf.GGUFWriter(path, kind.split()[0])
    for key, value in metadata(kind, layers, experts).items():
        key = f"{kind.split()[0]}.{key}"
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    noise = np.random.default_rng(0)
    for name, shape in tensors(kind, layers, experts).items():
        writer.add_tensor(name, noise.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Parameters(ctypes.Structure):
    """The start of llama_model_quantize_params; the rest stays as the library fills it."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("rest", ctypes.c_char * 248),
    ]


def by_part(formats: dict[str, str]) -> dict[str, str]:
    """{part: "q4_k q4_k q6_k"} from {name: format}; one word where all layers are alike."""
    words: dict[str, list[str]] = {}
    for name in sorted(formats, key=lambda n: int(n.split(".")[1]) if n.startswith("blk") else -1):
        part = name.split(".", 2)[2] if name.startswith("blk") else name
        words.setdefault(part, []).append(formats[name])
    return {p: w[0] if len(set(w)) == 1 else " ".join(w) for p, w in sorted(words.items())}


def main(peer: Path) -> None:
    """Quantize every case to every file type and write down what came out."""
    (library,) = peer.glob("lib/python*/site-packages/llama_cpp/lib/libllama.so")
    llama = ctypes.CDLL(str(library))
    llama.llama_model_quantize_default_params.restype = Parameters
    record: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, (layers, experts) in CASES.items():
            source, target = Path(folder, "in.gguf"), Path(folder, "out.gguf")
            write(source, kind, layers, experts)
            for name, number in FILE_TYPES.items():
                parameters = llama.llama_model_quantize_default_params()
                parameters.threads, parameters.file_type = 1, number
                failed = llama.llama_model_quantize(
                    str(source).encode(), str(target).encode(), ctypes.byref(parameters)
                )
                assert not failed, (kind, name)
                found = gguf.GGUFReader(target).tensors
                formats = {t.name: t.tensor_type.name.lower() for t in found}
                record.setdefault(kind, {})[name] = by_part(formats)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
