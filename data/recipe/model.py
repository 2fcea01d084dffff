"""The tiny language model, in the architecture of DeepSeek-V3, written for training.

Multi-head latent attention, one dense layer, then mixture-of-experts layers with group-limited
sigmoid routing. Balance between experts is kept by a bias that only selection sees, so no
auxiliary loss is needed.

Names end in the letters of their axes: T tokens, B sequences, S positions, D hidden size,
N = B x H attention heads of all sequences, E experts, K experts chosen, G groups, W width of a
feed-forward layer (2W: gate above up), V vocabulary, and R = T x K routed rows. Matrices may be
bfloat16; norms, router, softmax and loss compute in float32 regardless.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

torch._dynamo.config.recompile_limit = 64  # one version a shape; shapes are few
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are the embedded one's."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 7
    dense_layers: int = 1
    dense_width: int = 768
    experts: int = 64
    shared_experts: int = 1
    chosen: int = 8
    groups: int = 8
    chosen_groups: int = 4
    expert_width: int = 96
    routed_scale: float = 2.5
    heads: int = 8
    q_rank: int = 96
    kv_rank: int = 64
    nope: int = 32
    rope: int = 16
    value: int = 32
    theta: float = 10000.0
    eps: float = 1e-6
    context: int = 4096


def fused(function: Function, *, dynamic: bool = False) -> Function:
    """Compile a chain of elementwise steps into one pass over memory, where a compiler is found.

    On a CPU with fast matrix products such passes, not the products, are most of a naive step.
    """
    if os.environ.get("KTLAB_FUSE") == "0" or not (shutil.which("g++") or shutil.which("clang++")):
        return function
    return cast(Function, torch.compile(function, dynamic=dynamic))


@fused
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide_TD = x_TD.float()
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * scale_T1 * weight_D).to(x_TD.dtype)


@fused
def swiglu(gate_up_TX: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2W] -> [T, W]."""
    gate_TW, up_TW = gate_up_TX.float().chunk(2, -1)
    return (F.silu(gate_TW) * up_TW).to(gate_up_TX.dtype)


@fused
def weighted_swiglu(gate_up_PX: Tensor, weight_P: Tensor) -> Tensor:
    """The same times the routing weight: cheaper here than on the wide output of `down`."""
    gate_PW, up_PW = gate_up_PX.float().chunk(2, -1)
    return (F.silu(gate_PW) * up_PW * weight_P[:, None]).to(gate_up_PX.dtype)


@fused
def weighted_swiglu_backward(
    gate_up_PX: Tensor, weight_P: Tensor, grad_PW: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate|up and of the weight, and the activation once more."""
    gate_PW, up_PW = gate_up_PX.float().chunk(2, -1)
    wide_PW = grad_PW.float()
    sigmoid_PW = torch.sigmoid(gate_PW)
    silu_PW = gate_PW * sigmoid_PW
    grad_weight_P = (wide_PW * silu_PW * up_PW).sum(-1)
    wide_PW = wide_PW * weight_P[:, None]
    grad_gate_PW = wide_PW * up_PW * (sigmoid_PW + silu_PW * (1 - sigmoid_PW))
    grad_PX = torch.cat([grad_gate_PW, wide_PW * silu_PW], -1)
    activation_PW = silu_PW * up_PW * weight_P[:, None]
    return grad_PX.to(grad_PW.dtype), grad_weight_P, activation_PW.to(grad_PW.dtype)


# Attention ------------------------------------------------------------------------------------


def causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """What to add to the scores of a block of queries that ends with the last key: [Q, S]."""
    mask = torch.full((queries, keys), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu(keys - queries + 1)


@fused
def softmax_backward(
    chance_NQS: Tensor, grad_NQS: Tensor, grad_out_NQd: Tensor, out_NQd: Tensor, scale: float
) -> Tensor:
    mean_NQ1 = (grad_out_NQd.float() * out_NQd.float()).sum(-1, keepdim=True)
    return (chance_NQS.float() * (grad_NQS.float() - mean_NQ1) * scale).to(grad_NQS.dtype)


class BlockAttention(torch.autograd.Function):
    """Causal attention for CPUs, by blocks of queries, as plain batched products.

    torch's fused attention takes several times longer here, most of it in the backward pass.
    """

    block = 128

    @staticmethod
    def forward(ctx: Any, q_NSd: Tensor, k_NSd: Tensor, v_NSv: Tensor, scale: float) -> Tensor:
        out_NSv = torch.empty_like(v_NSv)
        chances = []
        for start in range(0, q_NSd.shape[1], BlockAttention.block):
            end = min(start + BlockAttention.block, q_NSd.shape[1])
            mask_QS = causal_mask(end - start, end, like=q_NSd)
            scores_NQS = torch.baddbmm(mask_QS, q_NSd[:, start:end], k_NSd[:, :end].mT, alpha=scale)
            chances.append(torch.softmax(scores_NQS, -1))
            out_NSv[:, start:end] = torch.bmm(chances[-1], v_NSv[:, :end])
        ctx.save_for_backward(q_NSd, k_NSd, v_NSv, out_NSv, *chances)
        ctx.scale = scale
        return out_NSv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NSd, k_NSd, v_NSv, out_NSv, *chances = ctx.saved_tensors
        grad_q = torch.empty_like(q_NSd)
        grad_k, grad_v = torch.zeros_like(k_NSd), torch.zeros_like(v_NSv)
        for index, chance_NQS in enumerate(chances):
            start, end = index * BlockAttention.block, chance_NQS.shape[-1]
            grad_NQv = grads[0][:, start:end].contiguous()
            grad_v[:, :end] += torch.bmm(chance_NQS.mT, grad_NQv)
            grad_NQS = torch.bmm(grad_NQv, v_NSv[:, :end].mT)
            grad_NQS = softmax_backward(
                chance_NQS, grad_NQS, grad_NQv, out_NSv[:, start:end], ctx.scale
            )
            grad_q[:, start:end] = torch.bmm(grad_NQS, k_NSd[:, :end])
            grad_k[:, :end] += torch.bmm(grad_NQS.mT, q_NSd[:, start:end])
        return grad_q, grad_k, grad_v, None


@functools.cache
def rope_table(length: int, rope: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding: [2, S, rope / 2]."""
    frequency = theta ** (-torch.arange(0, rope, 2, device=device).float() / rope)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BShr: Tensor, table_2Sr: Tensor) -> Tensor:
    """Turn neighbouring pairs (0, 1), (2, 3) ... as DeepSeek does."""
    even, odd = x_BShr.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_2Sr[:, :, None].unbind(0)
    pair = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return pair.flatten(-2).to(x_BShr.dtype)


@fused
def assemble(
    q_BSHd: Tensor, kv_BSHd: Tensor, k_rope_BS1r: Tensor, table_2Sr: Tensor, nope: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head, contiguous: [N, S, d]."""
    q_rope = rotate(q_BSHd[..., nope:], table_2Sr)
    k_rope = rotate(k_rope_BS1r, table_2Sr).expand_as(q_rope)
    q = torch.cat([q_BSHd[..., :nope], q_rope], -1)
    k = torch.cat([kv_BSHd[..., :nope], k_rope], -1)
    q, k, v = (x.transpose(1, 2).contiguous().flatten(0, 1) for x in (q, k, kv_BSHd[..., nope:]))
    return q, k, v


def matrix(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * gain * columns**-0.5)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return cast(Tensor, rms_norm(x_TD, self.weight, self.eps))


class Attention(nn.Module):
    """Multi-head latent attention: keys and values come from one narrow latent per token."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_a = matrix(c.q_rank, c.hidden)
        self.q_a_norm = RMSNorm(c.q_rank, c.eps)
        self.q_b = matrix(c.heads * (c.nope + c.rope), c.q_rank)
        self.kv_a = matrix(c.kv_rank + c.rope, c.hidden)
        self.kv_a_norm = RMSNorm(c.kv_rank, c.eps)
        self.kv_b = matrix(c.heads * (c.nope + c.value), c.kv_rank)
        self.out = matrix(c.hidden, c.heads * c.value, gain=0.1)

    def forward(self, x_TD: Tensor, length: int) -> Tensor:
        c = self.c
        split = (-1, length, c.heads, c.nope + c.rope)
        q_BSHd = F.linear(self.q_a_norm(F.linear(x_TD, self.q_a)), self.q_b).view(split)
        latent_TL, k_rope_Tr = F.linear(x_TD, self.kv_a).split([c.kv_rank, c.rope], -1)
        kv_BSHd = F.linear(self.kv_a_norm(latent_TL), self.kv_b)
        kv_BSHd = kv_BSHd.view(-1, length, c.heads, c.nope + c.value)
        table_2Sr = rope_table(length, c.rope, c.theta, x_TD.device)
        q, k, v = assemble(
            q_BSHd, kv_BSHd, k_rope_Tr.view(-1, length, 1, c.rope), table_2Sr, c.nope
        )
        if x_TD.is_cuda:
            out_NSv = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out_NSv = BlockAttention.apply(q, k, v, (c.nope + c.rope) ** -0.5)
        out_BSHv = out_NSv.unflatten(0, (-1, c.heads)).transpose(1, 2)
        return F.linear(out_BSHv.reshape(len(x_TD), -1), self.out)


# Feed-forward layers --------------------------------------------------------------------------


class Dense(nn.Module):
    """SwiGLU; `gate_up` holds the gate's rows above the up projection's."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = matrix(2 * width, hidden)
        self.down = matrix(hidden, width, gain=0.1)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x_TD, self.gate_up)), self.down)


class RoutedExperts(torch.autograd.Function):
    """Sum over each token's experts of weight * expert(x): x [T, D], weight and choice [T, K].

    Rows are sorted by expert so that every expert is one product, and brought back by a gather
    of their places that sums over k as it reads, instead of a scattered addition. Each expert's
    rows are filled up to a multiple of `align` with rows of weight zero: on CPUs a product of a
    shape not seen before first costs the compilation of a kernel, many times its own time.
    P is R with room for the filling.
    """

    align = 64

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        gate_up_EXD: Tensor,
        down_EDW: Tensor,
    ) -> Tensor:
        experts, align = len(down_EDW), RoutedExperts.align
        order_R = expert_TK.flatten().to(torch.uint8).argsort(stable=True)
        load_E = expert_TK.flatten().bincount(minlength=experts)
        filled_E = (load_E + align - 1) // align * align
        ends_E = filled_E.cumsum(0)
        gap_E = (ends_E - filled_E) - (load_E.cumsum(0) - load_E)
        row_R = torch.arange(len(order_R), device=order_R.device)
        place_TK = torch.empty_like(expert_TK)
        place_TK.view(-1)[order_R] = row_R + gap_E.repeat_interleave(load_E)
        token_P = torch.zeros(len(order_R) + experts * align, dtype=torch.long, device=x_TD.device)
        token_P[place_TK] = torch.arange(len(x_TD), device=x_TD.device)[:, None]
        weight_P = torch.zeros(len(token_P), device=x_TD.device)
        weight_P[place_TK] = weight_TK
        ends_E = ends_E.to(torch.int32)

        rows_PD = x_TD.index_select(0, token_P)
        gate_up_PX = F.grouped_mm(rows_PD, gate_up_EXD.mT, offs=ends_E)
        activation_PW = weighted_swiglu(gate_up_PX, weight_P)
        out_PD = F.grouped_mm(activation_PW, down_EDW.mT, offs=ends_E)
        ctx.save_for_backward(
            rows_PD, weight_P, gate_up_PX, gate_up_EXD, down_EDW, token_P, place_TK, ends_E
        )
        return F.embedding_bag(place_TK, out_PD, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            rows_PD, weight_P, gate_up_PX, gate_up_EXD, down_EDW, token_P, place_TK, ends_E
        ) = ctx.saved_tensors  # fmt: skip
        grad_PD = grads[0].index_select(0, token_P)
        grad_PW = F.grouped_mm(grad_PD, down_EDW, offs=ends_E)
        grad_PX, grad_weight_P, activation_PW = weighted_swiglu_backward(
            gate_up_PX, weight_P, grad_PW
        )
        grad_down_EDW = F.grouped_mm(grad_PD.mT, activation_PW, offs=ends_E)
        grad_gate_up_EXD = F.grouped_mm(grad_PX.mT, rows_PD, offs=ends_E)
        grad_rows_PD = F.grouped_mm(grad_PX, gate_up_EXD, offs=ends_E)
        grad_x_TD = F.embedding_bag(place_TK, grad_rows_PD, mode="sum")
        return grad_x_TD, grad_weight_P[place_TK], None, grad_gate_up_EXD, grad_down_EDW


class MixtureOfExperts(nn.Module):
    """Group-limited sigmoid routing, routed experts, and one expert that every token shares."""

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        width, hidden = c.expert_width, c.hidden
        self.router = matrix(c.experts, hidden)
        self.gate_up = nn.Parameter(torch.randn(c.experts, 2 * width, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(c.experts, hidden, width) * 0.1 * width**-0.5)
        self.shared = Dense(hidden, c.shared_experts * width)
        self.register_buffer("bias_E", torch.zeros(c.experts))
        self.register_buffer("load_E", torch.zeros(c.experts), persistent=False)

    @torch.no_grad()
    def choose(self, score_TE: Tensor) -> Tensor:
        """Experts of each token: [T, K]. The bias decides who is chosen, never how much."""
        c = self.c
        rank_TGe = (score_TE + self.bias_E).unflatten(1, (c.groups, -1))
        group_TG = rank_TGe.topk(2, sorted=False).values.sum(-1)
        kept = group_TG.topk(c.chosen_groups, sorted=False).indices
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept, False)
        rank_TE = rank_TGe.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)
        return rank_TE.topk(c.chosen, sorted=False).indices

    def forward(self, x_TD: Tensor) -> Tensor:
        score_TE = torch.sigmoid(F.linear(x_TD.float(), self.router))
        expert_TK = self.choose(score_TE)
        if self.training:
            self.load_E += expert_TK.flatten().bincount(minlength=self.c.experts)
        weight_TK = score_TE.gather(1, expert_TK)
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20) * self.c.routed_scale
        routed_TD = RoutedExperts.apply(x_TD, weight_TK, expert_TK, self.gate_up, self.down)
        return cast(Tensor, routed_TD + self.shared(x_TD))


# The whole model ------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.hidden, c.eps)
        self.attention = Attention(c)
        self.feed_forward_norm = RMSNorm(c.hidden, c.eps)
        dense = index < c.dense_layers
        self.feed_forward = Dense(c.hidden, c.dense_width) if dense else MixtureOfExperts(c)

    def forward(self, x_TD: Tensor, length: int) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), length)
        return cast(Tensor, x_TD + self.feed_forward(self.feed_forward_norm(x_TD)))


def cross_entropy(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every token in nats, and its gradient with respect to the logits."""
    chance_TV = torch.softmax(logits_TV, -1, dtype=torch.float32)
    row_T = torch.arange(len(target_T), device=target_T.device)
    loss_T = -chance_TV[row_T, target_T].clamp_min(1e-37).log()
    chance_TV[row_T, target_T] -= 1
    return loss_T, chance_TV.to(logits_TV.dtype)


class HeadLoss(torch.autograd.Function):
    """Output projection and cross entropy by chunks of tokens: no [T, V] array is ever whole."""

    chunk = 512

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
        narrow_VD = head_VD.to(hidden_TD.dtype)
        grad_TD, grad_VD = torch.empty_like(hidden_TD), torch.zeros_like(head_VD)
        losses = []
        for start in range(0, len(target_T), HeadLoss.chunk):
            part = slice(start, start + HeadLoss.chunk)
            loss_T, grad_TV = cross_entropy(hidden_TD[part] @ narrow_VD.T, target_T[part])
            losses.append(loss_T)
            grad_TD[part] = grad_TV @ narrow_VD
            grad_VD += grad_TV.T @ hidden_TD[part]
        ctx.save_for_backward(grad_TD / len(target_T), grad_VD / len(target_T))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Valid for the mean over tokens, the one thing training asks for."""
        return *ctx.saved_tensors, None


class TinyModel(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Parameter(torch.randn(c.vocab, c.hidden) * 0.3)
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.head = matrix(c.vocab, c.hidden)

    def mixtures(self) -> Iterator[tuple[int, MixtureOfExperts]]:
        """The mixture-of-experts layers with their index."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer.feed_forward, MixtureOfExperts):
                yield index, layer.feed_forward

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """Final hidden states, sequences one after another: [T, D]."""
        compute = self.layers[0].attention.out.dtype  # type: ignore[union-attr]
        x_TD = F.embedding(tokens_BS.flatten(), self.embedding).to(compute)  # type: ignore[arg-type]
        for layer in self.layers:
            x_TD = layer(x_TD, tokens_BS.shape[1])
        return cast(Tensor, self.norm(x_TD))

    def logits(self, tokens_BS: Tensor) -> Tensor:
        hidden_TD = self.hidden(tokens_BS)
        return F.linear(hidden_TD, self.head.to(hidden_TD.dtype)).unflatten(0, tokens_BS.shape)

    def losses(self, tokens_BS: Tensor, target_BS: Tensor) -> Tensor:
        """Cross entropy of every token, in nats: [T]."""
        hidden_TD = self.hidden(tokens_BS)
        return cast(Tensor, HeadLoss.apply(hidden_TD, self.head, target_BS.flatten()))
