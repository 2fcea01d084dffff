"""What both kinds of attention share: matrices, a live form, causal softmax, how it is shown.

B batch, T tokens of this call, S cached positions, D hidden, H heads.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ktlab import html
from ktlab.attention.cache import Form, LayerCache, elements_per_token
from ktlab.attention.rope import Places, RoPE, softmax_scale
from ktlab.checkpoint.config import ModelConfig
from ktlab.errors import SettingError, nearest
from ktlab.kernels.linear import Linear
from ktlab.kernels.seat import HOST, Near, Seat
from ktlab.probe import NO_PROBE, Probe

_Attention = TypeVar("_Attention", bound="Attention")


class Attention:
    """Attention of one layer. `form` is live where there is more than one, the first the usual."""

    kind: ClassVar[str]
    forms: ClassVar[tuple[Form, ...]]
    own: str = ""
    """What a class of the user's that stands here is called, with its words and its code's sum."""

    def __init__(self, config: ModelConfig, layer: int, weights: Any, rope: RoPE) -> None:
        self.config = config
        self.layer = layer
        self.weights = weights
        """A frozen dataclass of `Linear` and norms."""
        self.seat: Seat = HOST
        """Where it is computed, and where its cache is."""
        self.near = Near(HOST)
        self._form: Form = self.forms[0]
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

        Raises `SettingError` if the cache was made for another form.
        """
        self.check_cache(cache)
        output_BTD = self.attend(hidden_BTD, cache, positions_BT, probe)
        self.record(probe, "output", output_BTD)
        return output_BTD

    def check_cache(self, cache: LayerCache) -> None:
        """Raise `SettingError` if the cache was made for another form."""
        if cache.form != self.form:
            raise SettingError(
                f"layers.{self.layer}.attention has form {self.form!r}, the cache holds "
                f"{cache.form!r}; make a new cache with new_cache() after changing the form"
            )

    def attend(
        self, hidden_BTD: Tensor, cache: LayerCache, positions_BT: Tensor, probe: Probe
    ) -> Tensor:
        """The computation itself, (B, T, D) to (B, T, D)."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Keep no matrix alive for decoding; the next token finds them again."""

    def flop(self, tokens: int, context: int) -> float:
        """Work of a call of `tokens` tokens that ends at `context` cached positions.

        Every matrix works once a token in every form: k_b and v_b on queries and outputs when
        absorbed, on the new keys and values when naive.
        """
        projections = sum(2 * linear.stack.size for linear in self.linears.values())
        per_pair = self.config.attention.flop_per_pair[self.form]
        return tokens * projections + causal_pairs(tokens, context) * per_pair

    def record(self, probe: Probe, what: str, values_BT: Tensor) -> None:
        """Offer one activation of this layer to the probe."""
        if probe is NO_PROBE:
            return
        probe.record(f"layers.{self.layer}.attention.{what}", values_BT.flatten(0, 1))

    @property
    def form(self) -> Form:
        """How it is computed and cached; `SettingError` on setting what it does not have."""
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        for known in self.forms:
            if form == known:
                self._form = known
                return
        only = "one of " if len(self.forms) > 1 else "nothing but "
        raise SettingError(
            f"layers.{self.layer}.attention: form {form!r} is none of {self.kind}'s; expected "
            f"{only}{', '.join(self.forms)}{nearest(form, self.forms)}"
        )

    def softmax(self, scores_BHTS: Tensor, positions_BT: Tensor) -> Tensor:
        """Causal: a query sees the positions up to its own, which also hides padding."""
        scores_BHTS = scores_BHTS.mul_(self._scale)
        tokens, seen = scores_BHTS.shape[-2:]
        if tokens > 1 or positions_BT.shape[0] > 1:
            scores_BHTS = scores_BHTS.masked_fill_(~visible(positions_BT, seen), -torch.inf)
        return scores_BHTS.softmax(-1)

    def cache_bytes_per_token(self, form: Form | None = None) -> int:
        """Bytes that this layer caches for one token in `form` (its own if None), float32."""
        return 4 * elements_per_token(self.config, form or self.form)

    def quantized(self: _Attention, format: str) -> _Attention:
        """The same attention with its matrices in another format, with the same form."""
        return self._with({n: m.quantized(format) for n, m in self.linears.items()})

    def clone(self: _Attention) -> _Attention:
        """The same weights under switches of its own."""
        return self._with({n: m.clone() for n, m in self.linears.items()})

    def on(
        self: _Attention,
        seat: Seat,
        move: Callable[[Linear], Linear],
        hold: Callable[[Tensor], Tensor],
    ) -> _Attention:
        """The same attention somewhere else: `move` says what becomes of a matrix, `hold` of a
        norm."""
        moved = self._with({name: move(linear) for name, linear in self.linears.items()})
        norms = {k: hold(v) for k, v in vars(self.weights).items() if isinstance(v, Tensor)}
        moved.weights = replace(moved.weights, **norms)
        moved.seat, moved.near = seat, Near(seat)
        moved.let_go()
        return moved

    def _with(self: _Attention, linears: dict[str, Linear]) -> _Attention:
        attention = copy.copy(self)
        attention.weights = replace(self.weights, **linears)
        return attention

    @property
    def linears(self) -> dict[str, Linear]:
        """The matrices by name, those with one a head among them."""
        return {k: v for k, v in vars(self.weights).items() if isinstance(v, Linear)}

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return sum(linear.nbytes for linear in self.linears.values())

    def __repr__(self) -> str:
        sizes = str(self.config.attention).removeprefix(f"{self.kind}, ")
        return html.wrapped(
            f"{type(self).__name__}(layer {self.layer}: {self.form}, {sizes}, "
            f"{html.byte_size(self.nbytes)}, caches {self.cache_bytes_per_token()} bytes a token)"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        matrices = html.table(
            [
                (name, " x ".join(map(str, m.stack.shape)), m.stack.format.name)
                for name, m in self.linears.items()
            ],
            ("matrix", "shape", "format"),
        )
        forms = html.table(
            [
                (f"{form} (live)" if form == self.form else form, self.cache_bytes_per_token(form))
                for form in self.forms
            ],
            ("form", "cache bytes a token"),
        )
        title = f"layers[{self.layer}].attention: {self.config.attention}"
        return html.mimebundle(repr(self), html.card(title, forms, matrices))


def causal_pairs(tokens: int, context: int) -> float:
    """(query, position) pairs of a call of `tokens` tokens that ends at `context`."""
    return tokens * context - tokens * (tokens - 1) / 2


def write(target: Tensor, values: Tensor, places: Places) -> None:
    """Put (B, [H,] T, d) into (B, [H,] S, d) at each sequence's positions."""
    tokens = values.shape[-2]
    for sequence, start in enumerate(places.starts):
        target[sequence].narrow(-2, start, tokens).copy_(values[sequence])


def visible(positions_BT: Tensor, seen: int) -> Tensor:
    """(B, 1, T, S) bool: the cached positions up to a query's own."""
    return (torch.arange(seen, device=positions_BT.device) <= positions_BT[..., None])[:, None]
