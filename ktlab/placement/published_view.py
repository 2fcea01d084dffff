"""How published figures beside predicted ones are shown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ktlab import figures, html

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.placement.published import Published

HEADERS = ("model", "machine", "engine", "experts", "prompt", "", "published", "predicted", "error")
NARROW = (
    "what ran where",
    *HEADERS[3:5],
    "phase",
    "published, tokens/s",
    "predicted, tokens/s",
    "error",
)
"""Headers of the card: model, machine and engine share a column, said once for the rows alike."""

MEMORY = ("who", "model", "device", "published", "planned", "error")


def rows(of: "Published", kind: str) -> list[tuple[str, ...]]:
    """The speeds of a kind as text."""
    return [
        (
            one.model,
            one.machine,
            one.engine,
            str(one.top_k),
            f"{one.prompt:,}",
            one.phase,
            f"{one.published:.4g}",
            f"{one.predicted:.4g}",
            percent(one.error),
        )
        for one in getattr(of, kind)
    ]


def percent(error: float) -> str:
    """With a sign, which a zero has not."""
    said = f"{100 * error:+.1f} %"
    return said if said.strip("+-") != "0.0 %" else "0.0 %"


def narrow_rows(of: "Published", kind: str) -> list[tuple[str, ...]]:
    """`rows` for a page 800 pixels wide."""
    found, before = [], ""
    for model, machine, engine, *rest in rows(of, kind):
        where = f"{model}, {machine}, {engine}"
        found.append((where if where != before else "", *rest))
        before = where
    return found


def memory_rows(of: "Published") -> list[tuple[str, ...]]:
    """The sizes as text."""
    return [
        (
            one.who,
            one.model,
            one.device,
            html.decimal_bytes(one.published),
            html.decimal_bytes(one.predicted),
            percent(one.error),
        )
        for one in of.memory
    ]


def summary(of: "Published", kind: str) -> str:
    """One line on the errors of a kind."""
    errors = of.errors[kind]
    return (
        f"{kind.replace('_', ' ')}: {errors['count']} speeds, median error "
        f"{100 * errors['median']:.1f} %, worst {100 * errors['worst']:.1f} %"
    )


def left_out(of: "Published") -> list[str]:
    """A line for each speed that is in no bound: what it is, and why."""
    return [
        f"left out of them, and not explained: {one.model}, {one.engine} on {one.machine}, "
        f"{one.phase}: {one.published:.4g} published, {one.predicted:.4g} predicted "
        f"({percent(one.error)}) ({one.source})"
        for one in of.left_out
    ]


def text(of: "Published") -> str:
    """Tables in columns; what speeds have in common is said once above them."""
    widths = (9, 8, 9, 11, 11, 9)
    lines = [
        f"{len(of.free)} efficiencies are free: "
        + ", ".join(f"{name} {value:.3g}" for name, value in of.free.items())
    ]

    def row(cells: Sequence[str]) -> str:
        return "  " + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    for kind in ("fitted", "held_out"):
        lines += ["", f"{summary(of, kind)}; in tokens/s"]
        lines += left_out(of) if kind == "held_out" else []
        lines.append(row(HEADERS[3:]))
        for where, *cells in narrow_rows(of, kind):
            lines += [f"  {where}"] if where else []
            lines.append(row(cells))
    lines += ["", "not explained:", *(f"  {one}" for one in of.unexplained)]
    lines += ["", "memory", "  " + "".join(f"{cell:>11}" for cell in MEMORY[2:])]
    for who, model, *cells in memory_rows(of):
        lines += [f"  {who}, {model}", "  " + "".join(f"{cell:>11}" for cell in cells)]
    return html.wrapped("\n".join(lines))


def bundle(of: "Published") -> dict[str, Any]:
    """Text, and a card: what was fitted, and behind a click what was held out and memory."""
    beside = "".join(f'<div class="s">{html.text(line)}</div>' for line in left_out(of))
    parts = [
        html.Raw(f"<b>{summary(of, 'fitted')}</b>"),
        html.table(narrow_rows(of, "fitted"), NARROW),
        html.details(summary(of, "held_out"), html.table(narrow_rows(of, "held_out"), NARROW)),
        html.Raw(beside),
        html.details("memory", html.table(memory_rows(of), MEMORY)),
        html.details("not explained", html.table([(one,) for one in of.unexplained])),
    ]
    return html.mimebundle(text(of), html.card("predicted beside published", *parts))


def figure(of: "Published") -> "Figure":
    """The error of each speed, over the published one."""
    fig = figures.figure("", x="published, tokens/s", y="predicted over published", height=380)
    fig.add_hrect(
        y0=-0.1, y1=0.1, fillcolor=figures.FAINT, line_width=0, layer="below",
        annotation_text="within 10 %", annotation_position="bottom right",
        annotation_font_color=figures.INK,
    )  # fmt: skip
    fig.add_hline(y=0, line={"color": figures.INK, "width": 1, "dash": "dot"})
    groups: dict[tuple[str, str], list[Any]] = {}
    for kind in ("fitted", "held_out"):
        for one in getattr(of, kind):
            groups.setdefault((kind, one.phase), []).append(one)
    for (kind, phase), found in groups.items():
        shape = "circle" if phase == "prefill" else "diamond"
        fig.add_scatter(
            x=[one.published for one in found],
            y=[one.error for one in found],
            mode="markers",
            name=f"{phase}, {kind.replace('_', ' ')}",
            marker={
                "color": figures.COLORS[0 if phase == "prefill" else 1],
                "symbol": shape if kind == "fitted" else f"{shape}-open",
                "size": 9,
            },
            hovertext=[
                f"{one.model}, {one.machine}, {one.engine}<br>"
                f"{one.top_k} experts, prompt {one.prompt:,}<br>"
                f"{one.published:.4g} published, {one.predicted:.4g} predicted "
                f"({percent(one.error)})<br>waits for {one.bound}"
                for one in found
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    fig.update_xaxes(type="log", tickvals=[5, 10, 20, 50, 100, 200, 300])
    fig.update_yaxes(tickformat="+.0%", range=[-0.3, 0.3])
    return fig
