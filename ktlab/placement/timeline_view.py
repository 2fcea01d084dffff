"""How a timeline is shown: bars of Plotly, a line of characters a lane, a card of HTML."""

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from ktlab import figures, html

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.placement.timeline import Timeline

WIDTH = 64
"""Characters of a lane in text."""
USUAL = ("attention", "shared, dense", "experts", "output", "deferred experts", "copies")
"""Kinds of what a token meets: two timelines of different machines have the same colours."""
MARKS = "#=+*%@o~xvwzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def seconds(value: float) -> str:
    """0.00123 -> '1.23 ms'."""
    for limit, prefix in ((1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}s"
    return f"{value / 1e-9:.3g} ns" if value else "0 s"


def kinds(timelines: Mapping[str, "Timeline"]) -> dict[str, int]:
    """Each kind's number, its colour and its mark: of usual kinds always the same, of others the
    next that is free."""
    names = dict.fromkeys(span.group for line in timelines.values() for span in line.spans)
    found = {name: number for number, name in enumerate(USUAL) if name in names}
    free = (number for number in count() if number not in found.values())
    return found | {name: next(free) for name in names if name not in found}


def figure(timelines: Mapping[str, "Timeline"]) -> "Figure":
    """Timelines one under another over the same seconds; outlined: what the end waited for."""
    numbers = kinds(timelines)
    several = len(timelines) > 1
    outlined = [
        (f"{name}<br>{seconds(line.seconds)}", line, set(line.critical))
        for name, line in timelines.items()
    ]
    rows = [(name, lane) for name, line in timelines.items() for lane in line.lanes]
    title = "" if several else next(iter(timelines), "")
    fig = figures.figure(title, x="time", height=110 + 36 * len(rows) + 22 * several)
    for kind, number in numbers.items():
        found = [
            (name, span, _hover(line, place, place in critical), 1.6 if place in critical else 0.4)
            for name, line, critical in outlined
            for place, span in enumerate(line.spans)
            if span.group == kind
        ]
        lanes = [span.lane for _, span, _, _ in found]
        fig.add_bar(
            y=[[name for name, *_ in found], lanes] if several else lanes,
            x=[span.seconds for _, span, _, _ in found],
            base=[span.start_s for _, span, _, _ in found],
            hovertext=[hover for *_, hover, _ in found],
            hovertemplate="%{hovertext}<extra></extra>",
            name=kind, orientation="h", width=0.72,
            marker={"color": figures.COLORS[number % len(figures.COLORS)],
                    "line": {"color": figures.INK, "width": [edge for *_, edge in found]},
                    "pattern": {"shape": "/" if number >= len(figures.COLORS) else ""}},
        )  # fmt: skip
    end = max((line.seconds for line in timelines.values()), default=0.0)
    fig.update_xaxes(tickformat="~s", ticksuffix="s", range=[0, 1.02 * end or 1], nticks=8)
    fig.update_yaxes(autorange="reversed", showgrid=False, dividercolor=figures.FAINT)
    return fig.update_layout(barmode="overlay", legend_traceorder="normal")


def _hover(line: "Timeline", place: int, critical: bool) -> str:
    span = line.spans[place]
    words = [
        f"<b>{html.text(span.label)}</b>, {html.text(span.lane)}",
        f"{seconds(span.start_s)} to {seconds(span.end_s)} ({seconds(span.seconds)})",
    ]
    if span.after:
        words.append("after " + html.text(", ".join(line.spans[i].label for i in span.after)))
    if critical:
        words.append("the end waited for it")
    return "<br>".join(words)


def text(line: "Timeline") -> str:
    """A line of characters for each lane, and what they mean."""
    numbers = kinds({"": line})
    head = f"Timeline{f' of {line.title}' if line.title else ''}: {seconds(line.seconds)}"
    names = max((len(lane) for lane in line.lanes), default=0)
    rows = [
        f"  {lane:{names}} |{_bar(line, lane, numbers)}| {_share(line, lane)}"
        for lane in line.lanes
    ]
    legend = ", ".join(f"{_mark(number)} {kind}" for kind, number in numbers.items())
    return "\n".join([head, *rows, *([f"  {legend}"] if legend else []), *_method(line)])


def bundle(line: "Timeline") -> dict[str, Any]:
    """The text, and the same with seconds by kind as a table."""
    rows = [
        (lane, kind, seconds(spent), f"{spent / line.seconds:.0%}" if line.seconds else "")
        for lane in line.lanes
        for kind, spent in line.by_kind(lane).items()
    ]
    drawn = html.Raw(f"<pre>{html.text(text(line))}</pre>")
    table = html.table(rows, ("lane", "what", "time", "of all"))
    return html.mimebundle(text(line), html.card("", drawn, html.details("by kind", table)))


def _bar(line: "Timeline", lane: str, numbers: Mapping[str, int]) -> str:
    """What fills most of each cell, or is too short for one; a dot where the lane waits."""
    if not line.seconds:
        return " " * WIDTH
    cell = line.seconds / WIDTH
    filled: list[dict[str, float]] = [{} for _ in range(WIDTH)]
    short: dict[int, str] = {}
    for span in line.spans:
        if span.lane != lane:
            continue
        if span.seconds < cell / 2:
            short[min(WIDTH - 1, int((span.start_s + span.end_s) / 2 / cell))] = span.group
        for i in range(int(span.start_s / cell), min(WIDTH, int(span.end_s / cell) + 1)):
            part = min(span.end_s, (i + 1) * cell) - max(span.start_s, i * cell)
            filled[i][span.group] = filled[i].get(span.group, 0.0) + max(0.0, part)
    return "".join(
        _mark(numbers[max(parts, key=lambda k: parts[k])])
        if sum(parts.values()) >= 0.5 * cell
        else (_mark(numbers[short[i]]) if i in short else ".")
        for i, parts in enumerate(filled)
    )


def _mark(number: int) -> str:
    return MARKS[number % len(MARKS)]


def _share(line: "Timeline", lane: str) -> str:
    busy = line.busy(lane)
    return f"busy {seconds(busy)}" + (f", {busy / line.seconds:.0%}" if line.seconds else "")


def _method(line: "Timeline") -> list[str]:
    return [f"  {line.method}"] if line.method else []
