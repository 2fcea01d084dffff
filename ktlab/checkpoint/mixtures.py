"""What llama.cpp means by a file type: "Q4_K_M" is a mixture of formats, chosen tensor by tensor.

The rule depends on a tensor's name, on how far up its layer stands, and on whether its rows divide
into blocks. Source: llama.cpp, src/llama-quant.cpp (`llama_tensor_get_type_impl`,
`tensor_type_fallback`), as llama-cpp-python 0.3.36 ships it; without an importance matrix.
`tests/checkpoint/llama_quantize.json` holds what its quantizer did to small files.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ktlab.checkpoint.config import GQASizes, ModelConfig
from ktlab.checkpoint.names import Shape, is_quantizable
from ktlab.errors import FormatError, nearest
from ktlab.quantization import FORMATS, Format, fallback_format, get_format

BASES = {
    **{name: name for name in ("f32", "f16", "bf16", "q8_0", "q6_k", "iq4_nl", "iq4_xs")},
    **{name: name for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k")},
    **{f"q3_k_{size}": "q3_k" for size in "sml"},
    **{f"q{bits}_k_{size}": f"q{bits}_k" for bits in (4, 5) for size in "sm"},
    "mxfp4_moe": "q8_0",
}
"""{file type: the format of every tensor that no rule below names}."""

_FLOATS = ("f32", "f16", "bf16")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What the rules ask about a model beside a tensor's name."""

    layers: int
    experts: int
    queries_per_key: int
    """Query heads that share one key head, llama.cpp's `n_gqa`."""
    values: int
    """Tensors of the model that hold a layer's values."""


def mixture(file_type: str, tensors: Mapping[str, Shape], config: ModelConfig) -> dict[str, Format]:
    """{name: format} for the tensors {name: shape} of a GGUF of that file type.

    `file_type` is a name such as "q4_k_m", or a format ("q8_0", "int8_channel") that all matrices
    take; norms, biases and the router's gate stay f32, and rows that do not divide into blocks fall
    back. FormatError names the nearest known one.
    """
    name = file_type.lower()
    if name not in BASES and name not in FORMATS:
        known = [*BASES, *(f for f in FORMATS if f not in BASES)]
        raise FormatError(
            f'unknown file type "{file_type}"{nearest(name, known)}; usable: {", ".join(known)}'
        )
    layers = [int(found[1]) for found in map(_LAYER.match, tensors) if found]
    model = _Model(
        layers=max(layers, default=-1) + 1,
        experts=config.num_experts,
        queries_per_key=_queries_per_key(tensors, config),
        values=sum(map(_holds_values, tensors)),
    )
    tied = "output.weight" not in tensors
    order = sorted(tensors, key=lambda tensor: (_layer(tensor), tensor))
    value_index, formats = 0, {}
    for tensor in order:
        shape = tensors[tensor]
        if not is_quantizable(tensor, shape):
            formats[tensor] = get_format("f32")
            continue
        role = "output.weight" if tied and tensor == "token_embd.weight" else tensor
        wanted = _wanted(name, role, shape, model, value_index)
        value_index += _holds_values(tensor)
        formats[tensor] = fallback_format(wanted, shape[-1])
    return {tensor: formats[tensor] for tensor in tensors}


def _wanted(name: str, tensor: str, shape: Shape, model: _Model, value_index: int) -> str:
    """The format that this tensor would have if its rows divided into any blocks."""
    base = BASES.get(name, name)
    if name not in BASES or name in _FLOATS:
        return base
    if tensor == "output.weight":
        if name == "mxfp4_moe" or shape[-1] % get_format(base).block_size:
            return "q8_0"
        return base if base == "q8_0" else "q6_k"
    if name == "mxfp4_moe":
        return "mxfp4" if len(shape) > 2 and shape[0] > 1 else base
    if tensor == "token_embd.weight":
        return base
    if _holds_values(tensor):
        return _value_format(name, base, value_index, model)
    if "attn_k.weight" in tensor:
        return "q8_0" if model.experts == 8 else base
    if "ffn_down" in tensor:
        return _down_format(name, base, _layer(tensor), model.layers)
    if "attn_output.weight" in tensor:
        return _attention_output_format(name, base, model)
    return base


def _value_format(name: str, base: str, index: int, model: _Model) -> str:
    """Values lose most; `index` counts the tensors that hold them, not the layers."""
    if model.experts == 8:  # Mixtral's
        return "q8_0"
    shared = model.queries_per_key >= 4
    rules: dict[str, Callable[[], str]] = {
        "q2_k": lambda: "q4_k" if shared else "q3_k",
        "q3_k_m": lambda: "q5_k" if index < 2 else "q4_k",
        "q3_k_l": lambda: "q5_k",
        "iq4_nl": lambda: "q5_k" if shared else base,
        "iq4_xs": lambda: "q5_k" if shared else base,
        "q4_k_m": lambda: "q6_k" if _deserves_more(index, model.values) else base,
        "q5_k_m": lambda: "q6_k" if _deserves_more(index, model.values) else base,
        "q4_k_s": lambda: "q5_k" if index < 4 else base,
    }
    return rules.get(name, lambda: base)()


def _down_format(name: str, base: str, layer: int, layers: int) -> str:
    early = layer < layers // 8
    rules: dict[str, Callable[[], str]] = {
        "q2_k": lambda: "q3_k",
        "q3_k_m": lambda: "q5_k" if layer < layers // 16 else "q4_k",
        "q3_k_l": lambda: "q5_k",
        "q4_k_m": lambda: "q6_k" if _deserves_more(layer, layers) else base,
        "q5_k_m": lambda: "q6_k" if _deserves_more(layer, layers) else base,
        "iq4_nl": lambda: "q5_k" if early else base,
        "iq4_xs": lambda: "q5_k" if early else base,
        "q4_k_s": lambda: "q5_k" if early else base,
    }
    return rules.get(name, lambda: base)()


def _attention_output_format(name: str, base: str, model: _Model) -> str:
    if model.experts == 8:
        small = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")
        return "q5_k" if name in small else base
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(name, base)


def _deserves_more(index: int, count: int) -> bool:
    """The first and last eighth, and every third between them: llama.cpp's `use_more_bits`."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _holds_values(tensor: str) -> bool:
    """attn_kv_b counts as values; the attn_v_b of newer files does not."""
    return any(part in tensor for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _queries_per_key(tensors: Mapping[str, Shape], config: ModelConfig) -> int:
    """Split MLA is written as one key head for all queries, fused MLA as a key head for each."""
    if any("attn_kv_b.weight" in tensor for tensor in tensors):
        return 1
    sizes = config.attention
    return sizes.num_heads // (sizes.num_kv_heads if isinstance(sizes, GQASizes) else 1)


def _layer(tensor: str) -> int:
    found = _LAYER.match(tensor)
    return int(found[1]) if found else -1
