"""How published figures beside predicted ones are shown."""

from typing import TYPE_CHECKING, Any

from ktlab import figures, html

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.placement.published import Published

HEADERS = ("machine", "engine", "experts", "prompt", "", "published", "predicted", "error")


def rows(of: "Published", kind: str) -> list[tuple[str, ...]]:
    """The speeds of a kind as text."""
    return [
        (
            one.machine,
            one.engine,
            str(one.top_k),
            f"{one.prompt:,}",
            one.phase,
            f"{one.published:.4g}",
            f"{one.predicted:.4g}",
            f"{100 * one.error:+.1f} %",
        )
        for one in getattr(of, kind)
    ]


def memory_rows(of: "Published") -> list[tuple[str, ...]]:
    """The sizes as text."""
    return [
        (
            one.who,
            one.model,
            one.device,
            html.decimal_bytes(one.published),
            html.decimal_bytes(one.predicted),
            f"{100 * one.error:+.1f} %",
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


def text(of: "Published") -> str:
    """Tables in columns."""
    widths = (17, 20, 8, 7, 8, 10, 10, 8)
    lines = [
        f"{len(of.free)} efficiencies are free: "
        + ", ".join(f"{name} {value:.3g}" for name, value in of.free.items())
    ]
    for kind in ("fitted", "held_out"):
        lines += ["", summary(of, kind)]
        lines += [
            "  " + "".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            for row in (HEADERS, *rows(of, kind))
        ]
    lines += ["", "memory, tokens/s aside: published, planned"]
    lines += ["  " + "  ".join(f"{cell:>18}" for cell in row) for row in memory_rows(of)]
    return "\n".join(lines)


def bundle(of: "Published") -> dict[str, Any]:
    """Text, and a card with a table for each kind."""
    parts = [
        html.details(summary(of, kind), html.table(rows(of, kind), HEADERS))
        for kind in ("fitted", "held_out")
    ]
    headers = ("who", "model", "device", "published", "planned", "error")
    parts.append(html.details("memory", html.table(memory_rows(of), headers)))
    return html.mimebundle(text(of), html.card("predicted beside published", *parts))


def figure(of: "Published") -> "Figure":
    """Predicted over published, logarithmic; on the line they are equal."""
    fig = figures.figure("", x="published, tokens/s", y="predicted, tokens/s", height=380)
    ends = [4, 320]
    fig.add_scatter(
        x=ends, y=ends, mode="lines", name="equal", hoverinfo="skip",
        line={"color": figures.INK, "width": 1, "dash": "dot"},
    )  # fmt: skip
    groups: dict[tuple[str, str], list[Any]] = {}
    for kind in ("fitted", "held_out"):
        for one in getattr(of, kind):
            groups.setdefault((kind, one.phase), []).append(one)
    for (kind, phase), found in groups.items():
        fig.add_scatter(
            x=[one.published for one in found],
            y=[one.predicted for one in found],
            mode="markers",
            name=f"{phase}, {kind.replace('_', ' ')}",
            marker={
                "color": figures.COLORS[0 if phase == "prefill" else 1],
                "symbol": "circle" if kind == "fitted" else "circle-open",
                "size": 9,
            },
            hovertext=[
                f"{one.machine}, {one.engine}<br>{one.top_k} experts, prompt {one.prompt:,}<br>"
                f"{one.published:.4g} published, {one.predicted:.4g} predicted "
                f"({100 * one.error:+.1f} %)<br>waits for {one.bound}"
                for one in found
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    fig.update_xaxes(type="log")
    fig.update_yaxes(type="log")
    return fig
