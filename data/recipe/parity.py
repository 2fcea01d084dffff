"""Check of the training model against transformers' DeepseekV3ForCausalLM, in float32.

    python data/recipe/parity.py [.build/train/last.pt]

Without a checkpoint, the weights are random, and so are the norms and the selection bias.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import Config, RMSNorm, TinyModel
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def transformers_config(c: Config) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.dense_width,
        moe_intermediate_size=c.expert_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        n_shared_experts=c.shared_experts,
        n_routed_experts=c.experts,
        num_experts_per_tok=c.chosen,
        first_k_dense_replace=c.dense_layers,
        n_group=c.groups,
        topk_group=c.chosen_groups,
        norm_topk_prob=True,
        routed_scaling_factor=c.routed_scale,
        q_lora_rank=c.q_rank,
        kv_lora_rank=c.kv_rank,
        qk_nope_head_dim=c.nope,
        qk_rope_head_dim=c.rope,
        v_head_dim=c.value,
        rms_norm_eps=c.eps,
        rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.theta},
        max_position_embeddings=c.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def transformers_weights(model: TinyModel) -> dict[str, Tensor]:
    """The model's weights under the names transformers gives them."""
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = {
        "model.embed_tokens.weight": own["embedding"],
        "model.norm.weight": own["norm.weight"],
        "lm_head.weight": own["head"],
    }
    attention = {
        "q_a": "q_a_proj", "q_a_norm.weight": "q_a_layernorm", "q_b": "q_b_proj",
        "kv_a": "kv_a_proj_with_mqa", "kv_a_norm.weight": "kv_a_layernorm", "kv_b": "kv_b_proj",
        "out": "o_proj",
    }  # fmt: skip
    for index in range(model.c.layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        weights[theirs + "input_layernorm.weight"] = own[ours + "attention_norm.weight"]
        weights[theirs + "post_attention_layernorm.weight"] = own[ours + "feed_forward_norm.weight"]
        for our, their in attention.items():
            weights[f"{theirs}self_attn.{their}.weight"] = own[f"{ours}attention.{our}"]
        feed, mlp = ours + "feed_forward.", theirs + "mlp."
        dense, dense_mlp = feed, mlp
        if feed + "router" in own:
            weights[mlp + "gate.weight"] = own[feed + "router"]
            weights[mlp + "gate.e_score_correction_bias"] = own[feed + "bias_E"]
            weights[mlp + "experts.gate_up_proj"] = own[feed + "gate_up"]
            weights[mlp + "experts.down_proj"] = own[feed + "down"]
            dense, dense_mlp = feed + "shared.", mlp + "shared_experts."
        gate, up = own[dense + "gate_up"].chunk(2)
        weights[dense_mlp + "gate_proj.weight"], weights[dense_mlp + "up_proj.weight"] = gate, up
        weights[dense_mlp + "down_proj.weight"] = own[dense + "down"]
    return weights


def randomise(model: TinyModel) -> None:
    """Move everything that starts at a neutral value, so that a forgotten part shows."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    for _, mixture in model.mixtures():
        mixture.bias_E.uniform_(-0.3, 0.3)
    for name, parameter in model.named_parameters():
        if name.endswith(("down", "out")):
            parameter.data *= 10


@torch.no_grad()
def largest_difference(model: TinyModel, tokens_BS: Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    reference = DeepseekV3ForCausalLM(transformers_config(model.c)).eval()
    reference.load_state_dict(transformers_weights(model), strict=True)
    expected = reference(tokens_BS).logits
    return float((model.logits(tokens_BS) - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.checkpoint:
        saved = torch.load(args.checkpoint, weights_only=True)
        model = TinyModel(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    else:
        model = TinyModel(Config())
        randomise(model)
    tokens_BS = torch.randint(model.c.vocab, (2, 300))
    difference = largest_difference(model.eval(), tokens_BS)
    print(f"largest relative difference of logits: {difference:.2e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
