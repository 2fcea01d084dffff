"""What was planned beside what is measured on a loaded model, device by device, kind by kind.

A difference is explained by what the model itself says (experts that nobody asked for, copies made
at first use, other caches), or flagged.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.errors import PlacementError
from ktlab.experts.placed_bank import PlacedBank
from ktlab.html import decimal_bytes
from ktlab.kernels import packing
from ktlab.kernels.seat import DTYPES, HOST, INT4
from ktlab.model.byte_ledger import INT4_ZEROS, NOT_MATRICES, ByteLedger, DeviceBytes
from ktlab.placement.ledger import ELEMENT_BYTES, Ledger
from ktlab.placement.placed import Placed
from ktlab.placement.placement import Placement, kind_of
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model
    from ktlab.placement.plan import Plan

NEAR = 0.05
SMALL = 2_000_000
"""A difference of no more than this share, or than these bytes, needs no words."""
OTHERS = ("IPython", "pandas", "plotly", "numba", "pytest")
OTHERS_BYTES = 400_000_000
"""What these may add to a process together; the plan's runtime is Python, torch and the kernels."""
WEIGHT_BYTES = {name: (dtype.itemsize, dtype.itemsize) for name, dtype in DTYPES.items()} | {
    INT4: (66 / 128, 18 / 32),
    INT4_ZEROS: (math.inf, math.inf),
    NOT_MATRICES: (4, 4),
}
"""A weight on a device takes at least, and at most: a scale of 2 bytes for 128 codes, or for 32."""


@dataclass(frozen=True, kw_only=True)
class Beside(Record):
    """One kind of bytes on one device."""

    device: str
    kind: str
    planned: int
    measured: int | None
    why: str = ""
    """What explains the difference; "" where there is none to speak of."""
    explained: bool = True

    @property
    def difference(self) -> int | None:
        """Measured less planned."""
        return None if self.measured is None else self.measured - self.planned

    @property
    def near(self) -> bool:
        """Whether nothing has to be explained."""
        return self.measured is None or _near(self.measured, self.planned)


@dataclass(frozen=True, kw_only=True)
class PlanMeasured(Record):
    """A plan beside its model."""

    model: str
    rows: tuple[Beside, ...]
    notes: tuple[str, ...] = ()

    @property
    def flagged(self) -> tuple[Beside, ...]:
        """Differences that nothing explains."""
        return tuple(row for row in self.rows if not row.near and not row.explained)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each kind and device."""
        import pandas as pd

        return pd.DataFrame([{**r.to_dict(), "difference": r.difference} for r in self.rows])

    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (
                row.device,
                row.kind,
                decimal_bytes(row.planned),
                "unknown" if row.measured is None else decimal_bytes(row.measured),
                "" if row.difference is None or row.near else _signed(row.difference),
                row.why if row.explained else f"not explained: {row.why}",
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        rows = [("device", "kind", "planned", "measured", "difference", ""), *self._lines()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        head = f"{self.model}: bytes planned and measured"
        return "\n".join([head, *lines, *(f"  {note}" for note in self.notes)])

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        headers = ("device", "kind", "planned", "measured", "difference", "why")
        flags = len(self.flagged)
        badge = (
            html.badge(f"{flags} unexplained", "bad") if flags else html.badge("explained", "ok")
        )
        notes = [html.Raw(f'<div class="s">{html.text(note)}</div>') for note in self.notes]
        table = html.table(self._lines(), headers)
        title = f"{self.model}: bytes planned and measured"
        return html.mimebundle(str(self), html.card(title, badge, table, *notes))


def _near(found: float, expected: float) -> bool:
    return abs(found - expected) <= max(SMALL, NEAR * expected)


def _signed(count: int) -> str:
    return f"{'+' if count > 0 else '-'}{decimal_bytes(abs(count))}"


def measured(plan: "Plan", model: "Model") -> PlanMeasured:
    """Measure `model`, which must be placed as `plan` says; PlacementError where it is not."""
    here = (
        Placement.everywhere(model.config, "cpu")
        if model.placement is None
        else model.placement.placement
    )
    plan.placement.check(model.config)
    if not (moved := here.diff(plan.placement)).empty:
        first = moved.iloc[0]
        raise PlacementError(
            f"{model.name} is not placed as planned: {len(moved)} differences, such as "
            f"{first.component} on {first.device_a}, planned on {first.device_b}; "
            "model.place(plan) first"
        )
    found = model.ledger()
    rows: list[Beside] = []
    for one in plan.ledgers:
        if any(one.device == there.device for there in found.devices):
            compare = {"cpu": _host, "numa": _node, "cuda": _device}[one.device.partition(":")[0]]
            rows += compare(plan, model, one, found)
    return PlanMeasured(
        model=plan.model, rows=tuple(rows), notes=tuple(_notes(plan, found.devices))
    )


def _notes(plan: "Plan", devices: tuple[DeviceBytes, ...]) -> Iterator[str]:
    for one in devices:
        yield from (f"{one.device}: {note}" for note in one.notes)
    if any(one.device == "disk" for one in plan.ledgers):
        yield "disk: what stays there takes no memory between two uses"


def _host(plan: "Plan", model: "Model", one: Ledger, found: ByteLedger) -> Iterator[Beside]:
    real, sets = found[one.device], _first_set(plan, model)
    weights = one.weights - sum(row.in_place for row in sets)
    gap = real.weights - weights
    moved = sum(r.part.bytes for r in plan.rows if kind_of(r.device) in ("cuda", "disk"))
    nodes = sum(d.weights + d.converted for d in plan.ledgers if d.device.startswith("numa:"))
    nodes += one.weights - weights
    why, explained = "", True
    if gap < 0:
        why = "mapped, and not in memory before somebody asks for it"
    elif gap <= moved + nodes:
        why = "file pages of what is elsewhere now; the system may drop them"
    else:
        explained = False
        why = "more of the files is in memory than the plan has anywhere; loaded more than once?"
    yield Beside(
        device="cpu", kind="weights", planned=weights, measured=real.weights, why=why,
        explained=explained,
    )  # fmt: skip
    converted = one.converted - sum(row.converted for row in sets)
    extra = real.converted - converted
    layouts = {name: n for name, n in real.formats.items() if _made(name)}
    if extra > 0:
        made = ", ".join(f"{name} {decimal_bytes(n)}" for name, n in layouts.items())
        why = f"copies that kernels made: {made}" if made else "nothing says what was converted"
    else:
        why = "float32 copies are made at the first long prompt"
    yield Beside(
        device="cpu", kind="converted", planned=converted, measured=real.converted, why=why,
        explained=extra <= sum(layouts.values()),
    )  # fmt: skip
    yield _copies(plan, model, one, real)
    yield _cache(plan, model, one, real)
    there = sum(d.known for d in found.devices if d.measured_by.endswith("stand-in"))
    rest = None if real.rest is None else real.rest - there
    known = one.activations + one.runtime
    above = 0 if rest is None else rest - known
    others = ", ".join(name for name in OTHERS if name in sys.modules)
    why = "planned for the longest call at the whole context"
    if above > 0:
        why = f"this process has more in it: {others}" if others else "nothing else is known of"
    yield Beside(
        device="cpu",
        kind="activations, runtime",
        planned=known,
        measured=rest,
        why=why,
        explained=above <= (OTHERS_BYTES if others else 0),
    )


def _made(layout: str) -> bool:
    return layout.endswith("packed") or layout in ("float32", "bfloat16")


def _first_set(plan: "Plan", model: "Model") -> list[Placed]:
    """Experts that nodes share: a plan has the first set of them as the host's weights, the model
    has each set in the nodes' memories, beside the mapped file."""
    if all(bank.team is None for bank in _on_nodes(model)):
        return []
    return [r for r in plan.rows if r.device == "cpu" and r.part.component == "experts"]


def _copies(plan: "Plan", model: "Model", one: Ledger, real: DeviceBytes) -> Beside:
    banks = _on_nodes(model)
    first = sum(row.bytes for row in _first_set(plan, model))
    planned = one.copies + first
    planned += sum(_experts(plan, d.device) for d in plan.ledgers if d.device.startswith("numa:"))
    team = next((bank.team for bank in banks if bank.team is not None), None)
    sets = len(team.parts) if team is not None and team.mode == "copy" else 1
    how = "without nodes=" if team is None else f"with nodes={team.mode!r}"
    why = "packed, beside the mapped file" if banks else ""
    why += f"; the plan's ledger has {decimal_bytes(first)} of them as weights" if first else ""
    if sets != plan.numa_copies:
        why = f"planned as numa_copies={plan.numa_copies}; placed {how}, which makes {sets}"
    return Beside(
        device="cpu", kind="copies", planned=planned, measured=real.copies, why=why,
        explained=_near(real.copies, _grown(banks) * planned),
    )  # fmt: skip


def _on_nodes(model: "Model") -> list[PlacedBank]:
    banks = [block.experts for block in model.moe_blocks]
    return [bank for bank in banks if isinstance(bank, PlacedBank) and bank.node_parts]


def _experts(plan: "Plan", device: str) -> int:
    """Bytes of routed experts that are planned on a device."""
    rows = (row for row in plan.rows if row.device == device)
    return sum(row.bytes for row in rows if row.part.component == "experts")


def _grown(banks: list[PlacedBank]) -> float:
    """What experts take packed, over what they take in the file: some formats pack wider codes."""
    stacks = [stack for bank in banks for stack in bank.stacks]
    packed = sum(packing.packed_size(stack.format.name, stack.matrices) for stack in stacks)
    return packed / sum(stack.nbytes for stack in stacks) if stacks else 1.0


def _cache(plan: "Plan", model: "Model", one: Ledger, real: DeviceBytes) -> Beside:
    """Caches that are alive take what the planned one does, by their positions, forms and numbers.
    Those of attention on NUMA nodes are counted with the host's, as in the model's ledger."""
    kind, seat = kind_of(one.device), model.seats.get(one.device, HOST)
    ledgers = [d for d in plan.ledgers if d is one or "cpu" == kind == kind_of(d.device)]
    planned, names = sum(d.cache for d in ledgers), {d.device for d in ledgers}
    layers = sum(row.device in names for row in plan.rows if row.part.component == "cache")
    each, alive = model.config.attention.cache_elements, list(model.caches)
    there = sum(
        cache.context * cache.batch * each[layer.form] * layer.keys.element_size()
        for cache in alive
        for layer in cache.layers
        if layer.seat is seat
    )
    one_cache = layers * plan.context * each[plan.attention] * ELEMENT_BYTES[kind]
    positions = sum(cache.context * cache.batch for cache in alive)
    why = f"{len(alive)} alive, of {positions:,} positions; planned {plan.context:,}"
    forms = "+".join({layer.form: None for cache in alive for layer in cache.layers})
    if forms not in ("", plan.attention):
        why += f", {forms} where {plan.attention} is planned"
    return Beside(
        device=one.device, kind="cache", planned=planned, measured=real.cache, why=why,
        explained=_near(real.cache, planned * there / one_cache if one_cache else 0),
    )  # fmt: skip


def _node(plan: "Plan", model: "Model", one: Ledger, found: ByteLedger) -> Iterator[Beside]:
    """Experts that are planned on a node by name, and its share of those that all nodes share."""
    real, planned = found[one.device], one.weights + one.converted
    banks = _on_nodes(model)
    teams = [bank.team for bank in banks if bank.team is not None]
    parts = [part for team in teams for part in team.parts if f"numa:{part.node}" == one.device]
    share = sum(part.nbytes for part in parts)
    here = _experts(plan, one.device)
    words = ["packed beside the mapped file, whose pages the system may drop"]
    if parts:
        words.append(f"{decimal_bytes(share)} are a share of nodes={teams[0].mode!r}")
    if planned > here:
        words.append(f"{decimal_bytes(planned - here)} that are no experts are counted with cpu")
    yield Beside(
        device=one.device, kind="weights", planned=planned, measured=real.copies,
        why="; ".join(words), explained=_near(real.copies - share, _grown(banks) * here),
    )  # fmt: skip


def _device(plan: "Plan", model: "Model", one: Ledger, found: ByteLedger) -> Iterator[Beside]:
    real, planned = found[one.device], one.weights + one.converted
    zeros, here = real.formats.get(INT4_ZEROS, 0), real.weights + real.converted + real.copies
    words = []
    if zeros:
        words.append(
            f"torch packs a zero beside each scale of 4 bits, {decimal_bytes(zeros)}: 4.25 bits a "
            "weight in groups of 128, where int4_group128 has 4.125"
        )
    explained = _near(here - zeros, planned)
    if not explained:
        formats = ", ".join(f"{name} {decimal_bytes(n)}" for name, n in real.formats.items())
        rows = [row for row in plan.rows if row.device == one.device]
        planned_formats = "+".join(dict.fromkeys(f for row in rows for f in row.formats))
        words.insert(0, f"planned as {planned_formats}, there as {formats}")
        # Another format explains it where it makes as many bytes of as many weights.
        most, least = (
            sum(n / WEIGHT_BYTES[name][i] for name, n in real.formats.items()) for i in (0, 1)
        )
        explained = (1 - NEAR) * least <= _weights(plan, one.device) <= (1 + NEAR) * most
    yield Beside(
        device=one.device, kind="weights", planned=planned, measured=here, why="; ".join(words),
        explained=explained,
    )  # fmt: skip
    yield _cache(plan, model, one, real)
    yield Beside(
        device=one.device, kind="activations, runtime",
        planned=one.activations + one.runtime, measured=real.rest,
        why="a context's own memory is not torch's, and activations come and go",
        explained=(real.rest or 0) <= one.activations + one.runtime,
    )  # fmt: skip


def _weights(plan: "Plan", device: str) -> int:
    """How many are planned on a device; an output that is the embedding has the embedding's."""
    embedding = sum(r.part.parameters for r in plan.rows if r.part.component == "embedding")
    rows = [row for row in plan.rows if row.device == device and row.part.component != "cache"]
    tied = [row for row in rows if row.bytes and not row.part.parameters]
    return sum(row.part.parameters for row in rows) + embedding * len(tied)
