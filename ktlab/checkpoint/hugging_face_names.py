"""Where a canonical tensor lies in a Hugging Face folder: under which names, in which shapes.

Names are those of transformers' modules and of the published checkpoints. Experts come one by one
(`experts.7.gate_proj.weight`, what `save_pretrained` writes) or stacked, gate and up in one tensor
(`experts.gate_up_proj`, what transformers 5 has in memory). Letters as in names.py.
"""

from collections.abc import Container
from dataclasses import dataclass

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.names import Shape, fused_kv_b

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
}
_KV_B = "self_attn.kv_b_proj.weight"
_EXPERTS = {f"ffn_{matrix}_exps.weight": matrix for matrix in ("gate", "up", "down")}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The stored tensors that one canonical tensor is made of."""

    names: tuple[str, ...]
    """One, or one for each expert."""
    shape: Shape
    """Of each of them."""
    rows: tuple[int, int | None] = (0, None)
    """Which rows of each matrix (or head) are taken: gate and up, keys and values are fused."""
    heads: int = 0
    """Into so many heads the rows of a fused `kv_b_proj` divide."""
    transposed: bool = False
    """Keys are stored (N, C) a head and used (C, N)."""


def origin(config: ModelConfig, name: str, shape: Shape, stored: Container[str]) -> Origin:
    """What the tensor `name` of the canonical `shape` is made of, given what is `stored`."""
    if name in _TOP:
        return Origin(names=(_TOP[name],), shape=shape)
    _, layer, part = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if part in ("attn_k_b.weight", "attn_v_b.weight"):
        keys = part == "attn_k_b.weight"
        sizes = config.mla
        return Origin(
            names=(prefix + _KV_B,),
            shape=fused_kv_b(sizes),
            rows=(0, sizes.qk_nope_dim) if keys else (sizes.qk_nope_dim, None),
            heads=sizes.num_heads,
            transposed=keys,
        )
    if part in _EXPERTS:
        return _experts(prefix + "mlp.experts.", _EXPERTS[part], shape, stored)
    return Origin(names=(prefix + _LAYER[part],), shape=shape)


def _experts(prefix: str, matrix: str, shape: Shape, stored: Container[str]) -> Origin:
    experts, rows, cols = shape
    for suffix in ("", ".weight"):
        if (stack := f"{prefix}{matrix}_proj{suffix}") in stored:
            return Origin(names=(stack,), shape=shape)
        if matrix != "down" and (stack := f"{prefix}gate_up_proj{suffix}") in stored:
            half = (0, rows) if matrix == "gate" else (rows, None)
            return Origin(names=(stack,), shape=(experts, 2 * rows, cols), rows=half)
    names = tuple(f"{prefix}{expert}.{matrix}_proj.weight" for expert in range(experts))
    return Origin(names=names, shape=(rows, cols))
