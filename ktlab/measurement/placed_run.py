"""What a placement gives on this machine's devices, as a record to keep: numbers beside the CPU's,
bytes beside what was allocated, and how much of the devices' work passes beside the host's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktlab.html import decimal_bytes
from ktlab.record import Record

if TYPE_CHECKING:
    from ktlab.model.model import Model

CHECKED = 64
"""Tokens whose logits are held against the CPU's."""


@dataclass(frozen=True, kw_only=True)
class PlacedRun(Record):
    """A model as it was placed."""

    places: dict[str, Any]
    """The placement, as its file has it."""
    devices: dict[str, str]
    """{word: what computes there, and in which format}."""
    relative_error: float
    """Of the logits of the prompt's first tokens: norm of the difference to the CPU's, over its."""
    known_bytes: dict[str, int]
    """{device: what the ledger counts}."""
    allocated_bytes: dict[str, int]
    """{device: what its allocator, or the process, has}; without those that do not tell."""
    overlap_share: float | None
    """Of the time that host and devices could compute side by side; None where they never could."""

    def __str__(self) -> str:
        where = "; ".join(f"{word}: {what}" for word, what in self.devices.items()) or "the CPU"
        sizes = ", ".join(
            f"{decimal_bytes(size)} on {word}"
            + (f" of {decimal_bytes(self.allocated_bytes[word])}" * (word in self.allocated_bytes))
            for word, size in self.known_bytes.items()
        )
        parts = [f"off the CPU's numbers by {self.relative_error:.2g}", sizes]
        if self.overlap_share is not None:
            parts.append(f"{self.overlap_share:.0%} side by side")
        return f"placed on {where}: {'; '.join(parts)}"


def logits_of(model: "Model", ids: Sequence[int]) -> torch.Tensor:
    """(1, V) after the first `CHECKED` of them."""
    cache = model.new_cache(context=CHECKED)
    return model.next_logits(np.array([ids[:CHECKED]]), cache).float()


def placed_run(model: "Model", ids: Sequence[int], on_cpu: torch.Tensor) -> PlacedRun:
    """Of a model as it is placed now; `on_cpu`: `logits_of` it before."""
    with model.watch_overlap() as overlap:
        found = logits_of(model, ids)
    ledger = model.ledger()
    return PlacedRun(
        places=model.placement.placement.to_dict() if model.placement is not None else {},
        devices=_devices(model.seats),
        relative_error=float((found - on_cpu).norm() / on_cpu.norm()),
        known_bytes={one.device: one.known for one in ledger.devices},
        allocated_bytes={one.device: one.total for one in ledger.devices if one.total is not None},
        overlap_share=overlap.share,
    )


def _devices(seats: Mapping[str, Any]) -> dict[str, str]:
    def name(seat: Any) -> str:
        cuda = seat.device.type == "cuda"
        return torch.cuda.get_device_name(seat.device) if cuda else f"{seat.device} in its stead"

    return {word: f"{name(seat)}, {seat.format}" for word, seat in seats.items()}
