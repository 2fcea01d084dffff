"""Multi-head latent attention: one set of weights, two forms that give the same numbers.

B batch, T tokens of this call, S cached positions, D hidden, H heads, C kv_lora_rank,
N nope and R rope dimensions of a head, V value dimensions of a head.
Source: DeepSeek-V2 (arXiv 2405.04434) 2.1.2-2.1.3 and appendix C; absorption in 2.1.2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab.attention.cache import FORMS, Form, LayerCache
from ktlab.attention.rope import RoPE
from ktlab.attention.stage import Attention, write
from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.kernels.linear import Linear
from ktlab.probe import Probe


@dataclass(frozen=True, kw_only=True)
class MLAWeights:
    """`q_a` and `q_a_norm_Q` are None where queries are not compressed; then `q_b` reads D."""

    q_a: Linear | None
    q_a_norm_Q: Tensor | None
    q_b: Linear
    kv_a: Linear
    kv_a_norm_C: Tensor
    k_b: Linear
    """(H, C, N): from a head's query without position to the latent."""
    v_b: Linear
    """(H, V, C): from the latent to a head's value."""
    output: Linear


class MLA(Attention):
    """Attention of one layer; `form` is live: "absorbed" caches the latent, "naive" full heads.

    naive      k_n = latent k_b,  v = latent v_b          per cached position, then plain attention
    absorbed   q_l = q_n k_b^T,   out = (p latent) v_b    the up-projections move to the query side
    """

    kind: ClassVar[str] = "MLA"
    forms: ClassVar[tuple[Form, ...]] = FORMS
    weights: MLAWeights

    def __init__(
        self, config: ModelConfig, layer: int, weights: MLAWeights, rope: RoPE, sizes: MLASizes
    ) -> None:
        super().__init__(config, layer, weights, rope)
        self.sizes = sizes

    def attend(
        self, hidden_BTD: Tensor, cache: LayerCache, positions_BT: Tensor, probe: Probe
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        sizes, w, eps = self.sizes, self.weights, self.config.rms_eps
        q_BTHd = self._queries(hidden_BTD)
        q_nope, q_rope = q_BTHd.split((sizes.qk_nope_dim, sizes.qk_rope_dim), dim=-1)
        latent_BTC, k_rope_BTR = w.kv_a(hidden_BTD).split(
            (sizes.kv_lora_rank, sizes.qk_rope_dim), dim=-1
        )
        latent_BTC = F.rms_norm(latent_BTC, (sizes.kv_lora_rank,), w.kv_a_norm_C, eps=eps)
        cos, sin = self._rope.tables(positions_BT)
        q_rope = self._rope.rotate(q_rope, cos[:, :, None], sin[:, :, None])
        k_rope_BTR = self._rope.rotate(k_rope_BTR, cos, sin)

        attend = self._absorbed if self.form == "absorbed" else self._naive
        out_BTHV = attend(q_nope, q_rope, latent_BTC, k_rope_BTR, cache, positions_BT)
        self.record(probe, "q", q_BTHd)
        self.record(probe, "latent", latent_BTC)
        return w.output(out_BTHV.flatten(2))

    def _queries(self, hidden_BTD: Tensor) -> Tensor:
        sizes, w = self.sizes, self.weights
        compressed = hidden_BTD
        if w.q_a is not None:
            compressed = w.q_a(hidden_BTD)
            compressed = F.rms_norm(
                compressed, compressed.shape[-1:], w.q_a_norm_Q, eps=self.config.rms_eps
            )
        return w.q_b(compressed).unflatten(-1, (sizes.num_heads, sizes.qk_dim))

    def _absorbed(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHR: Tensor,
        latent_BTC: Tensor,
        k_rope_BTR: Tensor,
        cache: LayerCache,
        positions_BT: Tensor,
    ) -> Tensor:
        rank = self.sizes.kv_lora_rank
        write(cache.keys, torch.cat((latent_BTC, k_rope_BTR), dim=-1), positions_BT)
        seen = int(positions_BT[:, -1].max()) + 1
        keys_BSc = cache.keys[:, :seen]
        # q k^T with k = latent k_b is (q k_b) latent^T: one matrix for all heads' keys.
        q_latent_BHTC = q_nope_BTHN.transpose(1, 2) @ self.weights.k_b.weight_OI.transpose(-1, -2)
        q_BHTc = torch.cat((q_latent_BHTC, q_rope_BTHR.transpose(1, 2)), dim=-1)
        # All heads share the keys, so heads and tokens are rows of one product: the cache is read
        # once, which is where absorption gets its arithmetic intensity.
        heads_tokens = q_BHTc.shape[1:3]
        scores_BHTS = q_BHTc.flatten(1, 2) @ keys_BSc.transpose(-1, -2)
        weights_BHTS = self.softmax(scores_BHTS.unflatten(1, heads_tokens), positions_BT)
        mixed_BHTC = weights_BHTS.flatten(1, 2) @ keys_BSc[..., :rank]
        mixed_BHTC = mixed_BHTC.unflatten(1, heads_tokens)
        return (mixed_BHTC @ self.weights.v_b.weight_OI.transpose(-1, -2)).transpose(1, 2)

    def _naive(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHR: Tensor,
        latent_BTC: Tensor,
        k_rope_BTR: Tensor,
        cache: LayerCache,
        positions_BT: Tensor,
    ) -> Tensor:
        assert cache.values is not None
        heads = self.sizes.num_heads
        k_nope_BHTN = latent_BTC[:, None] @ self.weights.k_b.weight_OI
        k_rope_BHTR = k_rope_BTR[:, None].expand(-1, heads, -1, -1)
        value_BHTV = latent_BTC[:, None] @ self.weights.v_b.weight_OI.transpose(-1, -2)
        write(cache.keys, torch.cat((k_nope_BHTN, k_rope_BHTR), dim=-1), positions_BT)
        write(cache.values, value_BHTV, positions_BT)
        seen = int(positions_BT[:, -1].max()) + 1
        q_BHTd = torch.cat((q_nope_BTHN, q_rope_BTHR), dim=-1).transpose(1, 2)
        scores_BHTS = q_BHTd @ cache.keys[:, :, :seen].transpose(-1, -2)
        weights_BHTS = self.softmax(scores_BHTS, positions_BT)
        return (weights_BHTS @ cache.values[:, :, :seen]).transpose(1, 2)
