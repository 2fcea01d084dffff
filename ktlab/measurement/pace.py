"""How long a pass of a model takes here, and how much a reader's patience therefore allows.

A budget is seconds, not tokens: a small model reads everything that an instrument asks for, a
large one as much as fits, and what is shown says how much that was.
"""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from ktlab.checkpoint.checkpoint import Checkpoint
    from ktlab.model.model import Model

IDLE_FLOPS, IDLE_BYTES_PER_S = 2e10, 2e9
"""What any machine does that is not busy with something else: a small model on a busy one is
waited for, and reads as much as ever, so that its numbers are those of another day."""
ENOUGH_S = 0.5
LEAST_TOKENS = 128
"""Of a text that settings are compared on: with less, an interval says nothing."""
PROBE = 64
"""Tokens of the timed pass. A longer one is quicker a token, so what is judged by this is short."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of a pass of one token, and of one of `tokens`."""

    token_s: float
    pass_s: float
    tokens: int

    def seconds(self, tokens: int) -> float:
        """About what a pass of so many takes: on the line through both, never less than one."""
        slope = max(self.pass_s - self.token_s, 0.0) / max(1, self.tokens - 1)
        return self.token_s + slope * (tokens - 1)

    def read(self, seconds: float, most: int, *, least: int = 1) -> int:
        """Tokens to read in `seconds` by passes of many: `most`, or as many as fit."""
        return _within(seconds * self.tokens / self.pass_s, most, least)

    def write(self, seconds: float, most: int, *, least: int = 1) -> int:
        """The same one token a pass."""
        return _within(seconds / self.token_s, most, least)

    def times(self, seconds: float, once: float, most: int, *, least: int = 1) -> int:
        """How often something that takes `once` may be repeated."""
        return _within(seconds / once, most, least)


def _within(found: float, most: int, least: int) -> int:
    return min(most, max(least, int(min(found, most))))


_paces: "WeakKeyDictionary[Checkpoint, Pace]" = WeakKeyDictionary()
_lock = threading.Lock()


def pace(model: "Model") -> Pace:
    """Timed once for a checkpoint: the best of some passes of `PROBE` tokens, then of one token.

    The first pass brings the weights into memory. Whatever switches are set at that moment are
    timed: a budget needs no more than the order of magnitude.
    """
    with _lock:
        found = _paces.get(model.checkpoint)
        if found is None:
            found = _paces[model.checkpoint] = _timed(model)
        return found


def readable(model: "Model", seconds: float, passes: int, most: int | None) -> int:
    """Tokens of text, `most` of them, that the model reads so many times over in `seconds`."""
    most = sys.maxsize if most is None else most
    return pace(model).read(seconds / passes, most, least=min(LEAST_TOKENS, most))


def _timed(model: "Model") -> Pace:
    tokens = min(PROBE, model.config.context_length)
    ids = [i % model.config.vocab_size for i in range(7, 7 + tokens)]
    return Pace(token_s=_best(model, ids[:1]), pass_s=_best(model, ids), tokens=tokens)


def _best(model: "Model", ids: Sequence[int]) -> float:
    """Seconds of the quickest of a few passes."""
    cost = model.cost(len(ids), len(ids))
    best, start, count = cost.flop / IDLE_FLOPS + cost.bytes / IDLE_BYTES_PER_S, perf_counter(), 0
    while count < 2 or (count < 5 and perf_counter() - start < ENOUGH_S):
        begun = perf_counter()
        model.forward(ids)
        best = min(best, max(perf_counter() - begun, 1e-6))
        count += 1
    return best
