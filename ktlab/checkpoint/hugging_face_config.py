"""From a Hugging Face config.json to a ModelConfig.

Keys and what a missing one means are those of the model's own code: DeepSeek's configuration
classes, and transformers' (models/*/configuration_*.py). What this kit does not compute (biases,
other activations, sliding windows, other RoPE scalings) is refused, not left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ktlab.checkpoint.checkpoint import together
from ktlab.checkpoint.config import GQASizes, MLASizes, ModelConfig, YarnScaling
from ktlab.checkpoint.fields import FieldReader
from ktlab.errors import CheckpointError, nearest, short


@dataclass(frozen=True, kw_only=True)
class ModelType:
    """What configurations of one `model_type` leave to the code that reads them."""

    architecture: str
    """The GGUF architecture that has the same stages."""
    models: str
    gating: Literal["softmax", "sigmoid"]
    """Where `scoring_func` is missing."""
    qk_norm: Literal["latent", "head", "projection"]
    """"latent": multi-head latent attention; else grouped queries, with a norm over this."""
    experts: str
    """The key that counts them; transformers 5 may write another name for it."""
    expert_width: str


_V3 = ModelType(
    architecture="deepseek2",
    models="DeepSeek-V3, R1, Moonlight",
    gating="sigmoid",
    qk_norm="latent",
    experts="n_routed_experts",
    expert_width="moe_intermediate_size",
)
MODEL_TYPES = {
    "deepseek_v2": ModelType(
        architecture="deepseek2",
        models="DeepSeek-V2, V2-Lite",
        gating="softmax",
        qk_norm="latent",
        experts="n_routed_experts",
        expert_width="moe_intermediate_size",
    ),
    "deepseek_v3": _V3,
    "kimi_k2": ModelType(**{**vars(_V3), "models": "Kimi-K2"}),
    "qwen3_moe": ModelType(
        architecture="qwen3moe",
        models="Qwen3-30B-A3B, Qwen3-235B-A22B",
        gating="softmax",
        qk_norm="head",
        experts="num_experts",
        expert_width="moe_intermediate_size",
    ),
    "olmoe": ModelType(
        architecture="olmoe",
        models="OLMoE-1B-7B",
        gating="softmax",
        qk_norm="projection",
        experts="num_experts",
        expert_width="intermediate_size",
    ),
}
"""The values of `model_type` that are read here."""

_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "use_sliding_window": (False,),
    "clip_qkv": (),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
}
"""{key: values that this kit computes}; a missing key and null are always among them."""


def check_model_type(where: str, content: Mapping[str, object]) -> ModelType:
    """The kind of model; refuses what we do not have, before its keys are looked for."""
    found = content.get("model_type")
    if isinstance(found, str) and found in MODEL_TYPES:
        return MODEL_TYPES[found]
    known = ", ".join(f'"{name}" ({kind.models})' for name, kind in MODEL_TYPES.items())
    guess = nearest(found, MODEL_TYPES) if isinstance(found, str) else ""
    raise CheckpointError(f"{where}: model_type {short(found)}{guess}; expected one of {known}")


def config_from_json(where: str, name: str, content: Mapping[str, object]) -> ModelConfig:
    """The configuration that a config.json states; all faults of it in one CheckpointError.

    What the weights must say (tied output or not, layers for next-token prediction) is taken as the
    file states it; whoever opens the weights looks at them.
    """
    kind = check_model_type(where, content)
    given = {key: value for key, value in content.items() if value is not None}
    read = FieldReader(given, "")
    for key, allowed in _ONLY.items():
        if key in given and given[key] not in allowed:
            usable = " or ".join(short(value) for value in allowed) or "null"
            read.problems.append(f"{key} is {short(given[key])}; this kit computes {usable} only")
    layers = read.count("num_hidden_layers")
    experts = next((key for key in _EXPERT_COUNTS if key in given), kind.experts)
    latent = kind.qk_norm == "latent"
    method = given.get("topk_method", "")
    grouped = latent and method != "greedy"
    gating = given.get("scoring_func", kind.gating)
    rope = _rope(read)
    values: dict[str, Any] = dict(
        name=name,
        architecture=kind.architecture,
        vocab_size=read.count("vocab_size"),
        hidden_size=read.count("hidden_size"),
        num_layers=layers,
        first_dense_layers=_first_dense(read, layers) if latent else _mlp_only(read, layers),
        context_length=read.count("max_position_embeddings"),
        intermediate_size=read.count("intermediate_size"),
        num_experts=read.count(experts),
        num_shared_experts=read.count("n_shared_experts", 0, least=0) if latent else 0,
        top_k=read.count("num_experts_per_tok"),
        expert_size=read.count(kind.expert_width),
        attention=_latent(read, content) if latent else _grouped(read, kind),
        rms_eps=read.number("rms_norm_eps"),
        rope_theta=rope.number("rope_theta", 10000.0),
        yarn=_yarn(rope),
        gating=gating,
        score_correction=latent and (method == "noaux_tc" or (not method and gating == "sigmoid")),
        n_group=read.count("n_group", 1) if grouped else 1,
        topk_group=read.count("topk_group", 1) if grouped else 1,
        norm_topk_prob=read.flag("norm_topk_prob", False),
        routed_scaling_factor=read.number("routed_scaling_factor", 1.0) if latent else 1.0,
        tied_output=read.flag("tie_word_embeddings", False),
    )
    read.problems += rope.problems
    if read.problems:
        raise CheckpointError(
            together(where, read.problems, "compare it with the model's original config.json")
        )
    try:
        return ModelConfig(**values)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{name}: ')}") from None


def _latent(read: FieldReader, content: Mapping[str, object]) -> MLASizes:
    if "q_lora_rank" not in content:  # null is an answer: queries are not compressed
        read.problems.append("q_lora_rank is missing (expected a whole number or null)")
    return MLASizes(
        num_heads=read.count("num_attention_heads"),
        q_lora_rank=read.count("q_lora_rank", 0, least=0),
        kv_lora_rank=read.count("kv_lora_rank"),
        qk_nope_dim=read.count("qk_nope_head_dim"),
        qk_rope_dim=read.count("qk_rope_head_dim"),
        v_dim=read.count("v_head_dim"),
        rope_pairs="interleaved" if read.flag("rope_interleave", True) else "halves",
    )


def _grouped(read: FieldReader, kind: ModelType) -> GQASizes:
    heads = read.count("num_attention_heads")
    share = read.count("hidden_size", 0, least=0) // heads
    return GQASizes(
        num_heads=heads,
        num_kv_heads=read.count("num_key_value_heads", heads),
        head_dim=read.count("head_dim", share or None),
        qk_norm="head" if kind.qk_norm == "head" else "projection",
    )


def _first_dense(read: FieldReader, layers: int) -> int:
    return min(layers, read.count("first_k_dense_replace", least=0))


def _mlp_only(read: FieldReader, layers: int) -> int:
    """Qwen lists its dense layers; here they must come first."""
    dense = read.metadata.get("mlp_only_layers") or []
    if dense != list(range(len(dense) if isinstance(dense, list) else 0)):
        read.problems.append(
            f"mlp_only_layers is {short(dense)}; this kit computes leading dense layers only"
        )
        return 0
    return len(dense) if isinstance(dense, list) else 0


def _rope(read: FieldReader) -> FieldReader:
    """Everything about RoPE: `rope_parameters` of transformers 5, or the older `rope_scaling`."""
    prefix = "rope_parameters." if "rope_parameters" in read.metadata else "rope_scaling."
    found: dict[str, object] = {}
    if "rope_theta" in read.metadata:
        found[f"{prefix}rope_theta"] = read.metadata["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        part = read.metadata.get(key, {})
        if isinstance(part, Mapping):
            found |= {f"{prefix}{k}": value for k, value in part.items() if value is not None}
        else:
            read.problems.append(f"{key} is {short(part)}, expected an object or null")
    return FieldReader(found, prefix)


def _yarn(read: FieldReader) -> YarnScaling | None:
    for key, usual in (("attention_factor", None), ("truncate", True)):
        if read.get(key, usual) != usual:
            read.problems.append(
                f"{read.prefix}{key} is {short(read.get(key))}, which this kit does not compute"
            )
    kind = read.get("rope_type", read.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        read.problems.append(
            f'{read.prefix}rope_type is {short(kind)}; this kit computes "yarn" or "default" only'
        )
        return None
    return YarnScaling(
        factor=read.number("factor"),
        original_context=read.count("original_max_position_embeddings"),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        mscale=read.number("mscale", 1.0),
        mscale_all_dim=read.number("mscale_all_dim", 0.0),
    )
