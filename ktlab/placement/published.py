"""Published speeds beside predicted ones, and the fit of the efficiencies that are free.

`data/published_speeds.json` holds the figures with their sources: those that are fitted, those that
are held out, which no efficiency has seen, and those that are left out of both, since what they
were measured with was not published: no bound holds for them, so each is said beside it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, log
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ktlab.checkpoint.embedded import data_path
from ktlab.placement import published_view
from ktlab.placement.case import Case
from ktlab.placement.engines import efficiencies
from ktlab.placement.known import known_memory
from ktlab.placement.plan import plan
from ktlab.placement.predict import added, prepare, stages_of, timeline
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

KINDS = ("fitted", "held_out", "left_out")
TURNS = 12
STEP = 1e-3
"""Of a logarithm, for differences."""


@dataclass(frozen=True, kw_only=True)
class Speed(Record):
    """One published speed, and ours."""

    table: str
    model: str
    machine: str
    engine: str
    top_k: int
    prompt: int
    generate: int
    phase: str
    published: float
    predicted: float
    bound: str
    """What ours waits for most."""
    source: str

    @property
    def error(self) -> float:
        """Ours over theirs, less one."""
        return self.predicted / self.published - 1


@dataclass(frozen=True, kw_only=True)
class KnownMemory(Record):
    """One published size, and ours."""

    model: str
    who: str
    device: str
    published: int
    predicted: int
    includes: str
    """What the published figure has in it."""
    source: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


@dataclass(frozen=True, kw_only=True)
class Published(Record):
    """All published figures with their errors."""

    fitted: tuple[Speed, ...]
    held_out: tuple[Speed, ...]
    memory: tuple[KnownMemory, ...]
    left_out: tuple[Speed, ...]
    """In neither, and not within their errors; `source` says what was not published."""
    free: Mapping[str, float]
    """The efficiencies that were fitted."""
    unexplained: tuple[str, ...] = ()
    """What the model of machines does not explain."""

    def to_dict(self) -> dict[str, Any]:
        """With the errors, which `from_dict` computes anew."""
        found = super().to_dict()
        for kind in (*KINDS, "memory"):
            for row, one in zip(found[kind], getattr(self, kind), strict=True):
                row["error"] = one.error
        return {**found, "errors": self.errors}

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """{"fitted", "held_out": {"median", "worst", "count"}} of absolute relative errors;
        not of what is left out."""
        return {
            kind: {
                "median": median(abs(one.error) for one in rows),
                "worst": max(abs(one.error) for one in rows),
                "count": len(rows),
            }
            for kind, rows in (("fitted", self.fitted), ("held_out", self.held_out))
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row a speed."""
        import pandas as pd

        rows = [
            {"kind": kind.replace("_", " "), **one.to_dict(), "error": one.error}
            for kind in KINDS
            for one in getattr(self, kind)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "Figure":
        """Predicted over published, one point a speed."""
        return published_view.figure(self)

    def __str__(self) -> str:
        return published_view.text(self)

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return published_view.bundle(self)


def published(changes: Mapping[str, float] | None = None) -> Published:
    """Every published figure beside what is predicted, with other efficiencies if asked for."""
    said = _file()
    return Published(
        fitted=tuple(_speeds(said["fitted"], changes)),
        held_out=tuple(_speeds(said["held_out"], changes)),
        left_out=tuple(_speeds(said["left_out"], changes)),
        memory=tuple(_memory()),
        free=_free(changes),
        unexplained=tuple(said["unexplained"]),
    )


def fit(rows: Sequence[Speed] | None = None) -> dict[str, float]:
    """The free efficiencies that give the least squares of log errors over published speeds.

    `rows` are those to fit on, by default all that are not held out. Gauss-Newton on logarithms
    from the committed values; deterministic. An efficiency that no row depends on stays.
    """
    wanted = [*(published().fitted if rows is None else rows)]
    cases = [(row, _case(row.to_dict(), None, row.model)) for row in wanted]
    values = _free(None)
    names = list(values)
    for _ in range(TURNS):
        now = _logs(cases, values)
        slopes = np.stack(
            [
                (_logs(cases, {**values, name: values[name] * exp(STEP)}) - now) / STEP
                for name in names
            ],
            axis=1,
        )
        error = now - np.log([row.published for row in wanted])
        step = -np.linalg.lstsq(slopes, error, rcond=1e-6)[0]
        values = {
            name: values[name] * exp(float(np.clip(change, -0.5, 0.5)))
            for name, change in zip(names, step, strict=True)
        }
        if np.abs(step).max() < 1e-6:
            break
    return values


def _logs(cases: Iterable[tuple[Speed, Case]], changes: Mapping[str, float]) -> np.ndarray:
    """Logarithms of the predicted speeds."""
    shares = efficiencies(changes)
    return np.array([log(_speed(row, replace(case, shares=shares))[0]) for row, case in cases])


def _speed(row: "Speed", case: Case) -> tuple[float, str]:
    """(tokens/s, what it waits for most)."""
    stages = stages_of(case, row.phase, row.prompt, row.generate)
    tokens = row.prompt if row.phase == "prefill" else 1
    by_stage = added(stages)
    longest = max(by_stage, key=lambda stage: stage.seconds)
    return tokens / timeline(stages).seconds, f"{longest.stage}, {longest.bound}"


def _free(changes: Mapping[str, float] | None) -> dict[str, float]:
    return {name: one.value for name, one in efficiencies(changes).items() if one.fitted}


def _case(row: Mapping[str, Any], changes: Mapping[str, float] | None, model: str) -> Case:
    wanted = ("machine", "engine", "top_k", "prompt", "generate")
    return prepare(model, changes=changes, **{name: row[name] for name in wanted})[0]


def _speeds(
    tables: Iterable[Mapping[str, Any]], changes: Mapping[str, float] | None
) -> Iterator[Speed]:
    for table in tables:
        for row in table["speeds"]:
            unknown = Speed(
                table=table["title"],
                model=table["model"],
                machine=row["machine"],
                engine=row["engine"],
                top_k=row["top_k"],
                prompt=row["prompt"],
                generate=row["generate"],
                phase=row["phase"],
                published=row["tokens_per_s"],
                predicted=0.0,
                bound="",
                source=row.get("source", table["source"]),
            )
            speed, bound = _speed(unknown, _case(row, changes, table["model"]))
            yield replace(unknown, predicted=speed, bound=bound)


def _memory() -> Iterator[KnownMemory]:
    """The sizes of data/published_memory.json, planned as they were measured."""
    for row in known_memory():
        planned = plan(
            row["model"],
            format=row["experts"][0] if len(row["experts"]) == 1 else "q4_k_m",
            machine="2x6454s+4090d",
            numa_copies=row["numa_copies"],
            gpu_formats=row.get("gpu_formats"),
        )
        yield KnownMemory(
            model=row["model"],
            who=row["who"],
            device=row["device"],
            published=int(row["bytes"]),
            predicted=planned[row["device"]].needed,
            includes=row["includes"],
            source=row["source"],
        )


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        data_path("published_speeds.json").read_text(encoding="utf-8")
    )
    return found
