"""The words of KTransformers' rule files: classes, operators, keyword arguments, devices.

Read in kvcache-ai/ktransformers (ktransformers/optimize/optimize_rules/ and operators/, from its
first release to 0.3) and in the rule files of its SOSP'25 artefact; names that later releases gave
up are still read. Nothing here says what a word does to a model: that is effects.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ktlab.errors import nearest

DEFAULT = "default"
"""The class of a rule that keeps a module's own code and only places it."""

OWN = "own"
"""The kind of a class of the user's (own.py)."""

_OPERATORS = "ktransformers.operators."
_CLASSES: Mapping[str, Mapping[str, str]] = {
    "experts": {
        "experts": "KTransformersExperts KTransformersExpertsV2 KTransformersMLPExpert",
        "moe": "KDeepseekV2MoE KDeepseekV2MoEV2 KDeepseekV3MoE KDeepseekV3MoEV2 "
        "DeepseekV2MoEInjected KQwen2MoeSparseMoeBlock KQwen2MoeSparseMoeBlockV2 "
        "KQwen3MoeSparseMoeBlock KQwen3MoeSparseMoeBlockV2 Qwen2MoeSparseMoeBlockInjected "
        "KMistralSparseMoEBlock",
    },
    "linear": {"matrix": "KTransformersLinear KTransformerLinear"},
    "attention": {
        "attention": "KDeepseekV2Attention KDeepseekV3Attention DeepseekV2AttentionInjected "
        "KLlamaAttention flashinfer_attn",
    },
    "balance_serve_attention": {
        "attention": "flashinfer_attn KQwen2MoeAttention KQwen3MoeAttention",
    },
    "RoPE": {
        "rope": "RotaryEmbedding RotaryEmbeddingV2 RotaryEmbeddingV3 YarnRotaryEmbedding "
        "YarnRotaryEmbeddingV3 DynamicNTKScalingRotaryEmbedding",
    },
    "gate": {"router": "KMoEGate KMoEGateDeepSeekV3 KMoEGateQwen2Moe KMoEGateGreedy"},
    "models": {"model": "KDeepseekV2Model KQwen2MoeModel KQwen3MoeModel KLlamaModel"},
    "layer_wise_prefill": {
        "model": "DeepseekV2ModelPerLayerPrefill DeepseekV2ModelKTransformers "
        "Qwen2MoeModelPerLayerPrefill Qwen2MoeModelKTransformers KDeepseekV2Model KQwen2MoeModel",
    },
    "layernorm": {"norm": "RMSNorm KQwen2MoeRMSNorm KQwen3MoeRMSNorm"},
    "mlp": {"mlp": "kDeepseekV3MLP KQwen2MoeMLP"},
    "embedding": {"embedding": "KEmbedding"},
}
"""Module under ktransformers.operators -> what is replaced -> class names."""

REPLACEMENTS: dict[str, str] = {
    f"{_OPERATORS}{module}.{name}": kind
    for module, kinds in _CLASSES.items()
    for kind, names in kinds.items()
    for name in names.split()
}
"""Dotted class -> what it replaces: experts, moe, matrix, attention, rope, router, model, ..."""
_BY_NAME = {dotted.rpartition(".")[2]: kind for dotted, kind in REPLACEMENTS.items()}


def replaces(dotted: str) -> str | None:
    """What a replacement class stands for; None if it is unknown.

    The class's own name counts, since its module was renamed between releases.
    """
    if dotted == DEFAULT:
        return DEFAULT
    module, _, name = dotted.rpartition(".")
    return _BY_NAME.get(name) if module.startswith(_OPERATORS) else None


def nearest_replacement(dotted: str) -> str:
    """'; did you mean ...' for an unknown replacement class."""
    return nearest(dotted, [DEFAULT, *REPLACEMENTS])


# Operators -------------------------------------------------------------------------------------

CPU_KERNEL, TORCH, GPU_KERNEL = "cpu", "torch", "gpu"
OPERATORS: Mapping[str, Mapping[str, str]] = {
    "experts": {
        "KExpertsCPU": CPU_KERNEL, "KExpertsTorch": TORCH, "KExpertsMarlin": GPU_KERNEL,
        "MLPCPUExperts": CPU_KERNEL, "MLPExpertsTorch": TORCH, "MLPExpertsMarlin": GPU_KERNEL,
    },
    "matrix": {
        "KLinearCPUInfer": CPU_KERNEL, "KLinearQ8": CPU_KERNEL, "KLinearTorch": TORCH,
        "KLinearMarlin": GPU_KERNEL, "VLinearMarlin": GPU_KERNEL, "KLinearFP8": GPU_KERNEL,
        "KLinearIPEXLLM": GPU_KERNEL, "QuantizedLinearMarlin": GPU_KERNEL,
        "QuantizedLinearTorch": TORCH,
    },
}  # fmt: skip
"""What computes, by kind: their compiled CPU code, torch, or code for a GPU alone."""

GPU_FORMATS: Mapping[str, str] = {
    "KLinearMarlin": "4 bits", "VLinearMarlin": "4 bits", "QuantizedLinearMarlin": "4 bits",
    "KExpertsMarlin": "4 bits", "MLPExpertsMarlin": "4 bits", "KLinearFP8": "8 bits",
    "KLinearIPEXLLM": "4 bits",
}  # fmt: skip
"""What they compute with on a GPU."""

LLAMAFILE = "llamafile"
EXPERT_BACKENDS: Mapping[str, tuple[str, str]] = {
    LLAMAFILE: ("", ""),
    "AMXInt8": ("int8_channel", "amx_int8"),
    "AMXInt4": ("int4_group128", "amx_int8"),
    "AMXBF16": ("bf16", "amx_bf16"),
}
"""backend= of the experts -> (our format, our isa); "" leaves it as it is."""

# Keyword arguments -----------------------------------------------------------------------------

_DEVICE = re.compile(r"cpu|(cuda|xpu|npu|musa)(:\d{1,3})?")
Check = Callable[[Any], str]
"""Says what is wrong with a value, "" if nothing is."""


def device(value: Any) -> str:
    """A device that KTransformers could be given."""
    if isinstance(value, str) and _DEVICE.fullmatch(value):
        return ""
    return f"{value!r} is no device; expected cpu, or cuda, cuda:0, cuda:1, ... (xpu, npu likewise)"


def is_cpu(value: str) -> bool:
    """Whether a device that passed the check is the one we compute on."""
    return value == "cpu"


def _one_of(known: Mapping[str, Any]) -> Check:
    def check(value: Any) -> str:
        if value is None or (isinstance(value, str) and value in known):
            return ""
        return f"{value!r} is unknown; expected {', '.join(known)}{nearest(str(value), known)}"

    return check


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else f"expected True or False, found {value!r}"


def _count(value: Any) -> str:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return "" if fine else f"expected a whole number from 0 on, found {value!r}"


def _counts(value: Any) -> str:
    """One number, or a list with one for each number of tokens (deferral in a server)."""
    each = value if isinstance(value, list) else [value]
    return next(filter(None, map(_count, each)), "" if each else "expected a number, found []")


def _transfers(value: Any) -> str:
    if not isinstance(value, dict):
        return f"expected layers with their devices, such as 30: cuda:1, found {value!r}"
    wrong = [_count(layer) or device(where) for layer, where in value.items()]
    return "; ".join(filter(None, wrong))


_PLACES: Mapping[str, Check] = {
    "generate_device": device, "prefill_device": device, "out_device": device, "device": device
}  # fmt: skip


def _ops(kind: str) -> dict[str, Check]:
    return {f"{phase}_op": _one_of(OPERATORS[kind]) for phase in ("generate", "prefill")}


KWARGS: Mapping[str, Mapping[str, Check]] = {
    "experts": {
        **_PLACES, **_ops("experts"),
        "generate_mlp_type": _one_of(OPERATORS["experts"]),
        "prefill_mlp_type": _one_of(OPERATORS["experts"]),
        "backend": _one_of(EXPERT_BACKENDS),
        "n_deferred_experts": _counts,
    },
    "matrix": {**_PLACES, **_ops("matrix"), "num_bits": _count, "group_size": _count},
    "attention": {**_PLACES, "absorb_for_prefill": _flag, "chunck_size": _count},
    "model": {
        **_PLACES, "per_layer_prefill_intput_threshold": _count, "transfer_map": _transfers
    },
}  # fmt: skip
"""Keyword arguments of a kind's classes, with KTransformers' spelling; others take devices only."""


PLACES = tuple(_PLACES)


def keyword_arguments(kind: str) -> Mapping[str, Check]:
    """Name -> check, for the classes that replace a `kind`."""
    return KWARGS.get(kind, _PLACES)
