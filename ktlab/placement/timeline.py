"""What runs where and when, and what waits for what: a value that is drawn, and its scheduler.

A `Timeline` says nothing of where its seconds come from; whoever makes one says it in `method`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab.errors import SettingError, nearest
from ktlab.placement import timeline_view
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True)
class Span(Record):
    """Something that one lane does from `start_s` to `end_s`."""

    lane: str
    """Who is busy: "CPU", "GPU", "link", ..."""
    label: str
    """What it is, in full: "layer 3 attention"."""
    start_s: float
    end_s: float
    kind: str = ""
    """What is drawn in one colour, e.g. "attention"; the label where nothing is said."""
    after: tuple[int, ...] = ()
    """Places in `Timeline.spans` of what had to end before."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def group(self) -> str:
        """The kind, or the label where it has none."""
        return self.kind or self.label


@dataclass(frozen=True, kw_only=True, repr=False)
class Timeline(Record):
    """Lanes of spans from second 0 on."""

    spans: tuple[Span, ...]
    title: str = ""
    method: str = ""
    """Where the seconds come from: measured how, predicted by what."""

    def __post_init__(self) -> None:
        problems = [
            f"span {i} ({s.label}) goes from {s.start_s:g} s to {s.end_s:g} s"
            for i, s in enumerate(self.spans)
            if not (math.isfinite(s.end_s) and 0 <= s.start_s <= s.end_s)
        ]
        problems += [
            f"span {i} ({s.label}) waits for {[a for a in s.after if not 0 <= a < i]}"
            for i, s in enumerate(self.spans)
            if any(not 0 <= a < i for a in s.after)
        ]
        if problems:
            raise SettingError(
                "timeline: expected spans that start at 0 or later, end after they start and wait "
                "for earlier ones; found " + "; ".join(problems)
            )

    @property
    def lanes(self) -> tuple[str, ...]:
        """In order of their first span."""
        return tuple(dict.fromkeys(span.lane for span in self.spans))

    @property
    def seconds(self) -> float:
        """Until the last span ends."""
        return max((span.end_s for span in self.spans), default=0.0)

    def busy(self, lane: str) -> float:
        """Seconds in which a lane does something; overlapping spans count once."""
        return sum(end - start for start, end in self._stretches(lane))

    def overlap(self, lane: str, other: str) -> float:
        """Seconds in which both lanes do something."""
        return sum(
            max(0.0, min(end, other_end) - max(start, other_start))
            for start, end in self._stretches(lane)
            for other_start, other_end in self._stretches(other)
        )

    @property
    def critical(self) -> tuple[int, ...]:
        """Places of the spans that the end waited for, first to last: shorten one of these."""
        if not self.spans:
            return ()
        at = max(range(len(self.spans)), key=lambda i: self.spans[i].end_s)
        path = [at]
        while self.spans[at].start_s > 0:
            span = self.spans[at]
            held = [i for i in span.after] + [
                i for i in range(at) if self.spans[i].lane == span.lane
            ]
            held = [i for i in held if self.spans[i].end_s <= span.start_s * (1 + 1e-9)]
            if not held:
                break
            at = max(held, key=lambda i: self.spans[i].end_s)
            path.append(at)
        return tuple(reversed(path))

    def by_kind(self, lane: str) -> dict[str, float]:
        """{kind: seconds} of a lane."""
        self._need(lane)
        found: dict[str, float] = {}
        for span in self.spans:
            if span.lane == lane:
                found[span.group] = found.get(span.group, 0.0) + span.seconds
        return found

    def to_frame(self) -> "pd.DataFrame":
        """One row a span: lane, kind, label, start_s, end_s, after, critical."""
        import pandas as pd

        critical = set(self.critical)
        return pd.DataFrame(
            [
                {
                    "lane": s.lane,
                    "kind": s.group,
                    "label": s.label,
                    "start_s": s.start_s,
                    "end_s": s.end_s,
                    "after": ", ".join(self.spans[a].label for a in s.after),
                    "critical": i in critical,
                }
                for i, s in enumerate(self.spans)
            ]
        )

    def plot(self) -> "Figure":
        """A lane for each device, seconds to the right."""
        return plot_timelines({self.title: self})

    def __repr__(self) -> str:
        return timeline_view.text(self)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return timeline_view.bundle(self)

    def _need(self, lane: str) -> None:
        if lane not in self.lanes:
            raise SettingError(
                f"the timeline has no lane {lane!r}{nearest(lane, self.lanes)}; there are "
                f"{', '.join(self.lanes)}"
            )

    def _stretches(self, lane: str) -> list[tuple[float, float]]:
        """Where a lane is busy, without overlaps, in order."""
        self._need(lane)
        found: list[tuple[float, float]] = []
        for start, end in sorted((s.start_s, s.end_s) for s in self.spans if s.lane == lane):
            if found and start <= found[-1][1]:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            else:
                found.append((start, end))
        return found


def plot_timelines(timelines: Mapping[str, Timeline]) -> "Figure":
    """Several timelines {name: timeline} one under another over the same seconds."""
    return timeline_view.figure(timelines)


@dataclass(frozen=True, kw_only=True)
class Task(Record):
    """Work that a lane does once its turn has come and what it waits for is done."""

    name: str
    """What others wait for it by."""
    lane: str
    label: str
    seconds: float
    kind: str = ""
    after: tuple[str, ...] = ()
    """Names of tasks that stand before it."""


def schedule(tasks: Iterable[Task], *, title: str = "", method: str = "") -> Timeline:
    """When each task runs: a lane takes its tasks in the order given, one at a time.

    Raises `SettingError` where a task waits for one that is unknown or comes later, where two have
    one name, or where seconds are negative or not finite.
    """
    tasks = tuple(tasks)
    _check(tasks)
    place: dict[str, int] = {}
    free: dict[str, float] = {}
    spans: list[Span] = []
    for task in tasks:
        after = tuple(place[name] for name in task.after)
        start = max([free.get(task.lane, 0.0), *(spans[i].end_s for i in after)])
        free[task.lane] = start + task.seconds
        place[task.name] = len(spans)
        spans.append(
            Span(
                lane=task.lane, label=task.label, start_s=start, end_s=start + task.seconds,
                kind=task.kind, after=after,
            )
        )  # fmt: skip
    return Timeline(spans=tuple(spans), title=title, method=method)


def _check(tasks: Sequence[Task]) -> None:
    known: set[str] = set()
    problems = []
    for task in tasks:
        if task.name in known:
            problems.append(f"two tasks are named {task.name!r}")
        if not (math.isfinite(task.seconds) and task.seconds >= 0):
            problems.append(f"{task.name!r} takes {task.seconds} s")
        problems += [
            f"{task.name!r} waits for {name!r}, which stands nowhere before it"
            f"{nearest(name, known)}"
            for name in task.after
            if name not in known
        ]
        known.add(task.name)
    if problems:
        raise SettingError("schedule: " + "; ".join(problems))
