"""Between a GGUF's metadata and a ModelConfig, in both directions.

Keys are those that llama.cpp's convert_hf_to_gguf.py writes for DeepSeek-V2 and V3
(`deepseek2.*`); defaults for keys that older files lack are llama.cpp's.
"""

import math
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType

from ktlab.checkpoint.checkpoint import together
from ktlab.checkpoint.config import ModelConfig, YarnScaling
from ktlab.errors import CheckpointError

ARCHITECTURE = "deepseek2"
SOFTMAX, SIGMOID = 1, 2
"""Values of expert_gating_func (gguf-py ExpertGatingFuncType); absent or 0 means softmax."""
LARGEST = 2**31
"""No count in a configuration is as large as this."""

Field = tuple[Any, GGUFValueType]


class _Reader:
    """Takes typed values out of metadata and collects what is wrong with them."""

    def __init__(self, metadata: Mapping[str, object], prefix: str) -> None:
        self.metadata, self.prefix = metadata, prefix
        self.problems: list[str] = []

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            self.problems.append(f"{self.prefix}{key} is missing (expected a whole number)")
        elif isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            self.problems.append(
                f"{self.prefix}{key} is {_short(value)}, expected a whole number from {least}"
            )
        else:
            return value
        return least

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            self.problems.append(f"{self.prefix}{key} is missing (expected a number)")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{self.prefix}{key} is {_short(value)}, expected a number")
        elif not math.isfinite(value) or value < 0:
            self.problems.append(f"{self.prefix}{key} is {value}, expected a number >= 0")
        else:
            return float(value)
        return 1.0

    def flag(self, key: str) -> bool:
        value = self.metadata.get(self.prefix + key, False)
        if not isinstance(value, bool):
            self.problems.append(f"{self.prefix}{key} is {_short(value)}, expected true or false")
        return bool(value)


def check_architecture(where: str, metadata: Mapping[str, object]) -> None:
    """Refuse what is no DeepSeek model, before its keys are looked for."""
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{where}: one of {parts} files of a split checkpoint, which this kit does not read; "
            "join them with llama.cpp's `llama-gguf-split --merge`"
        )
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(
            f"{where}: architecture {_short(found)}, expected {ARCHITECTURE!r} "
            "(DeepSeek-V2, V2-Lite, V3, R1 and models built like them)"
        )


def config_from_metadata(
    where: str, metadata: Mapping[str, object], *, vocab_size: int | None = None
) -> ModelConfig:
    """The configuration that a GGUF states; every missing or odd key in one CheckpointError.

    `vocab_size` is used where the file does not state it (the rows of token_embd).
    """
    check_architecture(where, metadata)
    read = _Reader(metadata, ARCHITECTURE + ".")
    rope = read.count("rope.dimension_count")
    # Older files, made before MLA was absorbed, state the true head sizes in the plain keys.
    mla = "_mla" if read.has("attention.key_length_mla") else ""
    gating = read.count("expert_gating_func", 0, least=0) or SOFTMAX
    if gating not in (SOFTMAX, SIGMOID):
        read.problems.append(
            f"{ARCHITECTURE}.expert_gating_func is {gating}, "
            f"expected {SOFTMAX} (softmax) or {SIGMOID} (sigmoid)"
        )
    values: dict[str, Any] = dict(
        name=str(metadata.get("general.name") or where.removesuffix(".gguf")),
        vocab_size=read.count("vocab_size", vocab_size),
        hidden_size=read.count("embedding_length"),
        num_layers=read.count("block_count"),
        first_dense_layers=read.count("leading_dense_block_count", 0, least=0),
        context_length=read.count("context_length"),
        intermediate_size=read.count("feed_forward_length"),
        num_experts=read.count("expert_count"),
        num_shared_experts=read.count("expert_shared_count", 0, least=0),
        top_k=read.count("expert_used_count"),
        expert_size=read.count("expert_feed_forward_length"),
        num_heads=read.count("attention.head_count"),
        q_lora_rank=read.count("attention.q_lora_rank", 0, least=0),
        kv_lora_rank=read.count("attention.kv_lora_rank"),
        qk_nope_dim=read.count(f"attention.key_length{mla}") - rope,
        qk_rope_dim=rope,
        v_dim=read.count(f"attention.value_length{mla}"),
        rms_eps=read.number("attention.layer_norm_rms_epsilon"),
        rope_theta=read.number("rope.freq_base", 10000.0),
        yarn=_yarn(read),
        gating="sigmoid" if gating == SIGMOID else "softmax",
        n_group=max(1, read.count("expert_group_count", 1, least=0)),
        topk_group=max(1, read.count("expert_group_used_count", 1, least=0)),
        norm_topk_prob=read.flag("expert_weights_norm"),
        # llama.cpp treats 0 as "not scaled".
        routed_scaling_factor=read.number("expert_weights_scale", 1.0) or 1.0,
    )
    if values["qk_nope_dim"] < 1 and not read.problems:
        read.problems.append(
            f"{ARCHITECTURE}.attention.key_length{mla} is {values['qk_nope_dim'] + rope}, expected "
            f"more than rope.dimension_count, which is {rope}"
        )
    if read.problems:
        raise CheckpointError(
            together(where, read.problems, "convert it with a current convert_hf_to_gguf.py")
        )
    try:
        return ModelConfig(**values)
    except CheckpointError as error:
        found = str(error).removeprefix(f"{values['name']}: ")
        raise CheckpointError(f"{where}: {found}") from None


def _yarn(read: _Reader) -> YarnScaling | None:
    kind = read.metadata.get(read.prefix + "rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        read.problems.append(
            f"{read.prefix}rope.scaling.type is {_short(kind)}, expected 'yarn' or 'none'"
        )
        return None
    # The file holds 0.1 * mscale_all_dim, and no mscale: the two are equal in DeepSeek's models.
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

    llama.cpp knows a model without q_lora (V2-Lite) by its 27 layers and refuses others.
    """
    u32, f32, boolean = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL
    fields: dict[str, Field] = {
        "context_length": (config.context_length, u32),
        "block_count": (config.num_layers, u32),
        "embedding_length": (config.hidden_size, u32),
        "feed_forward_length": (config.intermediate_size, u32),
        "vocab_size": (config.vocab_size, u32),
        "leading_dense_block_count": (config.first_dense_layers, u32),
        "attention.head_count": (config.num_heads, u32),
        # Absorbed MLA is multi-query attention over the latent: one key head.
        "attention.head_count_kv": (1, u32),
        "attention.key_length": (config.kv_lora_rank + config.qk_rope_dim, u32),
        "attention.value_length": (config.kv_lora_rank, u32),
        "attention.key_length_mla": (config.qk_dim, u32),
        "attention.value_length_mla": (config.v_dim, u32),
        "attention.kv_lora_rank": (config.kv_lora_rank, u32),
        "attention.layer_norm_rms_epsilon": (config.rms_eps, f32),
        "rope.dimension_count": (config.qk_rope_dim, u32),
        "rope.freq_base": (config.rope_theta, f32),
        "expert_count": (config.num_experts, u32),
        "expert_used_count": (config.top_k, u32),
        "expert_shared_count": (config.num_shared_experts, u32),
        "expert_feed_forward_length": (config.expert_size, u32),
        "expert_group_count": (config.n_group, u32),
        "expert_group_used_count": (config.topk_group, u32),
        "expert_weights_scale": (config.routed_scaling_factor, f32),
        "expert_weights_norm": (config.norm_topk_prob, boolean),
        "expert_gating_func": (SIGMOID if config.gating == "sigmoid" else SOFTMAX, u32),
    }
    if config.q_lora_rank:
        fields["attention.q_lora_rank"] = (config.q_lora_rank, u32)
    if config.yarn is not None:
        fields |= _yarn_fields(config.name, config.yarn)
    return {f"{ARCHITECTURE}.{key}": field for key, field in fields.items()}


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


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
