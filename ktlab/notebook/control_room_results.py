"""What the control room knows of one setting on one text: plain data, filled phase by phase.

L layers with a router, E experts, U pieces of text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.interval import Interval
from ktlab.measurement import intervals
from ktlab.measurement.quality import Quality
from ktlab.measurement.speed import SpeedComparison
from ktlab.notebook.control_room_choice import Choice
from ktlab.routing.divergence import entropy_bits, js_interval
from ktlab.routing.intervals import bootstrap

STAGES = ("attention", "router", "experts", "shared", "mlp", "output", "other")
"""Stages in the order of a layer; embedding and everything between the stages is "other"."""
WHICH = ("before", "after")


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """How often each expert was selected, baseline and now, on the same tokens."""

    layers: tuple[int, ...]
    before_ULE: NDArray[np.int64]
    """By pieces of text, which are what an interval resamples."""
    after_ULE: NDArray[np.int64]
    tokens_U: NDArray[np.int64]
    preliminary: bool

    @property
    def tokens(self) -> int:
        return int(self.tokens_U.sum())

    @cached_property
    def before_LE(self) -> NDArray[np.int64]:
        return self.before_ULE.sum(0)

    @cached_property
    def after_LE(self) -> NDArray[np.int64]:
        return self.after_ULE.sum(0)

    def relative(self, which: str) -> NDArray[np.float64]:
        """(L, E) load in multiples of uniform; `which` is "before" or "after"."""
        counts_LE = getattr(self, f"{which}_LE").astype(float)
        total_L1 = np.maximum(counts_LE.sum(-1, keepdims=True), 1)
        return counts_LE / total_L1 * counts_LE.shape[-1]

    def entropy(self, which: str, layer: int) -> Interval:
        """Entropy of the load of a layer, bits."""
        counts_UE = self._of(which, layer)
        most = log2(counts_UE.shape[1])
        return bootstrap(counts_UE, entropy_bits, unit="bits", bounds=(0, most))

    def divergence(self, layer: int) -> Interval:
        """Jensen-Shannon divergence between before and after, bits."""
        pair = (self._of(which, layer) for which in WHICH)
        value, low, high = js_interval(*pair, paired=True)
        return Interval(value=value, low=low, high=high, n=len(self.tokens_U), unit="bits")

    def experts_a_token(self, which: str, layer: int) -> Interval:
        """Mean number of experts that a token took."""
        taken_U = self._of(which, layer).sum(1)
        return bootstrap(np.stack([taken_U, self.tokens_U], 1), lambda x: x[:, 0] / x[:, 1])

    def _of(self, which: str, layer: int) -> NDArray[np.int64]:
        counts_ULE: NDArray[np.int64] = getattr(self, f"{which}_ULE")
        return counts_ULE[:, self.layers.index(layer)]


Stages = Mapping[str, float]
"""{stage: ms a token} of one run."""


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Where the time goes, ms a token: every repeat, baseline ("before") and now ("after") in turn.

    A phase is "prefill" or "decode".
    """

    runs: Mapping[str, Mapping[str, tuple[Stages, ...]]]
    """{phase: {"before" or "after": one for each repeat}}"""
    prefill_tokens: int
    decode_tokens: int
    context: int

    @property
    def repeats(self) -> int:
        return len(self.runs["prefill"]["before"])

    @property
    def prefill(self) -> dict[str, dict[str, float]]:
        """{"before" or "after": {stage: median ms a token}}"""
        return self._medians("prefill")

    @property
    def decode(self) -> dict[str, dict[str, float]]:
        """{"before" or "after": {stage: median ms a token}}"""
        return self._medians("decode")

    def stage(self, phase: str, which: str, stage: str) -> Interval:
        """Median of one stage, ms a token."""
        samples = [run.get(stage, 0.0) for run in self.runs[phase][which]]
        return intervals.median(samples, unit="ms")

    def total(self, phase: str, which: str) -> Interval:
        """Median of all stages together, ms a token."""
        return intervals.median([sum(run.values()) for run in self.runs[phase][which]], unit="ms")

    def ratio(self, phase: str) -> Interval:
        """Time now over the baseline's, repeat by repeat: below 1 is faster."""
        before, after = ([sum(r.values()) for r in self.runs[phase][w]] for w in WHICH)
        paired = [now / base for base, now in zip(before, after, strict=True)]
        return intervals.median(paired, no_change=1.0)

    def _medians(self, phase: str) -> dict[str, dict[str, float]]:
        return {
            which: {stage: self.stage(phase, which, stage).value for stage in runs[0]}
            for which, runs in self.runs[phase].items()
        }


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A generated token, and what the other setting makes of it."""

    text: str
    changed: bool
    kl: float | None = None
    """KL(baseline || now) at this place, nats; None where the settings read different text."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Generations:
    """The same prompt continued greedily by both settings."""

    prompt: str
    before: tuple[Marked, ...]
    """What the baseline writes; changed: here the setting would write something else."""
    after: tuple[Marked, ...]
    """What the setting writes by itself; changed: not in the baseline's continuation."""
    done: bool = True

    @property
    def changed_share(self) -> float:
        """Share of the baseline's tokens at which the setting would write another one."""
        return sum(token.changed for token in self.before) / max(1, len(self.before))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a streamed figure, for the picture of its narrowing interval."""

    tokens: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """Everything that the room shows of `choice` against `baseline` on `text`."""

    choice: Choice
    baseline: Choice
    text: str
    quality: Quality | None = None
    preliminary: bool = False
    """`quality` comes from the first few tokens only."""
    history: tuple[Progress, ...] = ()
    histogram: Histogram | None = None
    stages: StageTimes | None = None
    speed: SpeedComparison | None = None
    generations: Generations | None = None
    limits: str = ""
    """What is measured on less than the room was asked for, since the model is slow here."""
    seconds: float = 0.0
    """Computing time so far."""

    @property
    def complete(self) -> bool:
        """Whether every phase is through."""
        return (
            self.quality is not None
            and not self.preliminary
            and self.quality.done
            and self.stages is not None
            and self.speed is not None
            and self.speed.done
            and self.generations is not None
            and self.generations.done
        )

    @property
    def is_baseline(self) -> bool:
        return self.choice == self.baseline

    def speed_ratio(self, phase: str) -> Interval | None:
        """Speed over the baseline's, paired repeat by repeat; `phase` is "prefill" or "decode"."""
        if self.speed is None:
            return None
        now = list(self.speed.speeds.values())[-1]
        ratio: Interval = getattr(now, f"{phase}_ratio")
        return ratio

    def to_dict(self) -> dict[str, Any]:
        """Figures as plain values, for JSON."""
        return {
            "choice": self.choice.expression,
            "baseline": self.baseline.expression,
            "text": self.text,
            "preliminary": self.preliminary,
            "quality": self.quality.to_dict() if self.quality else None,
            "speed": self.speed.to_dict() if self.speed else None,
        }


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting tried, in the plane of quality and speed."""

    label: str
    speed: Interval
    kl: Interval
    on_front: bool
    current: bool


def points(
    tried: Iterable[Results], current: Choice, phase: str, baseline: Choice
) -> tuple[Point, ...]:
    """The settings whose quality and speed are measured; the front among them marked.

    The baseline is there from the beginning: against itself it has nothing to measure.
    """
    from ktlab.figures import pareto_front

    itself = Interval(
        value=0, low=0, high=0, method="the baseline against itself: nothing to measure"
    )
    found = {baseline: (replace(itself, value=1, low=1, high=1), itself)}
    for r in tried:
        ratio = r.speed_ratio(phase)
        if r.quality is not None and ratio is not None and not r.is_baseline:
            found[r.choice] = (ratio, r.quality.kl_mean)
    pairs = list(found.values())
    front = pareto_front([speed.value for speed, _ in pairs], [kl.value for _, kl in pairs])
    return tuple(
        Point(
            label=choice.label,
            speed=speed,
            kl=kl,
            on_front=bool(best),
            # The baseline alone looks alike whatever is chosen: a press need not draw it again.
            current=choice == current and len(found) > 1,
        )
        for (choice, (speed, kl)), best in zip(found.items(), front, strict=True)
    )
