"""Grouped-query attention: several query heads read one head of keys and values.

B batch, T tokens of this call, S cached positions, D hidden, H query heads, G key heads,
d head_dim.
Source: arXiv 2305.13245; norms of queries and keys as in Qwen3 (2505.09388) and OLMoE (2409.02060).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ktlab.attention.cache import Form, LayerCache
from ktlab.attention.rope import RoPE
from ktlab.attention.stage import Attention, write
from ktlab.checkpoint.config import GQASizes, ModelConfig
from ktlab.kernels.linear import Linear
from ktlab.kernels.norm import rms_norm
from ktlab.probe import Probe


@dataclass(frozen=True, kw_only=True)
class GQAWeights:
    """Norms are (d,) where each head is normalised, as long as the projection where all are at
    once, None where nothing is."""

    q: Linear
    k: Linear
    v: Linear
    output: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class GQA(Attention):
    """Attention of one layer; keys and values of the key heads are cached, in one form."""

    kind: ClassVar[str] = "GQA"
    forms: ClassVar[tuple[Form, ...]] = ("grouped",)
    weights: GQAWeights

    def __init__(
        self, config: ModelConfig, layer: int, weights: GQAWeights, rope: RoPE, sizes: GQASizes
    ) -> None:
        super().__init__(config, layer, weights, rope)
        self.sizes = sizes

    def attend(
        self, hidden_BTD: Tensor, cache: LayerCache, positions_BT: Tensor, probe: Probe
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        assert cache.values is not None
        w, sizes = self.weights, self.sizes
        places = self._rope.places(positions_BT, self.seat)
        turns = places.turns_BTr[:, :, None]
        q_BTHd = self._heads(w.q(hidden_BTD), w.q_norm)
        k_BTGd = self._heads(w.k(hidden_BTD), w.k_norm)
        v_BTGd = self._heads(w.v(hidden_BTD), None)
        self.record(probe, "q", q_BTHd)
        self.record(probe, "k", k_BTGd)
        self.record(probe, "v", v_BTGd)
        q_BTHd, k_BTGd = (self._rope.rotate(x, turns) for x in (q_BTHd, k_BTGd))

        write(cache.keys, k_BTGd.transpose(1, 2), places)
        write(cache.values, v_BTGd.transpose(1, 2), places)
        seen = places.seen
        keys_BGSd, values_BGSd = (
            cached[:, :, :seen].to(q_BTHd.dtype) for cached in (cache.keys, cache.values)
        )
        # The queries that share a key head are rows of one product: its cache is read once.
        q_BGHTd = q_BTHd.transpose(1, 2).unflatten(1, (sizes.num_kv_heads, -1))
        shared_tokens = q_BGHTd.shape[2:4]
        scores_BGRS = q_BGHTd.flatten(2, 3) @ keys_BGSd.transpose(-1, -2)
        scores_BHTS = scores_BGRS.unflatten(2, shared_tokens).flatten(1, 2)
        weights_BHTS = self.softmax(scores_BHTS, places.positions_BT)
        mixed_BGRd = weights_BHTS.view(scores_BGRS.shape) @ values_BGSd
        mixed_BHTd = mixed_BGRd.unflatten(2, shared_tokens).flatten(1, 2)
        output_BTD: Tensor = w.output(mixed_BHTd.transpose(1, 2).flatten(2))
        return output_BTD

    def _heads(self, projected: Tensor, norm: Tensor | None) -> Tensor:
        """(B, T, heads * d) to (B, T, heads, d), normalised over what `norm` is as long as."""
        head_dim, eps = self.sizes.head_dim, self.config.rms_eps
        if norm is not None and self.sizes.qk_norm == "projection":
            projected = rms_norm(projected, norm, eps)
        heads = projected.unflatten(-1, (-1, head_dim))
        if norm is not None and self.sizes.qk_norm == "head":
            heads = rms_norm(heads, norm, eps)
        return heads
