"""Where a loaded model's bytes are: mapped from files, in memory now, made anew; and what decode
does where memory cannot hold them.

A mapped file costs no memory until it is used, and what was used may be dropped again: memory that
is short makes a model slow, not broken. That must be said before the first token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktlab.checkpoint.facts import model_files
from ktlab.html import decimal_bytes
from ktlab.kernels.stack import Stack
from ktlab.memory import memory, resident_bytes
from ktlab.model.block import MoEBlock
from ktlab.model.components import component_stages
from ktlab.model.from_disk import FromDisk, from_disk
from ktlab.record import Record

if TYPE_CHECKING:
    from ktlab.model.model import Model


class SlowFromDisk(UserWarning):
    """Memory cannot hold the model: part of it will come from disk for every token."""


@dataclass(frozen=True, kw_only=True)
class Residency(Record):
    """Bytes of a model at this moment."""

    mapped: int
    """Of its files, in this process's address space."""
    resident: int | None
    """Of those, in memory now; None where the system does not say."""
    converted: int
    """Made while loading or running: requantized, packed, float32 copies."""
    available: int | None
    """Memory that could still be taken, the system's page cache included."""
    disk: FromDisk | None
    """What decode does from disk; None where memory can hold the model."""

    def __str__(self) -> str:
        parts = [f"mapped {decimal_bytes(self.mapped)}"]
        if self.resident is not None:
            parts.append(f"resident {decimal_bytes(self.resident)}")
        parts.append(f"converted {decimal_bytes(self.converted)}")
        return ", ".join(parts) + (f"\n{self.disk}" if self.disk is not None else "")


def residency(model: "Model") -> Residency:
    """Look at a model now. Measures the disk, about 0.3 s, only where memory is too small."""
    path = model.checkpoint.path
    files = () if path is None else model_files(path)
    mapped = sum(path.stat().st_size for path in files)
    resident = resident_bytes(files) if files else 0
    converted = sum(map(_made_bytes, stacks(model)))
    found = memory()
    sizes = [size for size in (found.available, found.limit) if size is not None]
    available = min(sizes) if sizes else None
    disk = None
    if files and available is not None:
        in_place = {s.name: s.nbytes for s in stacks(model) if not _made_bytes(s)}
        experts = sum(size for name, size in in_place.items() if "_exps" in name)
        per_token = sum(
            block.experts.expert_bytes * block.router.rule.k_max
            for block in model.layers
            if isinstance(block, MoEBlock) and block.experts.stacks[0].name in in_place
        )
        disk = from_disk(
            files,
            # What is resident already is not counted as available where it is in use.
            capacity=available + (resident or 0),
            experts=experts,
            others=sum(in_place.values()) - experts,
            experts_per_token=per_token,
        )
    return Residency(
        mapped=mapped, resident=resident, converted=converted, available=available, disk=disk
    )


def stacks(model: "Model") -> Iterator[Stack]:
    """Every matrix of a model, as it is set now."""
    for _, holder, name in component_stages(model):
        stage = getattr(holder, name)
        if hasattr(stage, "stacks"):
            yield from stage.stacks
        else:
            for linear in stage.linears.values():
                yield from linear.stacks


def _made_bytes(stack: Stack) -> int:
    """Bytes of a matrix that are not the file's own."""
    files_own = stack.as_loaded and not stack.source.startswith("requantized")
    return (0 if files_own else stack.block_bytes) + sum(stack.operand_bytes.values())
