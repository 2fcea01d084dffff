"""What was planned beside what is measured on a loaded model, device by device, kind by kind.

A difference is explained by what the model itself says (experts that nobody asked for, copies made
at first use, other caches), or flagged.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.errors import PlacementError
from ktlab.html import decimal_bytes
from ktlab.model.byte_ledger import DeviceBytes
from ktlab.placement.ledger import Ledger
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
        gap = self.difference
        return gap is None or abs(gap) <= max(SMALL, NEAR * self.planned)


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
        real = next((d for d in found.devices if d.device == one.device), None)
        if real is not None:
            compare = _host if one.device == "cpu" else _device
            rows += compare(plan, model, one, real)
    return PlanMeasured(
        model=plan.model, rows=tuple(rows), notes=tuple(_notes(plan, found.devices))
    )


def _notes(plan: "Plan", devices: tuple[DeviceBytes, ...]) -> Iterator[str]:
    for one in devices:
        yield from (f"{one.device}: {note}" for note in one.notes)
    if any(one.device == "disk" for one in plan.ledgers):
        yield "disk: what stays there takes no memory between two uses"


def _host(plan: "Plan", model: "Model", one: Ledger, real: DeviceBytes) -> Iterator[Beside]:
    gap = real.weights - one.weights
    moved = sum(r.part.bytes for r in plan.rows if kind_of(r.device) in ("cuda", "disk"))
    nodes = sum(d.weights + d.converted for d in plan.ledgers if d.device.startswith("numa:"))
    why, explained = "", True
    if gap < 0:
        why = "mapped, and not in memory before somebody asks for it"
    elif gap <= moved + nodes:
        why = "file pages of what is elsewhere now; the system may drop them"
    else:
        explained = False
        why = "more of the files is in memory than the plan has anywhere; loaded more than once?"
    yield Beside(
        device="cpu", kind="weights", planned=one.weights, measured=real.weights, why=why,
        explained=explained,
    )  # fmt: skip
    extra = real.converted - one.converted
    layouts = {name: n for name, n in real.formats.items() if _made(name)}
    if extra > 0:
        made = ", ".join(f"{name} {decimal_bytes(n)}" for name, n in layouts.items())
        why = f"copies that kernels made: {made}" if made else "nothing says what was converted"
    else:
        why = "float32 copies are made at the first long prompt"
    yield Beside(
        device="cpu", kind="converted", planned=one.converted, measured=real.converted, why=why,
        explained=extra <= sum(layouts.values()),
    )  # fmt: skip
    yield Beside(
        device="cpu", kind="copies", planned=one.copies + nodes, measured=real.copies,
        why="packed rows are padded to whole panels" if real.copies else "",
        explained=real.copies <= 1.5 * (one.copies + nodes),
    )  # fmt: skip
    yield from _cache(plan, model, one, real)
    there = sum(d.known for d in model.ledger().devices if d.measured_by.endswith("stand-in"))
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


def _cache(plan: "Plan", model: "Model", one: Ledger, real: DeviceBytes) -> Iterator[Beside]:
    alive = [cache.context * cache.batch for cache in list(model.caches)]
    words = f"{len(alive)} alive, of {sum(alive):,} positions; planned {plan.context:,}"
    yield Beside(device=one.device, kind="cache", planned=one.cache, measured=real.cache, why=words)


def _device(plan: "Plan", model: "Model", one: Ledger, real: DeviceBytes) -> Iterator[Beside]:
    planned, found = one.weights + one.converted, real.weights + real.converted + real.copies
    formats = ", ".join(f"{name} {decimal_bytes(n)}" for name, n in real.formats.items())
    planned_formats = "+".join(
        dict.fromkeys(f for r in plan.rows if r.device == one.device for f in r.formats)
    )
    near = abs(found - planned) <= max(SMALL, NEAR * planned)
    other = not set(real.formats) & set(planned_formats.split("+"))
    yield Beside(
        device=one.device, kind="weights", planned=planned, measured=found,
        why="" if near else f"planned as {planned_formats}, there as {formats}",
        explained=near or real.copies > 0 or other,
    )  # fmt: skip
    if kind_of(one.device) == "cuda":
        yield from _cache(plan, model, one, real)
        yield Beside(
            device=one.device, kind="activations, runtime",
            planned=one.activations + one.runtime, measured=real.rest,
            why="a context's own memory is not torch's, and activations come and go",
            explained=(real.rest or 0) <= one.activations + one.runtime,
        )  # fmt: skip
