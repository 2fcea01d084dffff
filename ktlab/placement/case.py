"""What is predicted, and what a stage's prediction is: shared by all who turn work into seconds.

T tokens of the pass, S positions in the cache, E experts, K of them a token, H heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.config import ModelConfig
from ktlab.placement.engines import Efficiency, Engine
from ktlab.placement.machine import Gpu, Machine
from ktlab.placement.placed import Placed
from ktlab.placement.placement import kind_of
from ktlab.placement.ranges import read_ranges
from ktlab.placement.touched import Load, chances
from ktlab.record import Record

CPU_LANE, LINK_LANE = "CPU", "link"


@dataclass(frozen=True, kw_only=True)
class StageTime(Record):
    """One stage of one layer, or all its layers together (`layer` is None)."""

    layer: int | None
    stage: str
    lane: str
    seconds: float
    flop: float
    bytes: float
    """Read or moved."""
    bound: str
    """What it waits for most: "memory", "compute", "cache", "link", "launch"."""
    parts: Mapping[str, float]
    """{bound: seconds}; they add up."""


def stage(
    layer: int | None, name: str, lane: str, *, flop: float, nbytes: float,
    parts: Mapping[str, float],
) -> StageTime:  # fmt: skip
    """A stage whose parts add up; its bound is the largest."""
    return StageTime(
        layer=layer, stage=name, lane=lane, seconds=sum(parts.values()), flop=flop, bytes=nbytes,
        bound=max(parts, key=lambda part: parts[part]), parts=dict(parts),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pass:
    """T tokens onto S cached positions; `room` positions are allocated."""

    phase: str
    tokens: int
    context: int
    room: int

    @property
    def decode(self) -> bool:
        return self.phase == "decode"

    @property
    def pairs(self) -> float:
        """Queries with positions that they see."""
        return self.tokens * (self.context + self.tokens / 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is predicted: rows of a plan on a machine by an engine."""

    config: ModelConfig
    rows: Sequence[Placed]
    machine: Machine
    engine: Engine
    shares: Mapping[str, Efficiency]
    top_k: int
    loads: Mapping[int, Load]
    """{layer: share of choices of each expert}; layers that are missing are even."""

    def share(self, name: str) -> float:
        return self.shares[name].value

    def layers(self, phase: str) -> list[dict[str, list[Placed]]]:
        """{component: rows} of each layer: several where its experts are apart."""
        found: list[dict[str, list[Placed]]] = [{} for _ in range(self.config.num_layers)]
        for row in self.rows:
            layer = row.part.layer
            if layer is not None and layer < len(found) and phase in row.phases:
                found[layer].setdefault(row.part.component, []).append(row)
        return found

    def outside(self, component: str, phase: str) -> list[Placed]:
        """The embedding, or the matrix that gives the logits of the last token alone."""
        return [r for r in self.rows if r.part.component == component and phase in r.phases]

    def chances(self, layer: int, row: Placed) -> NDArray[np.float64]:
        """Chance that one token chooses each expert of a row."""
        found_E = chances(self.config.num_experts, self.top_k, self.loads.get(layer))
        return found_E[list(read_ranges(row.experts))] if row.experts else found_E

    def experts_of(self, row: Placed) -> float:
        """How many of a layer's experts a row has."""
        return self.config.num_experts * row.share

    def gpu(self, device: str) -> Gpu:
        """The ceilings of "cuda:n"; `prepare` has seen to it that they are known."""
        return self.machine.gpus[int(device.partition(":")[2])]

    @property
    def memory(self) -> float:
        """Bytes/s at which the cores read the experts."""
        assert self.machine.bandwidth is not None
        if self.engine.numa == "one node":
            return self.one_node
        return self.share("gemv_share") * self.machine.bandwidth * self.machine.sockets

    @property
    def one_node(self) -> float:
        """Bytes/s of all cores from and to one node's memory, where activations of a prompt lie,
        and whatever nothing copies or splits."""
        assert self.machine.bandwidth is not None
        across = self.share("cross_socket") if self.machine.sockets > 1 else 1.0
        return self.share("gemv_share") * self.machine.bandwidth * across

    @property
    def compute(self) -> float:
        """Operations/s of the many-token kernels on full tiles."""
        assert self.machine.processor is not None
        peak = self.machine.processor.peaks[self.engine.needs] * self.machine.sockets
        across = self.share("cross_socket") if self.machine.sockets > 1 else 1.0
        return self.share(self.engine.rate) * peak * across


def on_gpu(row: Placed) -> bool:
    """Whether a GPU computes it."""
    return kind_of(row.device) == "cuda"


def lane_of(device: str) -> str:
    """Who is busy with what is there: "CPU" (also a NUMA node, and what waits on disk), "GPU"."""
    if kind_of(device) != "cuda":
        return CPU_LANE
    return "GPU" if device == "cuda:0" else f"GPU {device.partition(':')[2]}"
