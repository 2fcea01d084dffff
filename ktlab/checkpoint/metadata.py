"""Between a GGUF's metadata and a ModelConfig, in both directions.

Keys are those that llama.cpp's convert_hf_to_gguf.py writes (`deepseek2.*`, `qwen3moe.*`,
`olmoe.*`); defaults for keys that older files lack are llama.cpp's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gguf import GGUFValueType

from ktlab.checkpoint.checkpoint import together
from ktlab.checkpoint.config import GQASizes, MLASizes, ModelConfig, YarnScaling
from ktlab.checkpoint.fields import FieldReader
from ktlab.checkpoint.names import Shape
from ktlab.errors import CheckpointError, short

SOFTMAX, SIGMOID = 1, 2
"""Values of expert_gating_func (gguf-py ExpertGatingFuncType); absent or 0 means softmax."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What files of one architecture leave to the program that reads them."""

    models: str
    qk_norm: Literal["latent", "head", "projection"]
    """"latent": multi-head latent attention; else grouped queries, with a norm over this."""
    norm_topk_prob: bool = False
    """Whether weights are normalised where `expert_weights_norm` is missing."""


FAMILIES = {
    "deepseek2": Family(
        models="DeepSeek-V2, V2-Lite, V3, R1, Moonlight, Kimi-K2", qk_norm="latent"
    ),
    "qwen3moe": Family(
        models="Qwen3-30B-A3B, Qwen3-235B-A22B", qk_norm="head", norm_topk_prob=True
    ),
    "olmoe": Family(models="OLMoE-1B-7B", qk_norm="projection"),
}
"""The values of `general.architecture` that are read here."""

Field = tuple[Any, GGUFValueType]


def check_architecture(where: str, metadata: Mapping[str, object]) -> Family:
    """The family of a file; refuses what we do not have, before its keys are looked for."""
    found = metadata.get("general.architecture")
    if isinstance(found, str) and found in FAMILIES:
        return FAMILIES[found]
    known = ", ".join(f"{name!r} ({family.models})" for name, family in FAMILIES.items())
    raise CheckpointError(f"{where}: architecture {short(found)}, expected one of {known}")


def config_from_metadata(
    where: str, metadata: Mapping[str, object], shapes: Mapping[str, Shape] | None = None
) -> ModelConfig:
    """The configuration that a GGUF states; every missing or odd key in one CheckpointError.

    `shapes` of the file's tensors say what no key does: the vocabulary's size, whether output and
    embedding are one, whether the choice of experts is corrected by a bias, and layers for
    next-token prediction. Without them a sigmoid gate means a bias, as in all released models.
    """
    family = check_architecture(where, metadata)
    architecture = str(metadata["general.architecture"])
    read = FieldReader(metadata, architecture + ".")
    gating = read.count("expert_gating_func", 0, least=0) or SOFTMAX
    if gating not in (SOFTMAX, SIGMOID):
        read.problems.append(
            f"{architecture}.expert_gating_func is {gating}, "
            f"expected {SOFTMAX} (softmax) or {SIGMOID} (sigmoid)"
        )
    embedding = (shapes or {}).get("token_embd.weight")
    blocks, nextn = read.count("block_count"), read.count("nextn_predict_layers", 0, least=0)
    width = read.count("feed_forward_length")
    values: dict[str, Any] = dict(
        name=str(metadata.get("general.name") or where.removesuffix(".gguf")),
        architecture=architecture,
        vocab_size=read.count("vocab_size", embedding[0] if embedding else None),
        hidden_size=read.count("embedding_length"),
        num_layers=blocks - nextn,
        num_nextn_layers=nextn,
        first_dense_layers=read.count("leading_dense_block_count", 0, least=0),
        context_length=read.count("context_length"),
        intermediate_size=width,
        num_experts=read.count("expert_count"),
        num_shared_experts=read.count("expert_shared_count", 0, least=0),
        top_k=read.count("expert_used_count"),
        # Where every layer has experts, the plain key may be theirs (OLMoE).
        expert_size=read.count("expert_feed_forward_length", width),
        attention=_latent(read) if family.qk_norm == "latent" else _grouped(read, family.qk_norm),
        rms_eps=read.number("attention.layer_norm_rms_epsilon"),
        rope_theta=read.number("rope.freq_base", 10000.0),
        yarn=_yarn(read),
        gating="sigmoid" if gating == SIGMOID else "softmax",
        score_correction=gating == SIGMOID,
        n_group=max(1, read.count("expert_group_count", 1, least=0)),
        topk_group=max(1, read.count("expert_group_used_count", 1, least=0)),
        norm_topk_prob=read.flag("expert_weights_norm", family.norm_topk_prob),
        # llama.cpp treats 0 as "not scaled".
        routed_scaling_factor=read.number("expert_weights_scale", 1.0) or 1.0,
    )
    if nextn >= blocks:
        read.problems.append(
            f"{architecture}.block_count is {blocks}, of which {nextn} are for next-token "
            "prediction: no layer is left to run"
        )
    if read.problems:
        raise CheckpointError(
            together(where, read.problems, "convert it with a current convert_hf_to_gguf.py")
        )
    if shapes is not None:
        values |= _seen(shapes, values["num_layers"])
    try:
        return ModelConfig(**values)
    except CheckpointError as error:
        found = str(error).removeprefix(f"{values['name']}: ")
        raise CheckpointError(f"{where}: {found}") from None


def _seen(shapes: Mapping[str, Shape], layers: int) -> dict[str, object]:
    """What the table of tensors says beyond the keys."""
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blk\.(\d{1,6})\.", name))}
    return {
        "tied_output": "token_embd.weight" in shapes and "output.weight" not in shapes,
        "score_correction": any(name.endswith(".exp_probs_b.bias") for name in shapes),
        # Some converters keep these layers without counting them.
        "num_nextn_layers": sum(block >= layers for block in blocks),
    }


def _latent(read: FieldReader) -> MLASizes:
    rope = read.count("rope.dimension_count")
    # Older files, made before MLA was absorbed, state the true head sizes in the plain keys.
    mla = "_mla" if read.has("attention.key_length_mla") else ""
    key = read.count(f"attention.key_length{mla}")
    if key <= rope and not read.problems:
        read.problems.append(
            f"{read.prefix}attention.key_length{mla} is {key}, expected "
            f"more than rope.dimension_count, which is {rope}"
        )
    return MLASizes(
        num_heads=read.count("attention.head_count"),
        q_lora_rank=read.count("attention.q_lora_rank", 0, least=0),
        kv_lora_rank=read.count("attention.kv_lora_rank"),
        qk_nope_dim=key - rope,
        qk_rope_dim=rope,
        v_dim=read.count(f"attention.value_length{mla}"),
    )


def _grouped(read: FieldReader, qk_norm: Literal["head", "projection"]) -> GQASizes:
    heads = read.count("attention.head_count")
    share = read.count("embedding_length", 0, least=0) // heads
    head_dim = read.count("attention.key_length", share or None)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = read.count(key, head_dim)
        if found != head_dim:
            read.problems.append(
                f"{read.prefix}{key} is {found}, expected {head_dim}, the length of a key"
            )
    return GQASizes(
        num_heads=heads,
        num_kv_heads=read.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        qk_norm=qk_norm,
    )


def _yarn(read: FieldReader) -> YarnScaling | None:
    kind = read.metadata.get(read.prefix + "rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        read.problems.append(
            f"{read.prefix}rope.scaling.type is {short(kind)}, expected 'yarn' or 'none'"
        )
        return None
    # The file holds 0.1 * mscale_all_dim (a factor that llama.cpp keeps for old files' sake), and
    # no mscale: the two are equal in DeepSeek's models. Without the key the original had neither,
    # which in DeepSeek's code means mscale 1 and mscale_all_dim 0.
    has_mscale = read.has("rope.scaling.yarn_log_multiplier")
    mscale = round(read.number("rope.scaling.yarn_log_multiplier", 0.0) * 10, 6)
    return YarnScaling(
        factor=read.number("rope.scaling.factor"),
        original_context=read.count("rope.scaling.original_context_length"),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=mscale if has_mscale else 1.0,
        mscale_all_dim=mscale,
    )


def metadata_from_config(config: ModelConfig) -> dict[str, Field]:
    """{key: (value, GGUF type)} as convert_hf_to_gguf.py writes them for this configuration.

    llama.cpp knows a DeepSeek model without q_lora (V2-Lite) by its 27 layers and refuses others.
    """
    family = check_architecture(config.name, {"general.architecture": config.architecture})
    u32, f32, boolean = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL
    fields: dict[str, Field] = {
        "context_length": (config.context_length, u32),
        "block_count": (config.num_layers, u32),
        "embedding_length": (config.hidden_size, u32),
        "feed_forward_length": (config.intermediate_size, u32),
        "vocab_size": (config.vocab_size, u32),
        "attention.layer_norm_rms_epsilon": (config.rms_eps, f32),
        "rope.freq_base": (config.rope_theta, f32),
        "expert_count": (config.num_experts, u32),
        "expert_used_count": (config.top_k, u32),
        "expert_feed_forward_length": (config.expert_size, u32),
    }
    sizes = config.attention
    if isinstance(sizes, MLASizes):
        fields |= _latent_fields(sizes)
        fields |= {
            "leading_dense_block_count": (config.first_dense_layers, u32),
            "expert_shared_count": (config.num_shared_experts, u32),
            "expert_group_count": (config.n_group, u32),
            "expert_group_used_count": (config.topk_group, u32),
            "expert_weights_scale": (config.routed_scaling_factor, f32),
            "expert_weights_norm": (config.norm_topk_prob, boolean),
            "expert_gating_func": (SIGMOID if config.gating == "sigmoid" else SOFTMAX, u32),
        }
    else:
        fields |= {
            "attention.head_count": (sizes.num_heads, u32),
            "attention.head_count_kv": (sizes.num_kv_heads, u32),
            "attention.key_length": (sizes.head_dim, u32),
            "attention.value_length": (sizes.head_dim, u32),
            "rope.dimension_count": (sizes.head_dim, u32),
        }
        if config.norm_topk_prob != family.norm_topk_prob:
            fields["expert_weights_norm"] = (config.norm_topk_prob, boolean)
    if config.yarn is not None:
        fields |= _yarn_fields(config.name, config.yarn)
    return {f"{config.architecture}.{key}": field for key, field in fields.items()}


def _latent_fields(sizes: MLASizes) -> dict[str, Field]:
    u32 = GGUFValueType.UINT32
    fields: dict[str, Field] = {
        "attention.head_count": (sizes.num_heads, u32),
        # Absorbed MLA is multi-query attention over the latent: one key head.
        "attention.head_count_kv": (1, u32),
        "attention.key_length": (sizes.kv_lora_rank + sizes.qk_rope_dim, u32),
        "attention.value_length": (sizes.kv_lora_rank, u32),
        "attention.key_length_mla": (sizes.qk_dim, u32),
        "attention.value_length_mla": (sizes.v_dim, u32),
        "attention.kv_lora_rank": (sizes.kv_lora_rank, u32),
        "rope.dimension_count": (sizes.qk_rope_dim, u32),
    }
    if sizes.q_lora_rank:
        fields["attention.q_lora_rank"] = (sizes.q_lora_rank, u32)
    return fields


def _yarn_fields(where: str, yarn: YarnScaling) -> dict[str, Field]:
    f32 = GGUFValueType.FLOAT32
    fields: dict[str, Field] = {
        "rope.scaling.type": ("yarn", GGUFValueType.STRING),
        "rope.scaling.factor": (yarn.factor, f32),
        "rope.scaling.original_context_length": (yarn.original_context, GGUFValueType.UINT32),
        "rope.scaling.yarn_beta_fast": (yarn.beta_fast, f32),
        "rope.scaling.yarn_beta_slow": (yarn.beta_slow, f32),
    }
    if yarn.mscale_all_dim:
        if yarn.mscale != yarn.mscale_all_dim:
            raise CheckpointError(
                f"{where}: GGUF has no place for mscale {yarn.mscale} beside mscale_all_dim "
                f"{yarn.mscale_all_dim}; only equal values can be written"
            )
        fields["rope.scaling.yarn_log_multiplier"] = (0.1 * yarn.mscale_all_dim, f32)
    return fields
