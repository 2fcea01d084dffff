"""What others measured for the same model on the same kind of placement, beside what is planned."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.published import published_model
from ktlab.html import decimal_bytes
from ktlab.placement.ledger import Ledger
from ktlab.placement.placed import Placed
from ktlab.record import Record

NEAR = 0.05
"""A published figure within this share needs no explanation."""


@dataclass(frozen=True, kw_only=True)
class Known(Record):
    """A published figure, and ours."""

    who: str
    device: str
    published: int
    planned: int
    includes: str
    source: str

    @property
    def difference(self) -> float:
        """Ours over theirs, less one."""
        return self.planned / self.published - 1

    def __str__(self) -> str:
        why = f"; theirs includes {self.includes}" if abs(self.difference) > NEAR else ""
        return (
            f"{self.who}: {decimal_bytes(self.published)} on {self.device}, planned "
            f"{decimal_bytes(self.planned)} ({self.difference:+.1%}){why} ({self.source})"
        )


def known(
    config: ModelConfig, placed: Sequence[Placed], ledgers: Sequence[Ledger], copies: int
) -> Iterator[Known]:
    """Published figures for this model with experts in these formats."""
    experts = [p for p in placed if p.part.component == "experts"]
    formats = {format for p in experts for format in p.formats}
    has_gpu = len(ledgers) > 1
    for entry in known_memory():
        same = _shape(published_model(entry["model"]).config) == _shape(config)
        if not same or formats != set(entry["experts"]) or copies != entry["numa_copies"]:
            continue
        for one in ledgers:
            if has_gpu and one.device == entry["device"]:
                yield Known(
                    who=entry["who"],
                    device=one.device,
                    published=int(entry["bytes"]),
                    planned=one.needed,
                    includes=entry["includes"],
                    source=entry["source"],
                )


def known_memory() -> list[dict[str, Any]]:
    """The published sizes of memory, as data/published_memory.json has them."""
    found: list[dict[str, Any]] = _table()["memory"]
    return found


def _shape(config: ModelConfig) -> tuple[object, ...]:
    """What makes two models of the same size, whatever a file says of names and RoPE."""
    return (
        config.architecture,
        config.attention,
        config.num_layers,
        config.hidden_size,
        config.num_experts,
        config.expert_size,
        config.vocab_size,
    )


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        data_path("published_memory.json").read_text(encoding="utf-8")
    )
    return found
