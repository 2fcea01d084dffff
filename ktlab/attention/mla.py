"""Multi-head latent attention: one set of weights, two forms that give the same numbers.

B batch, T tokens of this call, S cached positions, D hidden, H heads, C kv_lora_rank,
N nope and R rope dimensions of a head, V value dimensions of a head.
Source: DeepSeek-V2 (arXiv 2405.04434) 2.1.2-2.1.3 and appendix C; absorption in 2.1.2.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab import html
from ktlab.attention.cache import FORMS, Form, LayerCache, elements_per_token
from ktlab.attention.rope import RoPE, softmax_scale
from ktlab.checkpoint.config import ModelConfig
from ktlab.errors import SettingError, nearest
from ktlab.kernels.linear import Linear
from ktlab.probe import NO_PROBE, Probe


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

    @property
    def linears(self) -> dict[str, Linear]:
        return {k: v for k, v in vars(self).items() if isinstance(v, Linear)}


class MLA:
    """Attention of one layer; `form` is live: "absorbed" caches the latent, "naive" full heads.

    naive      k_n = latent k_b,  v = latent v_b          per cached position, then plain attention
    absorbed   q_l = q_n k_b^T,   out = (p latent) v_b    the up-projections move to the query side
    """

    def __init__(self, config: ModelConfig, layer: int, weights: MLAWeights, rope: RoPE) -> None:
        self.config = config
        self.sizes = config.mla
        self.layer = layer
        self.weights = weights
        self.form: Form = "absorbed"
        self._rope = rope
        self._scale = softmax_scale(config)

    def forward(
        self,
        hidden_BTD: Tensor,
        cache: LayerCache,
        positions_BT: Tensor,
        probe: Probe = NO_PROBE,
    ) -> Tensor:
        """Attend from (B, T, D) to everything cached and to itself; writes the cache.

        Raises `SettingError` if the cache was made for the other form.
        """
        if cache.form != self.form:
            raise SettingError(
                f"layers.{self.layer}.attention has form {self.form!r}, the cache holds "
                f"{cache.form!r}; make a new cache with new_cache() after changing the form"
            )
        sizes, w, eps = self.sizes, self.weights, self.config.rms_eps
        q_BTHd = self._queries(hidden_BTD)
        q_nope, q_rope = q_BTHd.split((sizes.qk_nope_dim, sizes.qk_rope_dim), dim=-1)
        latent_BTC, k_rope_BTR = w.kv_a(hidden_BTD).split(
            (sizes.kv_lora_rank, sizes.qk_rope_dim), dim=-1
        )
        latent_BTC = F.rms_norm(latent_BTC, (sizes.kv_lora_rank,), w.kv_a_norm_C, eps=eps)
        cos, sin = self._rope.tables(positions_BT)
        q_rope = RoPE.rotate(q_rope, cos[:, :, None], sin[:, :, None])
        k_rope_BTR = RoPE.rotate(k_rope_BTR, cos, sin)

        attend = self._absorbed if self.form == "absorbed" else self._naive
        out_BTHV = attend(q_nope, q_rope, latent_BTC, k_rope_BTR, cache, positions_BT)
        output_BTD = w.output(out_BTHV.flatten(2))
        name = f"layers.{self.layer}.attention"
        probe.record(f"{name}.q", q_BTHd.flatten(0, 1))
        probe.record(f"{name}.latent", latent_BTC.flatten(0, 1))
        probe.record(f"{name}.output", output_BTD.flatten(0, 1))
        return output_BTD

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
        _write(cache.keys, torch.cat((latent_BTC, k_rope_BTR), dim=-1), positions_BT)
        seen = int(positions_BT[:, -1].max()) + 1
        keys_BSc = cache.keys[:, :seen]
        # q k^T with k = latent k_b is (q k_b) latent^T: one matrix for all heads' keys.
        q_latent_BHTC = q_nope_BTHN.transpose(1, 2) @ self.weights.k_b.weight_OI.transpose(-1, -2)
        q_BHTc = torch.cat((q_latent_BHTC, q_rope_BTHR.transpose(1, 2)), dim=-1)
        # All heads share the keys, so heads and tokens are rows of one product: the cache is read
        # once, which is where absorption gets its arithmetic intensity.
        heads_tokens = q_BHTc.shape[1:3]
        scores_BHTS = q_BHTc.flatten(1, 2) @ keys_BSc.transpose(-1, -2)
        weights_BHTS = self._softmax(scores_BHTS.unflatten(1, heads_tokens), positions_BT)
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
        _write(cache.keys, torch.cat((k_nope_BHTN, k_rope_BHTR), dim=-1), positions_BT)
        _write(cache.values, value_BHTV, positions_BT)
        seen = int(positions_BT[:, -1].max()) + 1
        q_BHTd = torch.cat((q_nope_BTHN, q_rope_BTHR), dim=-1).transpose(1, 2)
        scores_BHTS = q_BHTd @ cache.keys[:, :, :seen].transpose(-1, -2)
        weights_BHTS = self._softmax(scores_BHTS, positions_BT)
        return (weights_BHTS @ cache.values[:, :, :seen]).transpose(1, 2)

    def _softmax(self, scores_BHTS: Tensor, positions_BT: Tensor) -> Tensor:
        """Causal: a query sees the positions up to its own, which also hides padding."""
        scores_BHTS = scores_BHTS.mul_(self._scale)
        tokens, seen = scores_BHTS.shape[-2:]
        if tokens > 1 or positions_BT.shape[0] > 1:
            hidden_BTS = torch.arange(seen) > positions_BT[..., None]
            scores_BHTS = scores_BHTS.masked_fill_(hidden_BTS[:, None], -torch.inf)
        return scores_BHTS.softmax(-1)

    def cache_bytes_per_token(self, form: Form | None = None) -> int:
        """Bytes that this layer caches for one token in `form` (its own if None), float32."""
        return 4 * elements_per_token(self.config, form or self.form)

    def quantized(self, format: str) -> "MLA":
        """The same attention with its matrices in another format, with the same form."""
        return self._with({n: m.quantized(format) for n, m in self.linears.items()})

    def clone(self) -> "MLA":
        """The same weights under switches of its own."""
        return self._with({n: m.clone() for n, m in self.linears.items()})

    def _with(self, linears: dict[str, Linear]) -> "MLA":
        attention = copy.copy(self)
        attention.weights = MLAWeights(**{**vars(self.weights), **linears})
        return attention

    @property
    def linears(self) -> dict[str, Linear]:
        """The matrices by name; `k_b` and `v_b` are one a head, and torch multiplies them."""
        return self.weights.linears

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return sum(linear.nbytes for linear in self.weights.linears.values())

    def __repr__(self) -> str:
        return (
            f"MLA(layer {self.layer}: {self.form}, {str(self.sizes).removeprefix('MLA, ')}, "
            f"{html.byte_size(self.nbytes)}, caches {self.cache_bytes_per_token()} bytes a token)"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        matrices = html.table(
            [
                (name, " x ".join(map(str, m.stack.shape)), m.stack.format.name)
                for name, m in self.weights.linears.items()
            ],
            ("matrix", "shape", "format"),
        )
        forms = html.table(
            [
                (f"{form} (live)" if form == self.form else form, self.cache_bytes_per_token(form))
                for form in FORMS
            ],
            ("form", "cache bytes a token"),
        )
        title = f"layers[{self.layer}].attention: MLA, {self.sizes.num_heads} heads"
        return html.mimebundle(repr(self), html.card(title, forms, matrices))


def check_form(form: str) -> Form:
    """`form` if it exists, else a `SettingError` that lists what does."""
    for known in FORMS:
        if form == known:
            return known
    raise SettingError(
        f"attention form {form!r} is unknown; expected one of {', '.join(FORMS)}"
        f"{nearest(form, FORMS)}"
    )


def _write(target: Tensor, values: Tensor, positions_BT: Tensor) -> None:
    """Put (B, [H,] T, d) into (B, [H,] S, d) at each sequence's positions."""
    tokens = positions_BT.shape[1]
    for sequence, start in enumerate(positions_BT[:, 0].tolist()):
        target[sequence].narrow(-2, start, tokens).copy_(values[sequence])
