"""What a plan shows of itself: text, HTML, rows for tables, a figure. Pure functions."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab import figures, html
from ktlab.html import decimal_bytes
from ktlab.placement.grid import Share, placement_grid
from ktlab.placement.ledger import KINDS, Ledger
from ktlab.placement.placed import Placed
from ktlab.placement.placement import PHASES

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.placement.plan import Plan

TONES = {True: "ok", False: "bad", None: ""}
WORDS = {True: "fits", False: "does not fit", None: "no limit given"}


@dataclass(frozen=True, kw_only=True)
class Total:
    """The layers of one component added up."""

    component: str
    devices: tuple[str, ...]
    stored: tuple[str, ...]
    formats: tuple[str, ...]
    parameters: int
    bytes: int
    flop_per_token: float
    bytes_per_token: float

    @property
    def intensity(self) -> float:
        """FLOP per byte that a token reads."""
        return self.flop_per_token / self.bytes_per_token if self.bytes_per_token else 0.0

    @property
    def use(self) -> float:
        """FLOP of a token per number stored."""
        return self.flop_per_token / self.parameters if self.parameters else 0.0


def totals(rows: Iterable[Placed]) -> dict[str, Total]:
    """{component: its layers added up}."""
    groups: dict[str, list[Placed]] = {}
    for row in rows:
        groups.setdefault(row.part.component, []).append(row)
    return {name: _total(name, members) for name, members in groups.items()}


def _total(component: str, rows: list[Placed]) -> Total:
    return Total(
        component=component,
        devices=tuple(dict.fromkeys(row.device for row in rows)),
        stored=_largest_first(
            (format, row.part.bytes) for row in rows for format in row.part.formats
        ),
        formats=_largest_first((format, row.bytes) for row in rows for format in row.formats),
        parameters=sum(row.part.parameters for row in rows),
        bytes=sum(row.bytes for row in rows),
        flop_per_token=sum(row.part.flop_per_token for row in rows),
        bytes_per_token=sum(row.part.bytes_per_token for row in rows),
    )


def _largest_first(sizes: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    found: dict[str, int] = {}
    for name, size in sizes:
        found[name] = found.get(name, 0) + size
    return tuple(sorted(found, key=lambda name: -found[name]))


def record(row: Placed) -> dict[str, Any]:
    """One row of the table."""
    part = row.part
    return {
        "layer": part.layer,
        "component": part.component,
        "device": row.device,
        "phases": "+".join(row.phases),
        "experts": row.experts,
        "stored": "+".join(part.formats),
        "format": "+".join(row.formats),
        "parameters": part.parameters,
        "stored_bytes": part.bytes,
        "bytes": row.bytes,
        "in_place": row.in_place,
        "converted": row.converted,
        "flop_per_token": part.flop_per_token,
        "bytes_per_token": part.bytes_per_token,
        "intensity": part.intensity,
        "use": part.use,
    }


HEADERS = (
    "component",
    "where",
    "stored",
    "as",
    "bytes",
    "FLOP/token",
    "bytes/token",
    "FLOP/byte",
    "FLOP/number",
)
NARROW_HEADERS = (*HEADERS[:3], *HEADERS[4:8])
"""Of a terminal, which has 80 columns: what is made anew is said in a line below."""


AS_STORED = "as stored"


def _component_lines(plan: "Plan") -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for name, total in plan.by_component().items():
        stored, formats = "+".join(total.stored), "+".join(total.formats)
        lines.append(
            (
                name,
                "+".join(total.devices),
                stored,
                formats if formats != stored else AS_STORED,
                decimal_bytes(total.bytes),
                html.quantity(total.flop_per_token),
                decimal_bytes(total.bytes_per_token),
                f"{total.intensity:.3g}",
                f"{total.use:.3g}",
            )
        )
    return lines


def _ledger_lines(ledgers: Iterable[Ledger]) -> list[tuple[str, ...]]:
    return [
        (
            one.device,
            *(decimal_bytes(getattr(one, kind)) if getattr(one, kind) else "" for kind in KINDS),
            decimal_bytes(one.needed),
            "" if one.capacity is None else decimal_bytes(one.capacity),
            "" if one.headroom is None else decimal_bytes(one.headroom),
        )
        for one in ledgers
    ]


LEDGER_HEADERS = ("device", *KINDS, "needed", "capacity", "headroom")


def _by_kind(ledgers: Iterable[Ledger]) -> list[tuple[str, ...]]:
    """A device is a column: its kinds of bytes are more than fit side by side."""
    kinds = zip(LEDGER_HEADERS, *_ledger_lines(ledgers), strict=True)
    return [row for row in kinds if any(row[1:])]


def _head(plan: "Plan") -> str:
    return (
        f"{plan.model}: {html.quantity(plan.parameters)} parameters, "
        f"{html.quantity(plan.active_parameters)} a token, {decimal_bytes(plan.stored_bytes)}"
    )


def _context_line(plan: "Plan") -> str:
    caches = ", ".join(f"{form} {decimal_bytes(size)}" for form, size in plan.cache_bytes.items())
    return f"context {plan.context:,} ({plan.attention}); cache {caches}"


def text(plan: "Plan") -> str:
    """As a terminal shows it."""
    lines = [f"Plan of {_head(plan)}", f"  from {plan.source}", f"  on {plan.machine}"]
    lines += [f"  {_context_line(plan)}", ""]
    components = _component_lines(plan)
    narrow = [(*row[:3], *row[4:8]) for row in components]
    lines += _columns([NARROW_HEADERS, *narrow], left=3)
    anew: dict[str, list[str]] = {}
    for name, _, _, formats, *_ in components:
        if formats != AS_STORED:
            anew.setdefault(formats, []).append(name)
    said = "; ".join(f"{', '.join(names)} as {formats}" for formats, names in anew.items())
    lines += [f"  made anew: {said}"] if said else []
    lines.append("")
    lines += _columns(_by_kind(plan.ledgers), left=1) + [""]
    return html.wrapped("\n".join([*lines, *plan.verdict]))


def _columns(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Aligned columns; the first `left` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bundle(plan: "Plan") -> dict[str, Any]:
    """Text and HTML."""
    badges = [
        html.badge(f"{one.device} {WORDS[one.fits]}", TONES[one.fits]) for one in plan.ledgers
    ]
    facts = {"from": plan.source, "on": str(plan.machine), "at": _context_line(plan)}
    verdict = html.Raw("".join(f"<div>{html.text(line)}</div>" for line in plan.verdict))
    by_kind = _by_kind(plan.ledgers)
    components = [[_breaking(cell) for cell in row] for row in (HEADERS, *_component_lines(plan))]
    body = html.card(
        f"Plan of {_head(plan)}",
        html.Raw("".join(badges)),
        html.pairs(facts),
        verdict,
        html.table(by_kind[1:], by_kind[0]),
        html.table(components[1:], components[0]),
        grid(plan),
    )
    return html.mimebundle(str(plan), body)


def _breaking(cell: str) -> str:
    """A sum of formats, a long format, a quotient in a header: they may go on in the next line."""
    broken = re.sub(r"([+/]|_(?=group))", r"\1<wbr>", html.text(cell))
    return cell if broken == cell else html.Raw(broken)


def grid(plan: "Plan") -> html.Raw:
    """Component by layer, coloured by device; the details of a cell on hovering."""
    cells: dict[tuple[str, int | None], list[Share]] = {}
    for row in plan.rows:
        about = f"{'+'.join(row.formats)}, {decimal_bytes(row.bytes)}"
        share = Share(
            device=row.device,
            share=row.share,
            experts=row.experts,
            phases=row.phases,
            about=about,
        )
        cells.setdefault((row.part.component, row.part.layer), []).append(share)
    return placement_grid(cells)


def plot(plan: "Plan") -> "Figure":
    """Bytes of each device by what they are for: weights by component, then the rest."""
    devices: dict[str, Mapping[str, float]] = {}
    for one in plan.ledgers:
        kinds: dict[str, float] = {}
        for name, total in plan.by_component().items():
            size = sum(
                r.bytes for r in plan.rows if r.part.component == name and r.device == one.device
            )
            if size and total:
                kinds[name] = size
        if one.copies:
            kinds["experts, further NUMA copies"] = one.copies
        kinds["activations"], kinds["runtime"] = one.activations, one.runtime
        devices[one.device] = kinds
    limits = {one.device: one.capacity for one in plan.ledgers}
    return figures.memory_bars(devices, limits, title=f"{plan.model}, context {plan.context:,}")


def _where(rows: list[Placed]) -> str | None:
    """ "cpu", or "cpu: 0-7, cuda:0: 8-63 (decode)" where a part is divided."""
    if not rows:
        return None
    found = []
    for row in rows:
        experts = f": {row.experts}" if row.experts else ""
        phases = f" ({row.phases[0]})" if row.phases != PHASES else ""
        found.append(f"{row.device}{experts}{phases}")
    return ", ".join(found)


def diff(plan: "Plan", other: "Plan") -> "pd.DataFrame":
    """Rows of `other` that differ, beside what they are in `plan`."""
    import pandas as pd

    def parts(plan: "Plan") -> dict[tuple[int | None, str], list[Placed]]:
        found: dict[tuple[int | None, str], list[Placed]] = {}
        for row in plan.rows:
            found.setdefault((row.part.layer, row.part.component), []).append(row)
        return found

    ours, theirs = parts(plan), parts(other)
    found = []
    for place in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(place, []), theirs.get(place, [])
        if a == b:
            continue
        line: dict[str, Any] = {"layer": place[0], "component": place[1]}
        for side, rows in (("a", a), ("b", b)):
            line[f"device_{side}"] = _where(rows)
            formats = dict.fromkeys(f for row in rows for f in row.formats)
            line[f"format_{side}"] = "+".join(formats) if rows else None
            line[f"bytes_{side}"] = sum(row.bytes for row in rows)
        found.append(line)
    columns = ["layer", "component"]
    columns += [f"{what}_{side}" for side in "ab" for what in ("device", "format", "bytes")]
    return pd.DataFrame(found, columns=columns)
