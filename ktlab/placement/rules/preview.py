"""What a rule file would do to a model, as a table: before anything changes, nothing left out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ktlab import html
from ktlab.experts.banks import layers
from ktlab.placement.grid import cells_of, placement_grid
from ktlab.placement.placement import PHASES, Placement
from ktlab.record import Record

if TYPE_CHECKING:
    import pandas as pd

CHANGES, SAME, MISSING, SHADOWED, NOTHING = (
    "changes", "as it is", "not here", "shadowed", "matches nothing"
)  # fmt: skip
TONES = {CHANGES: "ok", MISSING: "warn", SHADOWED: "warn", NOTHING: "warn"}
HEADERS = ("rule", "modules", "stage", "", "what")
_CUT = 64


@dataclass(frozen=True, kw_only=True)
class Row(Record):
    """What one rule does to modules that are alike."""

    rule: int
    """Its number in the file, from 1."""
    line: int
    replacement: str
    modules: str
    """Names, collapsed by layers."""
    count: int
    stage: str
    status: str
    """changes, as it is, not here, shadowed, or matches nothing."""
    before: str = ""
    after: str = ""
    missing: tuple[str, ...] = ()
    """What the rule asks for and is not done here, with the reason; also where it changes much."""
    note: str = ""
    new_bytes: int = 0
    """Memory that the modules' weights in another format take beside those of the file."""

    @property
    def change(self) -> str:
        """From what to what; "" where nothing is set."""
        return f"{self.before} -> {self.after}" if self.status == CHANGES else ""

    @property
    def what(self) -> str:
        """The change, what is missing, and what is worth knowing."""
        return "; ".join(filter(None, (self.change, *self.missing, self.note)))


@dataclass(frozen=True, kw_only=True, repr=False)
class Preview(Record):
    """The rows in the order of the rules; `changes` and `missing` are the two that matter."""

    source: str
    model: str
    rules: int
    rows: tuple[Row, ...]
    placement: Placement | None = None
    """Where the device words put the model; None where they name what no placement knows."""
    notes: tuple[str, ...] = ()
    """What of the device words a placement cannot say."""

    @property
    def changes(self) -> tuple[Row, ...]:
        """Rows that set something."""
        return tuple(row for row in self.rows if row.status == CHANGES)

    @property
    def missing(self) -> dict[str, tuple[int, ...]]:
        """{what is asked for and not done: rules}."""
        found: dict[str, list[int]] = {}
        for row in self.rows:
            for what in row.missing:
                found.setdefault(what, []).append(row.rule)
        return {what: tuple(dict.fromkeys(rules)) for what, rules in found.items()}

    @property
    def new_bytes(self) -> int:
        """Memory that all weights in another format take."""
        return sum(row.new_bytes for row in self.rows)

    def idle(self, status: str) -> tuple[int, ...]:
        """Numbers of the rules that have a row "matches nothing", or "shadowed"."""
        return tuple(dict.fromkeys(row.rule for row in self.rows if row.status == status))

    @property
    def late(self) -> tuple[int, ...]:
        """Numbers of the rules all of whose modules an earlier one takes."""
        others = {row.rule for row in self.rows if row.status != SHADOWED}
        return tuple(rule for rule in self.idle(SHADOWED) if rule not in others)

    @property
    def summary(self) -> list[str]:
        """Some lines: each kind of change, what is not done, which rules do nothing."""
        lines = [self._title()]
        order = sorted(self.changes, key=lambda row: (row.stage, row.change))
        for (stage, what), rows in groupby(order, key=lambda row: (row.stage, row.change)):
            each = list(rows)
            lines.append(f"{stage}: {what} ({', '.join(row.modules for row in each)})")
        if self.new_bytes:
            lines.append(f"other formats take {html.byte_size(self.new_bytes)} of memory")
        if not self.changes:
            lines.append("nothing changes: the model is computed so already, or cannot be")
        lines += [f"places: {where}" for where in self.places]
        lines += self.notes
        for what, numbers in self.missing.items():
            lines.append(f"{counted('rule', numbers)}: {what}")
        if idle := self.idle(NOTHING):
            lines.append(
                f"{counted('rule', idle)}: {'match' if len(idle) > 1 else 'matches'} nothing"
            )
        if late := self.late:
            come = "come" if len(late) > 1 else "comes"
            lines.append(f"{counted('rule', late)}: {come} too late, earlier ones take all of it")
        return lines

    @property
    def places(self) -> tuple[str, ...]:
        """ "cuda:0: attention, router": each device with its components; nothing but CPU: ()."""
        if self.placement is None or self.placement.devices == ("cpu",):
            return ()
        found: dict[tuple[str, str], dict[str, list[int]]] = {}
        alike = self.placement.decode == self.placement.prefill
        for phase in PHASES[:1] if alike else PHASES:
            for component, layer, ids, device in self.placement.cells(phase):
                if component == "cache":  # where attention is
                    continue
                where = found.setdefault((device, "" if alike else f" in {phase}"), {})
                name = f"some {component}" if ids else component
                where.setdefault(name, []).extend([] if layer is None else [layer])
        return tuple(
            f"{device}{phase}: " + ", ".join(
                f"{name} {layers(at)}" if at else name for name, at in components.items()
            )
            for (device, phase), components in found.items()
        )  # fmt: skip

    def to_frame(self) -> "pd.DataFrame":
        """A row for each line of the table."""
        import pandas as pd

        return pd.DataFrame(
            [{**row.to_dict(), "missing": "; ".join(row.missing)} for row in self.rows]
        )

    def __repr__(self) -> str:
        lines: list[str] = []
        for rule, names, stage, status, what in self._cells():
            about = ", ".join(filter(None, (stage, status)))
            lines += [f"{rule}  {_cut(names)}", f"    {about}: {what}"]
        lines += [*self.places, *self.notes]
        return html.wrapped("\n".join([self._title(), *("  " + line for line in lines)]))

    def _repr_html_(self) -> str:
        body: list[object] = [self.table_html(), self.where_html()]
        if missing := self.missing:
            listed = html.table((counted("rule", at), what) for what, at in missing.items())
            body.append(html.details(f"asked for and not done: {len(missing)}", listed))
        return html.card(self._title(), *body)

    def table_html(self) -> html.Raw:
        """The rules one after the other, with what each does to which modules: in a narrow cell."""
        groups: dict[tuple[int, str, str, str], list[str]] = {}
        for row in self.rows:
            key = (row.rule, row.replacement, row.status, row.what)
            groups.setdefault(key, []).append(row.modules)
        rows = [
            (
                html.Raw(f"{rule}"),
                html.Raw(f"{html.text(becomes)}<br>{html.badge(status, TONES.get(status, ''))}"),
                html.Raw(
                    f'<div style="overflow-wrap:anywhere">{html.text(", ".join(modules))}</div>'
                    f'<div class="s">{html.text(what.replace("->", "→"))}</div>'
                ),
            )
            for (rule, becomes, status, what), modules in groups.items()
        ]
        return html.table(rows, ("rule", "becomes", "modules, and what is done to them"))

    def where_html(self) -> html.Raw:
        """The grid of the placement, where it isn't all on the CPU, and what it cannot say."""
        lines = "".join(f'<div class="s">{html.text(note)}</div>' for note in self.notes)
        if not self.places or self.placement is None:
            return html.Raw(lines)
        return html.Raw(placement_grid(cells_of(self.placement)) + lines)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(repr(self), self._repr_html_())

    def _title(self) -> str:
        count = "1 rule" if self.rules == 1 else f"{self.rules} rules"
        return f"{self.source}: {count} on {self.model}"

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (f"{row.rule} {row.replacement}", row.modules, row.stage, row.status, row.what)
            for row in self.rows
        ]


def _cut(cell: str) -> str:
    return cell if len(cell) <= _CUT else cell[: _CUT - 3] + "..."


def counted(what: str, numbers: Sequence[int]) -> str:
    """ "rule 3", "rules 1-3, 7"."""
    return f"{what}{'s' * (len(numbers) > 1)} {layers(numbers)}"


def collapsed(names: Iterable[str]) -> str:
    """model.layers.1.mlp.gate, model.layers.2.mlp.gate -> model.layers.1-2.mlp.gate.

    Modules beside one another are put in braces: model.layers.0.self_attn.{q_proj,o_proj}.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if part.isdigit())
        shape = ".".join("#" if part.isdigit() else part for part in parts)
        shapes.setdefault(shape, []).append(numbers)
    beside: dict[tuple[str, str], list[str]] = {}
    for shape, places in shapes.items():
        ranges = [
            layers(sorted(set(axis))).replace(", ", ",") for axis in zip(*places, strict=True)
        ]
        above, _, last = shape.rpartition(".")
        if last == "#":
            above, last = shape, ""
        for found in ranges:
            above = above.replace("#", found, 1)
        beside.setdefault((above, "." if last and above else ""), []).append(last)
    return ", ".join(
        above + dot + (lasts[0] if len(lasts) == 1 else "{" + ",".join(lasts) + "}")
        for (above, dot), lasts in beside.items()
    )
