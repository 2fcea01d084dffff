"""Pure functions from values to HTML, for the reprs of every stage: escaped, small, offline.

Nothing here knows a model. An object's `_repr_mimebundle_` returns `mimebundle(repr(self), html)`,
so that a front end without HTML shows the text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from textwrap import fill
from typing import Any

# Theme-neutral: inherits JupyterLab's colours and falls back to the page's own.
_STYLE = (
    "<style>"
    ".ktlab{font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:13px;"
    "line-height:1.45;color:var(--jp-ui-font-color1,inherit);max-width:960px;overflow-x:auto}"
    ".ktlab table{border-collapse:collapse;margin:4px 0;font-variant-numeric:tabular-nums}"
    # Named three times, because JupyterLab's own rule for tables in outputs names two classes.
    "div.ktlab.ktlab.ktlab table th{text-align:left;font-weight:600;opacity:.75;"
    "padding:2px 14px 2px 0;"
    "border-bottom:1px solid color-mix(in srgb,currentColor 35%,transparent)}"
    "div.ktlab.ktlab.ktlab table td{padding:2px 14px 2px 0;vertical-align:top;text-align:left}"
    "div.ktlab.ktlab.ktlab table td.n,div.ktlab.ktlab.ktlab table th.n{text-align:right}"
    ".ktlab td.n,.ktlab td>span.s{white-space:nowrap}"
    ".ktlab .t{font-weight:600}.ktlab .s{opacity:.7}"
    ".ktlab .b{display:inline-block;padding:0 7px;border-radius:9px;font-size:12px;"
    "border:1px solid color-mix(in srgb,currentColor 35%,transparent);margin-right:4px}"
    # Darker on a light page, lighter on a dark one.
    ".ktlab .ok{color:color-mix(in srgb,#2a9d63 70%,currentColor)}"
    ".ktlab .warn{color:color-mix(in srgb,#c77d0a 70%,currentColor)}"
    ".ktlab .bad{color:color-mix(in srgb,#d0453e 70%,currentColor)}"
    ".ktlab details>summary{cursor:pointer}"
    "</style>"
)


MISSING = ("", "-", "–", "…", "none")
"""What a table says in the place of a number that is not there."""
_REMARK = re.compile(r" \((no change(?: inside)?)\)$")


class Raw(str):
    """A string that is HTML already and must not be escaped again."""


def text(value: object) -> str:
    """`value` as escaped text, unless it is `Raw`."""
    return str(value) if isinstance(value, Raw) else escape(str(value))


def badge(value: object, tone: str = "") -> Raw:
    """A small rounded label; `tone` is "", "ok", "warn" or "bad"."""
    return Raw(f'<span class="b {escape(tone)}">{text(value)}</span>')


def table(rows: Iterable[Sequence[object]], headers: Sequence[object] = ()) -> Raw:
    """A plain table; a column of numbers, some perhaps missing, is right-aligned."""
    body = [list(row) for row in rows]
    numeric = [_are_numbers(column) for column in zip_longest(*body, fillvalue="")]
    return _table(body, headers, numeric)


def _table(
    body: Sequence[Sequence[object]], headers: Sequence[object], numeric: Sequence[bool]
) -> Raw:
    """Cells as HTML; the columns that are `numeric` to the right and on one line, what an interval
    says of "no change" below it."""

    def cells(row: Sequence[object], tag: str) -> str:
        parts = []
        for i, cell in enumerate(row):
            number, said = i < len(numeric) and numeric[i], text(cell)
            if number:
                said = _REMARK.sub(r'<br><span class="s">\1</span>', said)
            parts.append(f"<{tag}{' class=n' if number else ''}>{said}</{tag}>")
        return "".join(parts)

    head = "<tr>" + cells(headers, "th") + "</tr>" if headers else ""
    lines = "".join("<tr>" + cells(row, "td") + "</tr>" for row in body)
    return Raw(f"<table>{head}{lines}</table>")


def pairs(values: Mapping[str, object]) -> Raw:
    """A two-column table of names and values, which are all read from the left."""
    rows = [(Raw(f'<span class="s">{text(k)}</span>'), v) for k, v in values.items()]
    return _table(rows, (), (False, False))


def details(summary: object, body: object, *, open: bool = False) -> Raw:
    """A section that opens and closes on a click."""
    tag = "<details open>" if open else "<details>"
    return Raw(f"{tag}<summary>{text(summary)}</summary>{text(body)}</details>")


def card(title: object, *body: object) -> str:
    """A titled block: the outermost element of every repr."""
    inner = "".join(text(part) for part in body)
    return f'{_STYLE}<div class="ktlab"><div class="t">{text(title)}</div>{inner}</div>'


def mimebundle(plain: str, html: str) -> dict[str, Any]:
    """What `_repr_mimebundle_` returns."""
    return {"text/plain": plain, "text/html": html}


def wrapped(plain: str, width: int = 80) -> str:
    """`plain` for a terminal of `width` columns: a long line goes on below, further in, and never
    between a number and its unit."""

    def cut(line: str) -> str:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        glued = re.sub(r"(?<=\d) (?=[^\W\d]|%)", "\xa0", line)
        return fill(
            glued, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ).replace("\xa0", " ")

    return "\n".join(line if len(line) <= width else cut(line) for line in plain.splitlines())


def unbroken(value: object) -> str:
    """`value` as text that a narrow table does not cut in two: an interval with its unit. A remark
    in brackets may stand below."""
    return str(value).replace(" ", "\xa0").replace("\xa0(", " (")


def byte_size(count: float) -> str:
    """Bytes with a binary unit: 1536 -> '1.5 KiB'."""
    divisor, unit = byte_unit(count)
    return f"{count:.0f} B" if unit == "B" else f"{count / divisor:,.1f} {unit}"


def byte_unit(count: float) -> tuple[int, str]:
    """The binary unit that bytes are told in, and its size: 1536 -> (1024, 'KiB')."""
    power = next((i for i in range(3) if abs(count) < 1024 ** (i + 1)), 3)
    return 1024**power, ("B", "KiB", "MiB", "GiB")[power]


def quantity(value: float, unit: str = "") -> str:
    """A count with a decimal prefix: 1.23e9 -> '1.23 G'."""
    divisor, unit = decimal_unit(value, unit)
    return f"{value / divisor:.3g} {unit}".rstrip()


def decimal_unit(value: float, unit: str = "") -> tuple[float, str]:
    """The decimal prefix that a count is told in: 1.23e9, "B" -> (1e9, 'GB')."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # what rounds to a thousand is one of the next prefix
            return limit, prefix + unit
    return 1.0, unit


def decimal_bytes(count: float) -> str:
    """Bytes in powers of ten, as memory and files are sold: 404488847360 -> '404 GB'."""
    return quantity(count, "B")


def _are_numbers(column: Sequence[object]) -> bool:
    given = [cell for cell in column if str(cell).strip() not in MISSING]
    return bool(given) and all(map(_is_number, given))


def _is_number(cell: object) -> bool:
    if isinstance(cell, Raw):
        return False
    if isinstance(cell, (int, float)):
        return True
    said = _REMARK.sub("", str(cell))
    sentence = len(said) >= 35 or re.search(r" of [a-z]", said)
    return said.lstrip("-+×≤≥~")[:1].isdigit() and not sentence
