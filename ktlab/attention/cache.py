"""What attention remembers: the latent (absorbed form), decompressed keys and values (naive), or
the shared keys and values of grouped queries (grouped).

B batch, S positions, C kv_lora_rank, R rope, N nope, H heads, V value dimensions, G key heads.
Source: DeepSeek-V2 (arXiv 2405.04434) 2.1 and table 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ktlab import html
from ktlab.checkpoint.config import MLASizes, ModelConfig
from ktlab.errors import ContextError
from ktlab.kernels.seat import HOST, Seat

Form = Literal["absorbed", "naive", "grouped"]
FORMS: tuple[Form, ...] = ("absorbed", "naive")
"""The forms of latent attention; grouped-query attention has "grouped" alone."""
USUAL_FORMS = ("absorbed", "grouped")
"""How each kind of attention is computed unless somebody asks for another form."""


def elements_per_token(config: ModelConfig, form: Form) -> int:
    """Cached numbers per token and layer: C + R absorbed, H (N + R + V) naive, 2 G d grouped."""
    return config.attention.cache_elements[form]


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's memory. Absorbed: `keys` is (B, S, C+R), the values are its first C columns.
    Naive: `keys` (B, H, S, N+R) and `values` (B, H, S, V). Grouped: both are (B, G, S, d)."""

    form: Form
    keys: Tensor
    values: Tensor | None = None
    seat: Seat = HOST

    def on(self, seat: Seat) -> "LayerCache":
        """The same memory on another device; itself where it is there already."""
        if seat is self.seat:
            return self
        keys = _moved(self.keys, self.seat, seat)
        values = None if self.values is None else _moved(self.values, self.seat, seat)
        return LayerCache(form=self.form, keys=keys, values=values, seat=seat)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + (0 if self.values is None else self.values.nbytes)


class Cache:
    """The caches of every layer, and how many positions of each sequence are filled."""

    def __init__(
        self,
        config: ModelConfig,
        forms: list[Form],
        batch: int,
        context: int,
        seats: Sequence[Seat] = (),
    ) -> None:
        if batch < 1 or context < 1:
            raise ContextError(f"batch {batch}, context {context}: expected at least 1 of each")
        if context > config.context_length:
            raise ContextError(
                f"a context of {context} tokens: {config.name} has {config.context_length}; ask "
                "for a shorter one or cut the text"
            )
        seats = seats or [HOST] * len(forms)
        short = []
        for seat in dict.fromkeys(seats):
            here = [form for form, at in zip(forms, seats, strict=True) if at is seat]
            elements = batch * context * sum(elements_per_token(config, form) for form in here)
            needed, available = elements * seat.dtype.itemsize, seat.free_bytes
            if available is not None and needed > available:
                where = "memory" if seat is HOST else seat.word
                sizes = html.byte_size(needed), html.byte_size(available)
                short.append(f"{sizes[0]}, {sizes[1]} of {where} are available")
        if short:
            raise ContextError(
                f"a cache of {batch} x {context} tokens needs {'; and '.join(short)}; ask for a "
                "shorter context"
                + (
                    ", a smaller batch, or the absorbed form"
                    if "naive" in forms
                    else " or a smaller batch"
                )
            )
        self.batch, self.context = batch, context
        self.layers = [
            _allocate(config, form, batch, context, seat)
            for form, seat in zip(forms, seats, strict=True)
        ]
        self.lengths_B = torch.zeros(batch, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the whole context, float32 on the host."""
        return sum(layer.nbytes for layer in self.layers)

    def positions(self, tokens: int) -> Tensor:
        """(B, T) positions of the next `tokens` tokens; `ContextError` if they do not fit."""
        longest = int(self.lengths_B.max()) + tokens
        if longest > self.context:
            raise ContextError(
                f"{longest} tokens do not fit the cache of {self.context}; make a longer one with "
                "new_cache(context=...) or cut the text"
            )
        return self.lengths_B[:, None] + torch.arange(tokens)

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` positions; they are written anew."""
        self.lengths_B.clamp_(max=length)

    def __repr__(self) -> str:
        forms = "+".join(dict.fromkeys(layer.form for layer in self.layers))
        filled = "/".join(map(str, self.lengths_B.tolist()))
        return (
            f"Cache({forms}: {filled} of {self.context} positions, batch {self.batch}, "
            f"{html.byte_size(self.nbytes)})"
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(repr(self), html.card(repr(self)))


def _moved(values: Tensor, here: Seat, there: Seat) -> Tensor:
    made = there.zeros(*values.shape)
    made.copy_(there.take(here.give(values)()[0]))
    return made


def _allocate(config: ModelConfig, form: Form, batch: int, context: int, seat: Seat) -> LayerCache:
    # Zeros, not empty: positions beyond a shorter sequence are multiplied by a weight of zero.
    sizes = config.attention
    if form == "absorbed":
        width = elements_per_token(config, form)
        return LayerCache(form=form, keys=seat.zeros(batch, context, width), seat=seat)
    if isinstance(sizes, MLASizes):
        heads, v_dim = sizes.num_heads, sizes.v_dim
    else:
        heads, v_dim = sizes.num_kv_heads, sizes.head_dim
    return LayerCache(
        form=form,
        keys=seat.zeros(batch, heads, context, sizes.qk_dim),
        values=seat.zeros(batch, heads, context, v_dim),
        seat=seat,
    )
