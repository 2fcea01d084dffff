"""Multi-head latent attention: one set of weights, two forms that give the same numbers.

B batch, T tokens of this call, S cached positions, D hidden, H heads, C kv_lora_rank,
N nope and R rope dimensions of a head, V value dimensions of a head.
Source: DeepSeek-V2 (arXiv 2405.04434) 2.1.2-2.1.3 and appendix C; absorption in 2.1.2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab.attention.cache import FORMS, Form, LayerCache
from ktlab.attention.rope import Places, RoPE
from ktlab.attention.stage import Attention, causal_pairs, visible, write
from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.kernels import native, products
from ktlab.kernels.linear import Linear
from ktlab.kernels.norm import rms_norm
from ktlab.kernels.request import PACKED, Kernel
from ktlab.probe import Probe

DECOMPRESSED_BYTES = 16 << 20
"""Keys and values of so many heads are made at once where a prompt is computed the naive way."""


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
        self._token: WholeToken | None = None

    def attend(
        self, hidden_BTD: Tensor, cache: LayerCache, positions_BT: Tensor, probe: Probe
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if hidden_BTD.shape[:2] == (1, 1):
            token = self.whole_token()
            if token is not None:
                return self._in_one_call(token, hidden_BTD, cache, positions_BT, probe)
        places = self._rope.places(positions_BT, self.seat)
        sizes, w = self.sizes, self.weights
        rank = sizes.kv_lora_rank
        q_BTHd, kv_BTc = self._queries(hidden_BTD), w.kv_a(hidden_BTD)
        new = _New(
            q_nope_BTHN=q_BTHd[..., : sizes.qk_nope_dim],
            q_rope_BTHR=self._rope.rotate(
                q_BTHd[..., sizes.qk_nope_dim :], places.turns_BTr[:, :, None]
            ),
            latent_BTC=rms_norm(kv_BTc[..., :rank], w.kv_a_norm_C, self.config.rms_eps),
            k_rope_BTR=self._rope.rotate(kv_BTc[..., rank:], places.turns_BTr),
            places=places,
        )
        if self.form == "naive":
            out_BTHV = self._naive(new, cache)
        else:
            write(cache.keys[..., :rank], new.latent_BTC, places)
            write(cache.keys[..., rank:], new.k_rope_BTR, places)
            many = self._decompression_pays(hidden_BTD.shape[1])
            latent = self._decompressed if many else self._absorbed
            out_BTHV = latent(new, cache.keys[:, : places.seen].to(hidden_BTD.dtype))
        self.record(probe, "q", q_BTHd)
        self.record(probe, "latent", new.latent_BTC)
        return w.output(out_BTHV.flatten(2))

    def let_go(self) -> None:
        """See `Attention.let_go`."""
        self._token = None

    def whole_token(self) -> "WholeToken | None":
        """What one native call needs for a decoded token, if form and kernels allow it."""
        if self.form != "absorbed" or not self.seat.host:
            return None
        found = self._token
        if found is None or found.weights is not self.weights or not found.holds():
            found = self._token = WholeToken(self.weights, self._rope, self._scale, self.config)
        return found if found.operand is not None else None

    def _in_one_call(
        self,
        token: "WholeToken",
        hidden_11D: Tensor,
        cache: LayerCache,
        positions_11: Tensor,
        probe: Probe,
    ) -> Tensor:
        """Each operation of `attend` in its turn, without Python between them."""
        keys_SC, turns = token.place(cache, positions_11)
        x_D = hidden_11D.reshape(-1)
        output_D, q = native.mla_token(token.kernel, token.operand, turns, x_D, keys_SC)
        self.record(probe, "q", q.view(1, 1, self.sizes.num_heads, -1))
        self.record(probe, "latent", keys_SC[None, -1:, : self.sizes.kv_lora_rank])
        return output_D.view(1, 1, -1)

    def _queries(self, hidden_BTD: Tensor) -> Tensor:
        sizes, w = self.sizes, self.weights
        compressed = hidden_BTD
        if w.q_a is not None:
            compressed = w.q_a(hidden_BTD)
            assert w.q_a_norm_Q is not None
            compressed = rms_norm(compressed, w.q_a_norm_Q, self.config.rms_eps)
        return w.q_b(compressed).unflatten(-1, (sizes.num_heads, sizes.qk_dim))

    def _absorbed(self, new: "_New", keys_BSc: Tensor) -> Tensor:
        # q k^T with k = latent k_b is (q k_b) latent^T: one matrix for all heads' keys.
        q_latent_THC = self.weights.k_b.by_head(new.q_nope_BTHN.flatten(0, 1))
        q_latent_BTHC = q_latent_THC.view(*new.q_nope_BTHN.shape[:3], -1)
        q_BTHc = torch.cat((q_latent_BTHC, new.q_rope_BTHR), dim=-1)
        if q_BTHc.shape[1] == 1:
            mixed_BTHC = self._attended(q_BTHc, keys_BSc, new.places)
        else:
            mixed_BTHC = self._mixed(q_BTHc.transpose(1, 2), keys_BSc, new.places.positions_BT)
        out_THV = self.weights.v_b.by_head(mixed_BTHC.flatten(0, 1))
        return out_THV.view(*mixed_BTHC.shape[:3], -1)

    def _attended(self, q_B1Hc: Tensor, keys_BSc: Tensor, places: Places) -> Tensor:
        """One token of each sequence, against the positions up to its own."""
        kernel, rank = self.weights.k_b.kernel, self.sizes.kv_lora_rank
        mixed_BHC = [
            products.attend(kernel, q_1Hc[0], keys_Sc[: start + 1], rank, self._scale)
            for q_1Hc, keys_Sc, start in zip(q_B1Hc, keys_BSc, places.starts, strict=True)
        ]
        return torch.stack(mixed_BHC)[:, None]

    def _mixed(self, q_BHTc: Tensor, keys_BSc: Tensor, positions_BT: Tensor) -> Tensor:
        # All heads share the keys, so heads and tokens are rows of one product: the cache is read
        # once, which is where absorption gets its arithmetic intensity.
        heads_tokens = q_BHTc.shape[1:3]
        scores_BrS = q_BHTc.flatten(1, 2) @ keys_BSc.transpose(-1, -2)
        scores_BHTS = scores_BrS.unflatten(1, heads_tokens)
        weights_BHTS = self.softmax(scores_BHTS, positions_BT)
        mixed_BHTC = weights_BHTS.flatten(1, 2) @ keys_BSc[..., : self.sizes.kv_lora_rank]
        return mixed_BHTC.unflatten(1, heads_tokens).transpose(1, 2)

    def _decompression_pays(self, tokens: int) -> bool:
        """Whether so many queries share the work of making keys and values from the latent anew."""
        most = self.sizes.most_absorbed
        return most is not None and tokens > most

    def flop(self, tokens: int, context: int) -> float:
        """As it is computed: a long prompt in the absorbed form makes keys and values anew."""
        if self.form == "naive" or not self._decompression_pays(tokens):
            return super().flop(tokens, context)
        projections = sum(2 * linear.stack.size for linear in self.linears.values())
        others = tokens * (projections - self.sizes.flop_decompressing)
        pairs = causal_pairs(tokens, context) * self.sizes.flop_per_pair["naive"]
        return others + context * self.sizes.flop_decompressing + pairs

    def _decompressed(self, new: "_New", keys_BSc: Tensor) -> Tensor:
        """The naive form's products over the absorbed form's cache, a few heads at a time."""
        sizes, k_b, v_b = self.sizes, self.weights.k_b, self.weights.v_b
        out_BTHV = new.q_nope_BTHN.new_empty((*new.q_nope_BTHN.shape[:3], sizes.v_dim))
        kernel = products.many_kernel(k_b, v_b)
        if kernel is not None:
            for b, start in enumerate(new.places.starts):
                products.attend_many(
                    kernel,
                    (new.q_nope_BTHN[b], new.q_rope_BTHR[b]),
                    keys_BSc[b, : start + out_BTHV.shape[1]],
                    (k_b.stack, v_b.stack),
                    self._scale,
                    out_BTHV[b],
                )
            return out_BTHV
        k_b_HCN, v_b_HVC = k_b.weight_OI, v_b.weight_OI
        keys_B1Sc = keys_BSc[:, None]
        latent_B1SC, k_rope_B1SR = keys_B1Sc.split((sizes.kv_lora_rank, sizes.qk_rope_dim), dim=-1)
        batch, seen, _ = keys_BSc.shape
        causal = batch == 1 and new.places.starts == (0,)
        mask = None if causal else visible(new.places.positions_BT, seen)
        # torch's fused attention wants values as long as keys: zeros are added and cut off again.
        head_bytes = v_b_HVC.itemsize * batch * seen * 2 * sizes.qk_dim
        groups = -(-sizes.num_heads * head_bytes // DECOMPRESSED_BYTES)
        group = -(-sizes.num_heads // min(groups, sizes.num_heads))
        tokens, nope = new.q_nope_BTHN.shape[1], sizes.qk_nope_dim
        # Made once and filled by each group in turn: memory that is in the cache already.
        q_BHTd = v_b_HVC.new_empty((batch, group, tokens, sizes.qk_dim))
        key_BHSd = v_b_HVC.new_empty((batch, group, seen, sizes.qk_dim))
        key_BHSd[..., nope:] = k_rope_B1SR
        value_BHSd = v_b_HVC.new_zeros((batch, group, seen, sizes.qk_dim))
        for first in range(0, sizes.num_heads, group):
            heads = slice(first, min(first + group, sizes.num_heads))
            made = slice(0, heads.stop - first)
            q_BHTd[:, made, :, :nope] = new.q_nope_BTHN[:, :, heads].transpose(1, 2)
            q_BHTd[:, made, :, nope:] = new.q_rope_BTHR[:, :, heads].transpose(1, 2)
            key_BHSd[:, made, :, :nope] = latent_B1SC @ k_b_HCN[heads]
            value_BHSd[:, made, :, : sizes.v_dim] = latent_B1SC @ v_b_HVC[heads].transpose(-1, -2)
            mixed_BHTd = F.scaled_dot_product_attention(
                q_BHTd[:, made],
                key_BHSd[:, made],
                value_BHSd[:, made],
                attn_mask=mask,
                is_causal=causal,
                scale=self._scale,
            )
            out_BTHV[:, :, heads] = mixed_BHTd[..., : sizes.v_dim].transpose(1, 2)
        return out_BTHV

    def _naive(self, new: "_New", cache: LayerCache) -> Tensor:
        assert cache.values is not None
        heads, seen = self.sizes.num_heads, new.places.seen
        k_nope_BHTN = new.latent_BTC[:, None] @ self.weights.k_b.weight_OI
        k_rope_BHTR = new.k_rope_BTR[:, None].expand(-1, heads, -1, -1)
        value_BHTV = new.latent_BTC[:, None] @ self.weights.v_b.weight_OI.transpose(-1, -2)
        write(cache.keys, torch.cat((k_nope_BHTN, k_rope_BHTR), dim=-1), new.places)
        write(cache.values, value_BHTV, new.places)
        q_BHTd = torch.cat((new.q_nope_BTHN, new.q_rope_BTHR), dim=-1).transpose(1, 2)
        scores_BHTS = q_BHTd @ cache.keys[:, :, :seen].to(q_BHTd.dtype).transpose(-1, -2)
        weights_BHTS = self.softmax(scores_BHTS, new.places.positions_BT)
        values_BHSV = cache.values[:, :, :seen].to(q_BHTd.dtype)
        return (weights_BHTS @ values_BHSV).transpose(1, 2)


class WholeToken:
    """The kernels of a layer's attention, and its matrices where one native call can use them."""

    def __init__(self, weights: MLAWeights, rope: RoPE, scale: float, config: ModelConfig) -> None:
        self.weights, self._rope = weights, rope
        w = weights
        self._linears = [m for m in (w.q_a, w.q_b, w.kv_a, w.k_b, w.v_b, w.output) if m is not None]
        self.kernels = [linear.kernel for linear in self._linears]
        self.operand: Any = None
        """The C core's `MLA`; None where the kernels differ."""
        one_isa = len({kernel.isa for kernel in self.kernels}) == 1
        if one_isa and native.together(self.kernels) and all(k.few >= 1 for k in self.kernels):
            matrix = products.native_matrix
            self.operand = native.core().MLA(
                q_a=w.q_a and matrix(w.q_a.kernel, w.q_a.stack),
                q_a_norm=None if w.q_a_norm_Q is None else w.q_a_norm_Q.numpy(),
                q_b=matrix(w.q_b.kernel, w.q_b.stack),
                kv_a=matrix(w.kv_a.kernel, w.kv_a.stack),
                kv_a_norm=w.kv_a_norm_C.numpy(),
                k_b=matrix(w.k_b.kernel, w.k_b.stack, PACKED),
                v_b=matrix(w.v_b.kernel, w.v_b.stack, PACKED),
                output=matrix(w.output.kernel, w.output.stack),
                halves=rope.halves,
                eps=config.rms_eps,
                scale=scale,
            )

    @property
    def kernel(self) -> Kernel:
        """What computes all of it."""
        return self.kernels[0]

    def holds(self) -> bool:
        """Whether the matrices still have the kernels that this was made for."""
        return all(a.kernel is b for a, b in zip(self._linears, self.kernels, strict=True))

    def place(self, cache: LayerCache, positions_11: Tensor) -> tuple[Tensor, Tensor]:
        """(S, C + R) of the cache with the token's own row last, and by how much it is turned."""
        places = self._rope.places(positions_11)
        return cache.keys[0, : places.seen], places.turns_BTr[0, 0]


@dataclass(frozen=True, kw_only=True)
class _New:
    """What one call brings: queries, and what is to be cached of its tokens."""

    q_nope_BTHN: Tensor
    q_rope_BTHR: Tensor
    latent_BTC: Tensor
    k_rope_BTR: Tensor
    places: Places
