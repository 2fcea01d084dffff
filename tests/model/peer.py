"""The same weights in transformers: an implementation that we did not write."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.config import GQASizes, MLASizes, ModelConfig


def transformers_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The class of the checkpoint's family, float32.

    DeepseekV3ForCausalLM for a sigmoid gate, DeepseekV2ForCausalLM for softmax."""
    config = checkpoint.config
    peer: PreTrainedModel
    if config.architecture == "qwen3moe":
        peer = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_settings(config), **_grouped_settings(config)))
    elif config.architecture == "olmoe":
        peer = OlmoeForCausalLM(OlmoeConfig(**_settings(config), **_grouped_settings(config)))
    elif config.gating == "sigmoid":
        peer = DeepseekV3ForCausalLM(
            DeepseekV3Config(**_settings(config), **_latent_settings(config))
        )
    else:
        settings = _settings(config) | _latent_settings(config) | _v2_settings(config)
        peer = DeepseekV2ForCausalLM(DeepseekV2Config(**settings))
    missing, unexpected = peer.load_state_dict(_weights(checkpoint), strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "rotary" not in name], missing
    peer.float()
    return peer.eval()


def _settings(c: ModelConfig) -> dict[str, Any]:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": c.yarn.factor,
            "original_max_position_embeddings": c.yarn.original_context,
            "beta_fast": c.yarn.beta_fast,
            "beta_slow": c.yarn.beta_slow,
            "mscale": c.yarn.mscale,
            "mscale_all_dim": c.yarn.mscale_all_dim,
        }
    return dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        moe_intermediate_size=c.expert_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_experts_per_tok=c.top_k,
        norm_topk_prob=c.norm_topk_prob,
        rms_norm_eps=c.rms_eps,
        max_position_embeddings=c.context_length,
        rope_parameters=rope,
        tie_word_embeddings=c.tied_output,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )


def _latent_settings(c: ModelConfig) -> dict[str, Any]:
    return dict(
        num_key_value_heads=c.num_heads,
        n_shared_experts=c.num_shared_experts,
        n_routed_experts=c.num_experts,
        first_k_dense_replace=c.first_dense_layers,
        n_group=c.n_group,
        topk_group=c.topk_group,
        routed_scaling_factor=c.routed_scaling_factor,
        q_lora_rank=c.mla.q_lora_rank or None,
        kv_lora_rank=c.mla.kv_lora_rank,
        qk_nope_head_dim=c.mla.qk_nope_dim,
        qk_rope_head_dim=c.mla.qk_rope_dim,
        v_head_dim=c.mla.v_dim,
    )


def _grouped_settings(c: ModelConfig) -> dict[str, Any]:
    assert isinstance(c.attention, GQASizes)
    return dict(
        num_key_value_heads=c.attention.num_kv_heads,
        head_dim=c.attention.head_dim,
        num_experts=c.num_experts,
    )


def _v2_settings(c: ModelConfig) -> dict[str, Any]:
    return {"topk_method": "group_limited_greedy" if c.n_group > 1 else "greedy"}


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    c = checkpoint.config

    def get(name: str) -> Tensor:
        return torch.from_numpy(np.array(checkpoint.tensor(name).dequantize()))

    weights = {
        "model.embed_tokens.weight": get("token_embd.weight"),
        "model.norm.weight": get("output_norm.weight"),
        "lm_head.weight": get("token_embd.weight" if c.tied_output else "output.weight"),
    }
    for i in range(c.num_layers):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        weights[theirs + "input_layernorm.weight"] = get(ours + "attn_norm.weight")
        weights[theirs + "post_attention_layernorm.weight"] = get(ours + "ffn_norm.weight")
        weights |= {attention + name: get(ours + part) for name, part in _attention(c).items()}
        if isinstance(c.attention, MLASizes):
            # kv_b rows: for each head its N key rows (k_b transposed), then its V value rows.
            k_b_HNC = get(ours + "attn_k_b.weight").transpose(1, 2)
            kv_b = torch.cat((k_b_HNC, get(ours + "attn_v_b.weight")), dim=1).flatten(0, 1)
            weights[attention + "kv_b_proj.weight"] = kv_b
        mlp = theirs + "mlp."
        if i < c.first_dense_layers:
            for m in ("gate", "up", "down"):
                weights[f"{mlp}{m}_proj.weight"] = get(f"{ours}ffn_{m}.weight")
            continue
        weights[mlp + "gate.weight"] = get(ours + "ffn_gate_inp.weight")
        if c.score_correction:
            weights[mlp + "gate.e_score_correction_bias"] = get(ours + "exp_probs_b.bias")
        gate_up = [get(f"{ours}ffn_{m}_exps.weight") for m in ("gate", "up")]
        weights[mlp + "experts.gate_up_proj"] = torch.cat(gate_up, dim=1)
        weights[mlp + "experts.down_proj"] = get(ours + "ffn_down_exps.weight")
        for m in ("gate", "up", "down") if c.num_shared_experts else ():
            weights[f"{mlp}shared_experts.{m}_proj.weight"] = get(f"{ours}ffn_{m}_shexp.weight")
    return weights


def _attention(c: ModelConfig) -> dict[str, str]:
    """{their name: ours} of what is stored the same way."""
    if isinstance(c.attention, GQASizes):
        same = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "q_norm": "q_norm", "k_norm": "k_norm"}
    else:
        same = {"kv_a_proj_with_mqa": "kv_a_mqa", "kv_a_layernorm": "kv_a_norm"}
        if c.attention.q_lora_rank:
            same |= {"q_a_proj": "q_a", "q_a_layernorm": "q_a_norm", "q_b_proj": "q_b"}
        else:
            same |= {"q_proj": "q"}
    same["o_proj"] = "output"
    return {f"{theirs}.weight": f"attn_{ours}.weight" for theirs, ours in same.items()}
