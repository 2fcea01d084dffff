"""What the control room knows of one setting on one text: plain data, filled phase by phase.

L layers with a router, E experts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.interval import Interval
from ktlab.measurement.intervals import exactly
from ktlab.measurement.quality import Quality
from ktlab.measurement.speed import SpeedComparison
from ktlab.notebook.control_room_choice import Choice
from ktlab.routing.divergence import entropy_bits, js_bits

STAGES = ("attention", "router", "experts", "shared", "mlp", "output", "other")
"""Stages in the order of a layer; embedding and everything between the stages is "other"."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """How often each expert was selected, baseline and now, on the same tokens."""

    layers: tuple[int, ...]
    before_LE: NDArray[np.int64]
    after_LE: NDArray[np.int64]
    tokens: int
    preliminary: bool

    def relative(self, which: str) -> NDArray[np.float64]:
        """(L, E) load in multiples of uniform; `which` is "before" or "after"."""
        counts_LE = getattr(self, f"{which}_LE").astype(float)
        total_L1 = np.maximum(counts_LE.sum(-1, keepdims=True), 1)
        return counts_LE / total_L1 * counts_LE.shape[-1]

    def entropy(self, which: str) -> NDArray[np.float64]:
        """(L,) entropy of the load, bits."""
        return entropy_bits(getattr(self, f"{which}_LE"))

    @cached_property
    def divergence(self) -> NDArray[np.float64]:
        """(L,) Jensen-Shannon divergence between before and after, bits."""
        return js_bits(self.before_LE, self.after_LE)

    def experts_a_token(self, which: str) -> NDArray[np.float64]:
        """(L,) mean number of experts that a token took."""
        return getattr(self, f"{which}_LE").sum(-1) / self.tokens


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Where the time goes, ms a token, by stage: median over the repeats."""

    prefill: Mapping[str, Mapping[str, float]]
    """{"before" or "after": {stage: ms a token}}"""
    decode: Mapping[str, Mapping[str, float]]
    prefill_tokens: int
    decode_tokens: int
    context: int
    repeats: int


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


def points(tried: Iterable[Results], current: Choice, phase: str) -> tuple[Point, ...]:
    """The settings whose quality and speed are measured; the front among them marked.

    The baseline is there with the first of them: against itself it has nothing to measure.
    """
    from ktlab.figures import pareto_front

    found: dict[Choice, tuple[Interval, Interval]] = {}
    for r in tried:
        ratio = r.speed_ratio(phase)
        if r.quality is not None and ratio is not None:
            found.setdefault(r.baseline, (exactly(ratio, 1.0), exactly(r.quality.kl_mean, 0.0)))
            found[r.choice] = (ratio, r.quality.kl_mean)
    pairs = list(found.values())
    front = pareto_front([speed.value for speed, _ in pairs], [kl.value for _, kl in pairs])
    return tuple(
        Point(
            label=choice.label,
            speed=speed,
            kl=kl,
            on_front=bool(best),
            current=choice == current,
        )
        for (choice, (speed, kl)), best in zip(found.items(), front, strict=True)
    )
