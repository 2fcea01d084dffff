"""From a checkpoint's tensors to the layers of a model."""

from torch import Tensor

from ktlab.attention.gqa import GQA, GQAWeights
from ktlab.attention.mla import MLA, MLAWeights
from ktlab.attention.rope import RoPE
from ktlab.attention.stage import Attention
from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.config import GQASizes
from ktlab.experts.bank import ExpertBank
from ktlab.experts.mlp import MLP
from ktlab.kernels.linear import Linear
from ktlab.kernels.torch_moe import float_tensor
from ktlab.model.block import DenseBlock, Layer, MoEBlock
from ktlab.routing.router import Router


def build_layers(checkpoint: Checkpoint) -> list[Layer]:
    """Every layer of the checkpoint's configuration, weights still quantized and mapped."""
    rope = RoPE(checkpoint.config)
    return [_build_block(checkpoint, i, rope) for i in range(checkpoint.config.num_layers)]


def vector(checkpoint: Checkpoint, name: str) -> Tensor:
    """A norm, bias or gate: small, so float32 at once."""
    return float_tensor(checkpoint.tensor(name))


def _build_block(checkpoint: Checkpoint, index: int, rope: RoPE) -> Layer:
    config, prefix = checkpoint.config, f"blk.{index}"
    common = (
        config,
        index,
        _build_attention(checkpoint, index, rope),
        vector(checkpoint, f"{prefix}.attn_norm.weight"),
        vector(checkpoint, f"{prefix}.ffn_norm.weight"),
    )
    if index < config.first_dense_layers:
        return DenseBlock(*common, mlp=_build_mlp(checkpoint, index, ""))
    bias = vector(checkpoint, f"{prefix}.exp_probs_b.bias") if config.score_correction else None
    gate = Linear(checkpoint.tensor(f"{prefix}.ffn_gate_inp.weight"))
    bank = (checkpoint.tensor(f"{prefix}.ffn_{m}_exps.weight") for m in ("gate", "up", "down"))
    return MoEBlock(
        *common,
        router=Router(config, index, gate, bias),
        experts=ExpertBank(index, *bank),
        shared=_build_mlp(checkpoint, index, "_shexp") if config.num_shared_experts else None,
    )


def _build_mlp(checkpoint: Checkpoint, index: int, suffix: str) -> MLP:
    return MLP(
        *(
            Linear(checkpoint.tensor(f"blk.{index}.ffn_{matrix}{suffix}.weight"))
            for matrix in ("gate", "up", "down")
        )
    )


def _build_attention(checkpoint: Checkpoint, index: int, rope: RoPE) -> Attention:
    config, sizes, prefix = checkpoint.config, checkpoint.config.attention, f"blk.{index}"

    def linear(name: str) -> Linear:
        return Linear(checkpoint.tensor(f"{prefix}.{name}.weight"))

    def norm(name: str) -> Tensor:
        return vector(checkpoint, f"{prefix}.{name}.weight")

    if isinstance(sizes, GQASizes):
        grouped = GQAWeights(
            q=linear("attn_q"),
            k=linear("attn_k"),
            v=linear("attn_v"),
            output=linear("attn_output"),
            q_norm=None if sizes.qk_norm == "none" else norm("attn_q_norm"),
            k_norm=None if sizes.qk_norm == "none" else norm("attn_k_norm"),
        )
        return GQA(config, index, grouped, rope, sizes)
    compressed = sizes.q_lora_rank > 0
    latent = MLAWeights(
        q_a=linear("attn_q_a") if compressed else None,
        q_a_norm_Q=norm("attn_q_a_norm") if compressed else None,
        q_b=linear("attn_q_b" if compressed else "attn_q"),
        kv_a=linear("attn_kv_a_mqa"),
        kv_a_norm_C=norm("attn_kv_a_norm"),
        k_b=linear("attn_k_b"),
        v_b=linear("attn_v_b"),
        output=linear("attn_output"),
    )
    return MLA(config, index, latent, rope, sizes)
