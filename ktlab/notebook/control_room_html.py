"""Pieces that the panels of the control room share: pure functions from values to HTML.

Every number carries a title= that says how it was measured and which expression returns it.
"""

from dataclasses import replace
from typing import Any

from ktlab import html
from ktlab.html import Raw, byte_size, text
from ktlab.interval import Interval
from ktlab.model.model import Model
from ktlab.notebook.control_room_choice import ALL, OWN
from ktlab.notebook.control_room_results import Results

EMPTY = Raw('<span class="cr-none">…</span>')


def header(model: Model, cpu: str, isa: str, threads: int) -> str:
    """One line about the model and the machine."""
    config = model.config
    parts = [
        f"<b>{text(config.name)}</b>",
        f"{text(config.architecture)}, {config.num_layers} layers, {config.num_experts} experts, "
        f"trained k = {config.top_k}",
        byte_size(model.nbytes),
        f"{text(cpu)}, {text(isa)}, {threads} thread{'s' if threads != 1 else ''}",
    ]
    return f'<div class="cr-header">{" · ".join(parts)}</div>'


def panel_title(title: str, note: object = "", badge: str = "") -> str:
    """The heading of a panel."""
    mark = f'<span class="cr-badge">{text(badge)}</span>' if badge else ""
    return f'<div class="cr-title">{text(title)} <span>{text(note)}</span>{mark}</div>'


def tile(name: str, label: str, body: object, title: str, tone: str = "") -> str:
    return (
        f'<div class="cr-tile {tone}" data-number="{name}" title="{text(title)}">'
        f'<div class="cr-label">{text(label)}</div>{text(body)}</div>'
    )


def number(interval: Interval, prefix: str = "") -> str:
    """Value large, spread and unit small, and "no change" said where the interval holds it."""
    plain = str(replace(interval, unit="", no_change=None))
    value, _, spread = plain.partition(" ")
    same = ""
    if interval.no_change is not None and not interval.changed:
        word = "no change" if interval.low == interval.high else "no change inside"
        same = f'<span class="cr-nochange">{word}</span>'
    if spread and interval.level < 0.9:  # too few repeats for more
        spread += f" ({100 * interval.level:.0f} %)"
    return (
        f'<span class="cr-value">{text(prefix)}{text(value.replace("-", "−"))}</span> '
        f'<span class="cr-spread">{text(spread)} {text(interval.unit)}</span>{same}'
    )


def expression(results: Results) -> str:
    """The call that measures the same without the room."""
    where = f"ktlab.domain_texts()[{results.text!r}]"
    where = {ALL: "ktlab.domain_texts()", OWN: "room.text"}.get(results.text, where)
    total = results.quality.total_tokens if results.quality else 8192
    return (
        f"ktlab.compare(model, {where}, a={results.baseline.expression}, "
        f"b={results.choice.expression}, max_tokens={total})"
    )


class Snapshot:
    """A static view: shows itself in a notebook; `.html` is self-contained."""

    def __init__(self, html: str) -> None:
        self.html = html

    def __repr__(self) -> str:
        return f"Snapshot of a control room ({len(self.html):,} characters of HTML)"

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(repr(self), self.html)
