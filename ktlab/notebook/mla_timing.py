"""Both forms of MLA inside the running model: do they agree, what do they cost, how fast are they.

T tokens of a call, S cached positions.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktlab.attention.cache import FORMS, Form
from ktlab.errors import ContextError
from ktlab.interval import Interval
from ktlab.measurement import intervals
from ktlab.measurement.blocks import Blocks
from ktlab.measurement.tokens import divergence
from ktlab.measurement.windows import piece_count
from ktlab.memory import trim
from ktlab.model.components import every_product
from ktlab.model.copies import passing, room
from ktlab.probe import Recorder

if TYPE_CHECKING:
    from ktlab.measurement.roofline import Bound, Ceilings
    from ktlab.model.model import Model

REPEATS = 5
CACHE_BYTES, CACHE_SHARE = 10**9, 16
"""What the caches of a context may take, or this part of the room, if that is more."""
EXACT = ("torch", "numpy")
"""Backends that multiply in float32."""
EXACT_WEIGHTS = 1e8
"""Of a model whose float32 copies may lie in memory for a moment."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike the logits of two forms are on one text."""

    tokens: int
    max_difference: float
    """Largest difference of a logit."""
    relative: float
    """The same over the largest logit."""
    same_top1: Interval
    """Share of places where both put the same token first, per cent."""
    kl: Interval
    """Mean KL(naive || absorbed), nats a token."""
    rounded: bool
    """Whether kernels round activations somewhere in this model: then a difference in the last bit
    grows, and unequal logits say nothing against the forms."""

    @property
    def equal(self) -> bool:
        """Equal up to float32 rounding: within 1e-4 relative."""
        return self.relative < 1e-4


def agreement(model: "Model", ids: Sequence[int]) -> Agreement:
    """Naive against absorbed over `ids`."""
    twins = _twins(model)
    # Piece by piece: all logits of a large vocabulary, of both forms, are 0.2 GB.
    count = piece_count(len(ids), model.config.vocab_size)
    logits = zip(*(twins[form].logits_in_pieces(ids, count) for form in FORMS), strict=True)
    most = difference = 0.0
    same, kl = [], []
    for a, b in logits:
        most = max(most, float(a.abs().max()))
        difference = max(difference, float((a - b).abs().max()))
        same.append(a.argmax(-1) == b.argmax(-1))
        kl.append(divergence(a.log_softmax(-1), b.log_softmax(-1)))
    trim()
    kl_T, same_T = torch.cat(kl).numpy(), torch.cat(same).numpy()
    blocks = Blocks.cut([len(kl_T)])
    return Agreement(
        tokens=len(kl_T),
        max_difference=difference,
        relative=difference / most,
        same_top1=intervals.share(same_T, blocks),
        kl=intervals.mean(kl_T, blocks, scale="log", unit="nats"),
        rounded=any(p.kernel.backend not in EXACT for p in every_product(model)),
    )


def exact_agreement(model: "Model", ids: Sequence[int]) -> Agreement | None:
    """The same where every product is exact in float32; None where the floats would be large."""
    weights = sum(stack.size for product in every_product(model) for stack in product.stacks)
    if weights > EXACT_WEIGHTS:
        return None
    with passing(model), model.override(backend="torch"):
        return agreement(model, ids)


def _twins(model: "Model") -> "dict[Form, Model]":
    """The same weights in each form."""
    twins = {form: model.clone() for form in FORMS}
    for form, twin in twins.items():
        twin.set(attention=form)
    return twins


@dataclass(frozen=True, kw_only=True)
class AttentionTime:
    """Attention of all layers in one call of `tokens` tokens that ends at `context`."""

    form: Form
    tokens: int
    context: int
    seconds: tuple[float, ...]
    """Each repeat, forms in alternation."""
    flop: float
    bytes: float
    """Weights and cache that the call must read or write (`model.cost`)."""
    bound: "Bound | None" = None

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float]:
        """Lower and upper quartile of the repeats."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


def times_faster(point: Mapping[Form, AttentionTime]) -> Interval:
    """How many times as long the naive form takes as the absorbed one, repeat by repeat."""
    pairs = zip(point["naive"].seconds, point["absorbed"].seconds, strict=True)
    return intervals.median([n / a for n, a in pairs], no_change=1.0)


def work(model: "Model", form: Form, tokens: int, context: int) -> tuple[float, float]:
    """FLOP and bytes of attention over all layers in one call."""
    twin = model.clone()
    with twin.override(attention=form):
        row = twin.cost(tokens=tokens, context=context).by_stage()["attention"]
    return row.flop, row.bytes


def cache_bytes(model: "Model", form: Form, context: int) -> int:
    """Bytes cached for `context` tokens over all layers, float32."""
    return context * sum(b.attention.cache_bytes_per_token(form) for b in model.layers)


def default_contexts(longest: int) -> list[int]:
    """Contexts to measure at: powers of two up to `longest`."""
    return [n for n in (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if n <= longest]


def in_memory(model: "Model", contexts: Sequence[int]) -> list[int]:
    """Those of `contexts` whose caches, one of each form, fit the room beside the model; the first
    in any case."""
    most = max(CACHE_BYTES, (room(model) or 0) // CACHE_SHARE)
    token = sum(block.attention.cache_bytes_per_token(f) for block in model.layers for f in FORMS)
    return [context for i, context in enumerate(contexts) if not i or context * token <= most]


def affordable(
    once_s: float, contexts: Sequence[int], seconds: float, repeats: int = REPEATS
) -> tuple[list[int], int]:
    """(contexts, repeats) that `measure` is done with in about `seconds`, if a pass takes `once_s`.

    First fewer repeats, down to 2; then contexts are left out between the first and the last.
    """
    passes = seconds / max(once_s, 1e-9) / len(FORMS)
    fit = int(min(repeats, max(2, passes / max(1, len(contexts)) - 1)))
    count = int(min(len(contexts), max(2, passes / (fit + 1))))
    if count >= len(contexts):
        return list(contexts), fit
    places = np.linspace(0, len(contexts) - 1, count).round().astype(int)
    return [contexts[i] for i in places], fit


def measure(
    model: "Model",
    *,
    tokens: int,
    contexts: Sequence[int],
    repeats: int = REPEATS,
    ceilings: "Ceilings | None" = None,
    cancel: threading.Event | None = None,
) -> Iterator[dict[Form, AttentionTime]]:
    """Time both forms at each context, alternating; one dictionary a context.

    The cache is filled with a constant instead of a text's latents: the time does not depend on
    the values. Attention is timed inside whole forward passes, so caches are as cold as in use.
    """
    twins = _twins(model)
    ids = np.full(tokens, 5 % model.config.vocab_size)
    caches: dict[Form, Any] = {}
    for context in contexts:
        if context < tokens:
            raise ContextError(f"a call of {tokens} tokens does not end at context {context}")
        caches.clear()  # those of a long context take gigabytes: never two of them
        trim()
        caches |= {form: _filled(twin, context) for form, twin in twins.items()}
        seconds: dict[Form, list[float]] = {form: [] for form in FORMS}
        for repeat in range(repeats + 1):
            for form, twin in twins.items():
                if cancel is not None and cancel.is_set():
                    return
                caches[form].lengths_B.fill_(context - tokens)
                recorder = Recorder()
                twin.forward(ids, caches[form], probe=recorder, chunk=max(512, tokens))
                took = sum(s for n, s in recorder.seconds.items() if n.endswith(".attention"))
                if repeat:  # the first one warms up
                    seconds[form].append(took)
        yield {
            form: _point(model, form, tokens, context, tuple(seconds[form]), ceilings)
            for form in FORMS
        }


def _filled(model: "Model", context: int) -> Any:
    # Not zeros: untouched pages of zeros all lie in the same few bytes of memory.
    cache = model.new_cache(context=context)
    for layer in cache.layers:
        layer.keys.fill_(0.1)
        if layer.values is not None:
            layer.values.fill_(0.1)
    return cache


def _point(
    model: "Model",
    form: Form,
    tokens: int,
    context: int,
    seconds: tuple[float, ...],
    ceilings: "Ceilings | None",
) -> AttentionTime:
    flop, nbytes = work(model, form, tokens, context)
    bound = None
    if ceilings is not None:
        bound = ceilings.bound(
            flop=flop, nbytes=nbytes, working_bytes=nbytes, seconds=median(seconds)
        )
    return AttentionTime(
        form=form,
        tokens=tokens,
        context=context,
        seconds=seconds,
        flop=flop,
        bytes=nbytes,
        bound=bound,
    )
