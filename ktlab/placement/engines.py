"""Engines whose speed is predicted: what they do where, and what share of a ceiling they reach.

All of it is data (`data/engines.json`): each share has a name, a meaning and how it was obtained.
Those that were fitted are few and serve every engine; `published.fit` finds them again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from ktlab.checkpoint.embedded import data_path
from ktlab.errors import SettingError, nearest
from ktlab.placement.machine import Machine
from ktlab.record import Record

KTLAB = "ktlab"


@dataclass(frozen=True, kw_only=True)
class Efficiency(Record):
    """One share of a ceiling, or one fixed cost."""

    value: float
    unit: str
    meaning: str
    how: str
    fitted: bool = False
    """Free: found from published speeds. Otherwise published, counted or measured."""


@dataclass(frozen=True, kw_only=True)
class Engine(Record):
    """How an engine spreads the work."""

    name: str
    about: str
    gpu: bool
    """Whether everything but the routed experts and the embedding is on a GPU."""
    needs: str
    """The instruction set whose peak bounds its many-token kernels."""
    rate: str
    """The efficiency that says which share of that peak they reach."""
    format: str
    """The file type where nobody says."""
    experts: str | None
    """The format that it makes of the experts, whatever the file has."""
    numa: Literal["copies", "split", "one node"]
    """Two sockets: a copy of the experts on each node, half on each, or all on one."""
    group: int
    """Tokens whose experts are computed at a time: weights are read once a group."""
    singly_below: int
    """Fewer tokens than that go through their experts one after the other."""
    pad: int
    """Rows of activations that a tile takes."""
    attention: Literal["torch", "flash", "float32", "cpu"]
    """Scores in the GPU's memory, in its kernels, there in float32 for prompts, or on the CPU with
    naive caches."""
    launch: Mapping[str, Sequence[str]]
    """{phase: efficiencies whose seconds a layer costs where a GPU takes part}."""
    barrier: Sequence[str]
    """The same of a layer that is on the CPU alone."""
    link: str
    """The efficiency that says which share of the link its copies of activations reach."""
    hidden_bytes: int
    """Of one number on the link."""
    gpu_format: str | None
    """What it makes of matrices on a GPU, where no plan says; None: 4 bits."""
    source: str

    def problems(self, machine: Machine) -> list[str]:
        """Why it cannot run there; empty if it can."""
        if machine.processor is None or machine.bandwidth is None:
            return [
                f"{machine.name} says nothing of its processor: name a listed machine, "
                '"this", or a Machine with processor and bandwidth'
            ]
        found = []
        if self.gpu and not machine.gpus:
            found.append(f"{self.name} computes attention on a GPU and {machine.name} has none")
        if self.needs not in machine.processor.peaks:
            has = ", ".join(machine.processor.isa) or "none that is known"
            found.append(
                f"{self.name} computes experts with {self.needs} and {machine.processor.name} "
                f"has {has}"
            )
        return found


def engine(name: str) -> Engine:
    """The engine of that name; SettingError with the nearest."""
    known = engines()
    if name.lower() not in known:
        raise SettingError(
            f"engine={name!r}{nearest(name.lower(), known)}: expected {', '.join(known)}"
        )
    return known[name.lower()]


@lru_cache(maxsize=1)
def engines() -> Mapping[str, Engine]:
    """{name: engine} of data/engines.json."""
    return {name: Engine(name=name, **said) for name, said in _file()["engines"].items()}


def efficiencies(changes: Mapping[str, float] | None = None) -> Mapping[str, Efficiency]:
    """{name: efficiency}, some with other values; SettingError for a name that is unknown."""
    found = dict(_efficiencies())
    for name, value in (changes or {}).items():
        if name not in found:
            raise SettingError(
                f"no efficiency {name!r}{nearest(name, found)}; there are {', '.join(found)}"
            )
        found[name] = replace(found[name], value=float(value))
    return found


@lru_cache(maxsize=1)
def _efficiencies() -> Mapping[str, Efficiency]:
    return {name: Efficiency(**said) for name, said in _file()["efficiencies"].items()}


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data_path("engines.json").read_text(encoding="utf-8"))
    return found
