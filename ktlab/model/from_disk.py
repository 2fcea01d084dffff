"""Decode where memory cannot hold a mapped model: what the page cache misses comes from disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ktlab.html import decimal_bytes
from ktlab.memory import disk_rate
from ktlab.record import Record


@dataclass(frozen=True, kw_only=True)
class FromDisk(Record):
    """An upper bound: nothing but the missing experts is waited for."""

    missing_bytes: int
    """Of the weights in place, what memory has no room for."""
    bytes_per_token: float
    """That one token reads from disk, if all experts are wanted alike."""
    rate: float | None
    """Bytes a second, measured on the file itself; None where that was not possible."""

    @property
    def tokens_per_s(self) -> float | None:
        """What the disk allows; None where its rate is unknown."""
        return None if self.rate is None else self.rate / self.bytes_per_token

    def __str__(self) -> str:
        what = (
            f"from disk: memory has no room for {decimal_bytes(self.missing_bytes)} of the "
            f"weights; a token reads about {decimal_bytes(self.bytes_per_token)} of them"
        )
        if self.rate is None or self.tokens_per_s is None:
            return f"{what} (the disk's rate could not be measured)"
        speed = f"{self.tokens_per_s:.3g} tokens a second"
        return f"{what}, at {decimal_bytes(self.rate)}/s at most {speed}"


def from_disk(
    files: Sequence[Path],
    *,
    capacity: int,
    experts: int,
    others: int,
    experts_per_token: float,
    rate: float | None = None,
) -> FromDisk | None:
    """How decode goes if `capacity` bytes are there for weights in place; None if they all fit.

    What every token reads (`others`) stays in memory, for it is always the latest used; experts
    share the rest, and a token finds one there as often as there is room for it.
    """
    missing = experts + others - max(0, capacity)
    if missing <= 0 or not experts:
        return None
    room = max(0, capacity - others)
    hot_misses = max(0, others - max(0, capacity))
    per_token = experts_per_token * (1 - min(1.0, room / experts)) + hot_misses
    if rate is None and files:
        rate = _rate(max(files, key=lambda path: path.stat().st_size))
    return FromDisk(missing_bytes=missing, bytes_per_token=per_token, rate=rate)


@lru_cache(maxsize=16)
def _rate(path: Path) -> float | None:
    """Measured once in a process: a model that is printed twice must not read twice."""
    return disk_rate(path)
