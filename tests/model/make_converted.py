"""Writes tests/model/converted/: random DeepSeek models, converted and quantized by llama.cpp.

    pip download --no-binary :all: --no-deps --no-build-isolation llama-cpp-python==0.3.36
    .venv/bin/python -m tests.model.make_converted .peers/llama.cpp llama_cpp_python-0.3.36.tar.gz

needs `make peers`, which compiles llama.cpp from its Python package (the quantizer, and what it
answers), and that package's source (the converter); takes half a minute. Nothing of ktlab writes
or reads a model here. README.md in the folder says what is in it.
"""

import ctypes
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ktlab.measurement.peers.llama_cpp_model import bindings

FOLDER = Path(__file__).with_name("converted")
VOCABULARY, PROMPT, WRITTEN = 272, 128, 24
ORIGINAL_CONTEXT = 32
"""Of yarn: the prompt is four times as long."""
FILE_TYPES = {"q8_0": 7, "q4_k_m": 15}
"""llama.cpp's numbers (llama.h, enum llama_ftype)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random model; `formats` are the files that are kept of it."""

    settings: dict[str, Any]
    formats: tuple[str, ...]


def rope(mscale: float) -> dict[str, Any]:
    return dict(
        rope_type="yarn", rope_theta=10000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0,
        original_max_position_embeddings=ORIGINAL_CONTEXT, mscale=mscale, mscale_all_dim=mscale,
    )  # fmt: skip


NARROW = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8,
    num_experts_per_tok=3, first_k_dense_replace=1,
)  # fmt: skip
V3 = dict(
    n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    rope_parameters=rope(1.0),
)  # fmt: skip
# Not V2's groups: llama.cpp scores them by their best two experts, DeepSeek by the best one.
V2 = dict(
    n_shared_experts=2, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False,
    routed_scaling_factor=1.0, rope_parameters=rope(0.707),
)  # fmt: skip
WIDE = NARROW | dict(hidden_size=256, num_hidden_layers=2, kv_lora_rank=256, v_head_dim=64)
CASES = {
    "v3": Case(settings=NARROW | V3, formats=("f32", "q8_0")),
    "v2": Case(settings=NARROW | V2, formats=("f32", "q8_0")),
    # llama.cpp knows a model without q_lora by its 27 layers.
    "v2-lite": Case(
        settings=NARROW | V2 | dict(hidden_size=32, intermediate_size=32, q_lora_rank=None)
        | dict(num_hidden_layers=27, first_k_dense_replace=24, num_attention_heads=2)
        | dict(num_key_value_heads=2, n_routed_experts=4),
        formats=("f32", "q8_0"),
    ),
    # Rows of 256 for the k formats, and experts' of 96 that fall back, as Lite's of 1408 do.
    # Not eight experts: for Mixtral's sake the quantizer treats those otherwise.
    "v3-wide": Case(
        settings=WIDE | V3 | dict(moe_intermediate_size=256, n_routed_experts=6, n_group=3),
        formats=("q4_k_m",),
    ),
    "v2-wide": Case(
        settings=WIDE | V2 | dict(moe_intermediate_size=96, n_routed_experts=12),
        formats=("q4_k_m",),
    ),
}  # fmt: skip


def random_model(name: str) -> PreTrainedModel:
    """float32, weights that keep activations near 1 and the next token uncertain."""
    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY, max_position_embeddings=8 * ORIGINAL_CONTEXT, rms_norm_eps=1e-6,
        tie_word_embeddings=False, bos_token_id=256, eos_token_id=257, pad_token_id=None,
    )  # fmt: skip
    settings = common | CASES[name].settings
    model: PreTrainedModel
    if name.startswith("v3"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    else:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**settings))
    generator = torch.Generator().manual_seed(sorted(CASES).index(name))
    for key, values in sorted(model.state_dict().items()):
        noise = torch.randn(values.shape, generator=generator)
        if key.endswith("e_score_correction_bias"):
            values.copy_(0.1 * noise)
        elif values.ndim < 2:
            values.copy_(1 + 0.1 * noise)
        else:
            spread = 1.0 if "embed_tokens" in key else 2.0 if "lm_head" in key else 1.0
            width = 1 if "embed_tokens" in key else values.shape[-1]
            values.copy_(noise * spread / width**0.5)
    return model.float().eval()


def save_tokenizer(folder: Path) -> None:
    """256 bytes, two control tokens, a few merges: llama.cpp wants some."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the theory then thaws, they thought; " * 9] * 9, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[1] + "/gguf-py")
from conversion.base import TextModel
# Known tokenizers are told apart by a hash; ours of 272 tokens is none of them.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-llm"
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv = [script, sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
runpy.run_path(script, run_name="__main__")
"""


def convert(converter: Path, folder: Path, target: Path) -> None:
    """llama.cpp's convert_hf_to_gguf.py, to float32."""
    arguments = [sys.executable, "-c", CONVERT, str(converter), str(folder), str(target)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def quantize(llama: Any, source: Path, target: Path, format: str) -> None:
    """llama.cpp's quantizer."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = 1, FILE_TYPES[format]
    failed = llama.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    assert not failed, target


def llama_answers(llama: Any, file: Path, ids: list[int]) -> tuple[NDArray[Any], list[int]]:
    """(T, V) logits of the prompt, and the greedy continuation; the cache is float32."""
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = False  # its AMX buffers stop at heads' matrices in q8_0
    model = llama.llama_model_load_from_file(str(file).encode(), parameters)
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = llama.GGML_TYPE_F32
    settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, settings)
    logits, written, place, now = [], [], 0, list(ids)
    for _ in range(WRITTEN):
        batch = llama.llama_batch_init(len(now), 0, 1)
        batch.n_tokens = len(now)
        for i, token in enumerate(now):
            batch.token[i], batch.pos[i] = token, place + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        assert not llama.llama_decode(context, batch)
        flat = llama.llama_get_logits(context)
        logits.append(np.ctypeslib.as_array(flat, (len(now), VOCABULARY)).copy())
        place += len(now)
        llama.llama_batch_free(batch)
        now = [int(logits[-1][-1].argmax())]
        written += now
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits[0], written


def main(peer: Path, source: Path) -> None:
    """Everything, into FOLDER."""
    (packages,) = peer.glob("lib/python*/site-packages")
    sys.path.append(str(packages))
    llama = bindings()
    llama.llama_backend_init()
    kept: dict[str, NDArray[Any]] = {}
    generator = np.random.default_rng(0)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(source) as archive:
        work = Path(temporary)
        archive.extractall(work, filter="data")
        (converter,) = work.glob("*/vendor/llama.cpp")
        for name, case in CASES.items():
            model, folder = random_model(name), work / name
            model.save_pretrained(folder)
            save_tokenizer(folder)
            config = json.loads((folder / "config.json").read_text())
            # As DeepSeek's own configurations say; transformers leaves it to the class.
            config["scoring_func"] = "sigmoid" if name.startswith("v3") else "softmax"
            (folder / "config.json").write_text(json.dumps(config))
            f32 = work / f"{name}-f32.gguf"
            convert(converter, folder, f32)
            ids = generator.integers(0, 256, PROMPT)
            kept[f"{name} ids"] = ids.astype(np.int16)
            with torch.no_grad():
                logits_TV = model(torch.from_numpy(ids)[None]).logits[0].numpy()
            kept[f"{name} transformers"] = logits_TV.astype(np.float16)
            for format in case.formats:
                file = FOLDER / f"{name}-{format}.gguf"
                if format == "f32":
                    file.write_bytes(f32.read_bytes())
                else:
                    quantize(llama, f32, file, format)
                logits_TV, written = llama_answers(llama, file, ids.tolist())
                kept[f"{name}-{format} llama.cpp"] = logits_TV.astype(np.float16)
                kept[f"{name}-{format} written"] = np.array(written, np.int16)
    np.savez_compressed(FOLDER / "answers.npz", **kept)  # type: ignore[arg-type]
    for package in ("transformers", "torch", "numpy"):
        print(package, metadata.version(package))
    print(source.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
