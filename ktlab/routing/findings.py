"""What routing statistics return as numbers: each with its interval and its chance level.

Loads are shares of routed slots (one token fills K slots) and sum to 1; divergences and entropies
are in bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ktlab import html
from ktlab.interval import Interval


class Shown:
    """Text and HTML from `str(self)` and `_rows()`."""

    def _title(self) -> str:
        raise NotImplementedError

    def _rows(self) -> Mapping[str, object]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "\n  ".join([self._title(), *(f"{k}: {v}" for k, v in self._rows().items())])

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(repr(self), html.card(self._title(), html.pairs(self._rows())))


@dataclass(frozen=True, kw_only=True, repr=False)
class Rate(Shown):
    """A rate with what it has to be compared with: `chance`, and further `references`."""

    what: str
    layer: int
    interval: Interval
    chance: float
    chance_is: str
    references: Mapping[str, float] = field(default_factory=dict)
    method: str = ""

    @property
    def value(self) -> float:
        return self.interval.value

    def __float__(self) -> float:
        return self.interval.value

    @property
    def verdict(self) -> str:
        """Whether the interval lies above, below or around chance."""
        if not np.isfinite(self.interval.low):
            return "undecided: too little text for an interval"
        if self.interval.contains(self.chance):
            return "not distinguishable from chance"
        return "above chance" if self.value > self.chance else "below chance"

    def _title(self) -> str:
        return f"layer {self.layer}: {self.what}"

    def _rows(self) -> Mapping[str, object]:
        references = {name: f"{value:.4g}" for name, value in self.references.items()}
        return {
            "measured": self.interval,
            "chance": f"{self.chance:.4g} ({self.chance_is})",
            **references,
            "verdict": self.verdict,
            "method": self.method,
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Predictability(Rate):
    """Recall of the next layer's experts; `chance` is the static guess, `gain` the paired gain."""

    gain: Interval
    static: Interval
    candidates: str = "as many as the token really selects"

    @property
    def verdict(self) -> str:
        """Judged on the paired gain over the static guess, on the same held-out tokens."""
        if not np.isfinite(self.gain.low):
            return "undecided: too little text for an interval"
        if self.gain.contains(0):
            return "no better than always guessing the most loaded experts"
        worse = "worse" if self.gain.value < 0 else "better"
        return f"{worse} than always guessing the most loaded experts, by {self.gain}"

    def _rows(self) -> Mapping[str, object]:
        return {**super()._rows(), "guessed experts": self.candidates}


@dataclass(frozen=True, kw_only=True, repr=False)
class Entropy(Shown):
    """Entropy of a layer's load; `maximum` is log2 E, reached when all experts are used alike."""

    layer: int
    interval: Interval
    maximum: float
    small_sample_bias: float
    """Bits by which so few slots make the value too low: (E' - 1) / (2 N ln 2), Miller 1955."""
    method: str = ""

    @property
    def value(self) -> float:
        return self.interval.value

    def __float__(self) -> float:
        return self.interval.value

    @property
    def effective_experts(self) -> float:
        """How many experts, used alike, would give this entropy: 2 ** bits."""
        return float(2.0**self.value)

    def _title(self) -> str:
        return f"layer {self.layer}: entropy of the load"

    def _rows(self) -> Mapping[str, object]:
        return {
            "entropy": self.interval,
            "maximum": f"{self.maximum:.4g} bits",
            "as many as": f"{self.effective_experts:.1f} experts used alike",
            "bias from few tokens": f"-{self.small_sample_bias:.2g} bits",
            "method": self.method,
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class HotSet(Shown):
    """How much of held-out text the hottest experts of other text cover."""

    layer: int
    experts: tuple[int, ...]
    num_experts: int
    coverage: Interval
    """Share of held-out routed slots that fall on `experts`."""
    uniform: float
    """The coverage of any n experts if all were used alike: n / E, exactly."""
    in_sample: Interval
    """Coverage on the text the set was chosen on: flattering, for comparison only."""
    hindsight: Interval
    """Coverage of the best n experts chosen on the held-out text itself: no set does better."""
    hottest: Interval
    """Held-out load of the hottest expert of the training text, in multiples of uniform."""
    method: str = ""

    @property
    def lift(self) -> float:
        return self.coverage.value / self.uniform

    @property
    def verdict(self) -> str:
        """In words: hot from twice uniform on, or when half of what was left to gain is gained."""
        count = f"{len(self.experts)} of {self.num_experts} experts"
        cover = f"{self.coverage.value:.1%} of held-out slots, {self.lift:.2f}x uniform"
        if len(self.experts) == self.num_experts:
            return f"no question: all {self.num_experts} experts cover everything"
        if not np.isfinite(self.coverage.low):
            return f"undecided: {count} cover {cover}, but the text is too short for an interval"
        if self.coverage.contains(self.uniform) or self.coverage.value < self.uniform:
            return f"no hot set: {count} cover {cover}, not distinguishable from no skew"
        gained = (self.coverage.value - self.uniform) / (1 - self.uniform)
        if self.lift >= 2 or gained >= 0.5:
            return f"a hot set: {count} cover {cover}"
        kind = "hardly a hot set" if self.lift < 1.25 else "a mild hot set"
        return f"{kind}: {count} cover {cover}"

    def _title(self) -> str:
        return f"layer {self.layer}: {self.verdict}"

    def _rows(self) -> Mapping[str, object]:
        return {
            "coverage": self.coverage,
            "uniform": f"{self.uniform:.4g}",
            "on the text it was chosen on": self.in_sample,
            "best with hindsight": self.hindsight,
            "hottest expert": f"×{self.hottest} uniform",
            "method": self.method,
        }
