"""Every byte of a loaded model on each device, measured: what it is for, and what the system says.

Host memory is the process's resident set; a GPU's is what torch's allocator has given out; of a
stand-in, which lies in host memory, the tensors that were put there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ktlab import html
from ktlab.checkpoint.facts import model_files
from ktlab.experts.placed_bank import PlacedBank
from ktlab.html import decimal_bytes
from ktlab.kernels.device_linear import DeviceLinear
from ktlab.kernels.int4 import PackedInt4, Values
from ktlab.kernels.seat import DTYPES, INT4, TorchSeat
from ktlab.kernels.stack import Stack
from ktlab.memory import node_bytes, process_memory, resident_bytes
from ktlab.model.components import component_stages
from ktlab.model.residency import stacks
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model

KINDS = ("weights", "converted", "copies", "cache")
"""As in a plan; what else the system counts is `DeviceBytes.rest`."""
INT4_ZEROS, NOT_MATRICES = "zeros of int4", "norms and others"
"""In `DeviceBytes.formats`, beside number formats: torch's 4 bits have a zero beside each scale."""


@dataclass(frozen=True, kw_only=True)
class DeviceBytes(Record):
    """One device, now."""

    device: str
    weights: int
    """On the host: of the model's files, in memory now, and tensors that came without a file."""
    converted: int
    """Made of them: requantized, packed, float32; on a GPU all weights are."""
    copies: int
    """Experts in the memories of NUMA nodes, beside the weights that they were made of."""
    cache: int
    """Of all caches that are alive, for their whole context."""
    formats: Mapping[str, int]
    """`weights` and `converted` by format and layout."""
    total: int | None
    """What the system says is taken; None where it does not say."""
    measured_by: str
    notes: tuple[str, ...] = ()

    @property
    def known(self) -> int:
        """What is accounted for."""
        return self.weights + self.converted + self.copies + self.cache

    @property
    def rest(self) -> int | None:
        """What the system counts besides: runtime, activations, what allocators keep."""
        return None if self.total is None else self.total - self.known


@dataclass(frozen=True, kw_only=True)
class ByteLedger(Record):
    """All devices of a model, now. `Plan.measured(model)` puts it beside what was planned."""

    model: str
    devices: tuple[DeviceBytes, ...]

    def __getitem__(self, device: str) -> DeviceBytes:
        """One device; KeyError with those that there are."""
        for one in self.devices:
            if one.device == device:
                return one
        raise KeyError(f"{device}: there are {', '.join(one.device for one in self.devices)}")

    def to_frame(self) -> "pd.DataFrame":
        """One row a device."""
        import pandas as pd

        return pd.DataFrame([{**one.to_dict(), "rest": one.rest} for one in self.devices])

    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (
                one.device,
                *(decimal_bytes(n) if (n := getattr(one, kind)) else "" for kind in KINDS),
                "" if one.rest is None else decimal_bytes(one.rest),
                "" if one.total is None else decimal_bytes(one.total),
                one.measured_by,
            )
            for one in self.devices
        ]

    def __str__(self) -> str:
        rows = [("device", *KINDS, "rest", "total", "total is"), *self._lines()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"Bytes of {self.model}, measured"]
        lines += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"  {one.device}: {note}" for one in self.devices for note in one.notes]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        table = html.table(self._lines(), ("device", *KINDS, "rest", "total", "total is"))
        notes = [html.Raw(f"<div>{html.text(f'{one.device}: {n}')}</div>")
                 for one in self.devices for n in one.notes]  # fmt: skip
        return html.mimebundle(
            str(self), html.card(f"Bytes of {self.model}, measured", table, *notes)
        )


def byte_ledger(model: "Model") -> ByteLedger:
    """Count and measure now."""
    nodes: dict[str, list[Any]] = {}
    for block in model.moe_blocks:
        if isinstance(block.experts, PlacedBank):
            for word, part in block.experts.node_parts:
                nodes.setdefault(word, []).append(part)
    copies = sum(part.nbytes for parts in nodes.values() for part in parts)
    devices = [_host(model, copies)]
    devices += [_node(word, parts) for word, parts in sorted(nodes.items())]
    devices += [_device(model, seat) for seat in model.seats.values()]
    return ByteLedger(model=model.name, devices=tuple(devices))


def _host(model: "Model", copies: int) -> DeviceBytes:
    formats: Counter[str] = Counter()
    converted, loose = 0, 0
    path = model.checkpoint.path
    files = () if path is None else model_files(path)
    for stack in _every_stack(model):
        made = sum(stack.operand_bytes.values())
        for layout, nbytes in stack.operand_bytes.items():
            formats[f"{stack.format.name} {layout}" if layout == "packed" else layout] += nbytes
        if not _as_in_file(stack):
            made += stack.block_bytes
        elif not files:
            loose += stack.block_bytes
        formats[stack.format.name] += stack.block_bytes
        converted += made
    resident = resident_bytes(files) if files else 0
    total = process_memory()
    there = {id(seat): seat for seat in model.seats.values() if seat.stand_in}
    notes = []
    if there:
        size = sum(sum(seat.here_bytes.values()) for seat in there.values())
        notes.append(f"{decimal_bytes(size)} of the rest are tensors of stand-ins, counted there")
    if copy := host_copy_words(*_host_copy(model, mapped=bool(files))):
        notes.append(copy)
    return DeviceBytes(
        device="cpu",
        weights=(resident or 0) + loose,
        converted=converted,
        copies=copies,
        cache=_cache_bytes(model, None),
        formats=dict(formats),
        total=total,
        measured_by="resident set of the process",
        notes=tuple(notes),
    )


def _every_stack(model: "Model") -> list[Stack]:
    """Each matrix once, and requantized copies that are kept for a toggle back."""
    found = {id(stack): stack for stack in stacks(model)}
    for block in model.moe_blocks:
        kept = [s for some in block.experts._requantized.values() for s in some]
        for stack in [*block.experts._stored, *kept]:
            found[id(stack)] = stack
    return list(found.values())


def _as_in_file(stack: Stack) -> bool:
    """Whether its blocks are the checkpoint's own, not requantized while loading or later."""
    return stack.as_loaded and not stack.source.startswith("requantized")


def _host_copy(model: "Model", *, mapped: bool) -> tuple[int, int]:
    """Bytes of experts that the host has and does not compute with, NUMA nodes' among them: of the
    mapped file, and made."""
    in_file = made = 0.0
    for block in model.moe_blocks:
        bank = block.experts
        if not isinstance(bank, PlacedBank):
            continue
        own = {"disk"} if bank.team is not None else {"cpu", "disk"}
        away = sum(own.isdisjoint(words) for words in zip(*bank.where.values(), strict=True))
        for stack in bank.stacks:
            share = away / bank.num_experts
            made += sum(stack.operand_bytes.values()) * share
            if mapped and _as_in_file(stack):
                in_file += stack.block_bytes * share
            else:
                made += stack.block_bytes * share
    return round(in_file), round(made)


def host_copy_words(in_file: int, made: int) -> str:
    """What a plan and a ledger say of host memory that experts on devices have still."""
    words = [f"{decimal_bytes(in_file)} of the mapped file, in memory where it was touched, which "
             "the system may drop"] if in_file else []  # fmt: skip
    words += [f"{decimal_bytes(made)} made of it, which stay"] if made else []
    return f"host copy of experts that are on devices: {'; '.join(words)}" if words else ""


def _cache_bytes(model: "Model", seat: TorchSeat | None) -> int:
    return sum(
        layer.nbytes
        for cache in list(model.caches)
        for layer in cache.layers
        if (layer.seat is seat if seat is not None else layer.seat.host)
    )


def _node(word: str, parts: list[Any]) -> DeviceBytes:
    size = sum(part.nbytes for part in parts)
    node = int(word.partition(":")[2])
    found = node_bytes([array for part in parts for array in part.arrays])
    notes = () if found is None else (
        "by node: " + ", ".join(f"numa:{n} {decimal_bytes(b)}" for n, b in sorted(found.items())),
    )  # fmt: skip
    return DeviceBytes(
        device=word,
        weights=0,
        converted=0,
        copies=size,
        cache=0,
        formats={f"{part.kernel.layout}": size for part in parts[:1]},
        total=None if found is None else found.get(node, 0),
        measured_by="where the kernel says the pages of these copies are (move_pages)"
        if found is not None
        else "the system does not say where pages are",
        notes=notes,
    )


def _device(model: "Model", seat: TorchSeat) -> DeviceBytes:
    formats: Counter[str] = Counter()
    for values in _matrices(model, seat):
        zeros = values.scales.nbytes // 2 if isinstance(values, PackedInt4) else 0
        formats[_format(values)] += values.nbytes - zeros
        formats[INT4_ZEROS] += zeros
    here = seat.here_bytes
    formats[NOT_MATRICES] = here.get("weights", 0) - sum(formats.values())
    by = "the tensors of the stand-in" if seat.stand_in else "torch's CUDA allocator"
    return DeviceBytes(
        device=seat.word,
        weights=0,
        converted=here.get("weights", 0),
        copies=0,
        cache=_cache_bytes(model, seat),
        formats={name: n for name, n in formats.items() if n},
        total=seat.allocated_bytes,
        measured_by=by,
    )


def _matrices(model: "Model", seat: TorchSeat) -> Iterator[Values]:
    """All that is multiplied, or looked up, on a device."""
    linears: list[Any] = [model.embedding_table]
    linears += [getattr(block.router, "gate", None) for block in model.moe_blocks]
    for _, holder, name in component_stages(model):
        stage = getattr(holder, name)
        linears += getattr(stage, "linears", {"": stage}).values()
        if isinstance(stage, PlacedBank):
            for matrices in stage.residents.get(seat.word, {}).values():
                yield from matrices
    for linear in linears:
        if isinstance(linear, DeviceLinear) and linear.seat is seat:
            yield linear.values


def _format(values: Values) -> str:
    """In which format a matrix is on a device: not all are in the seat's."""
    if not isinstance(values, Tensor):
        return INT4
    return next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
