"""The panel of everything tried: settings in the plane of speed and quality."""

from collections.abc import Sequence
from math import floor, log10

import plotly.graph_objects as go

from ktlab import figures
from ktlab.figures import BLUE, INK, ORANGE
from ktlab.html import text
from ktlab.notebook.control_room_html import panel_title
from ktlab.notebook.control_room_results import Point, Results

HEIGHT = 330


def figure(points: Sequence[Point], phase: str) -> go.Figure:
    """Speed over the baseline's to the right, KL divergence downwards, intervals as bars."""
    # A single repeat has no interval yet: a bar across the whole plane would say nothing.
    bounded = [p.speed.low > 0 and p.speed.high < float("inf") for p in points]
    ends = [
        (p.speed.low, p.speed.high) if ok else (p.speed.value, p.speed.value)
        for p, ok in zip(points, bounded, strict=True)
    ]
    fig = figures.pareto(
        [p.speed.value for p in points],
        [p.kl.value for p in points],
        [p.label for p in points],
        speed_ends=([low for low, _ in ends], [high for _, high in ends]),
        kl_ends=([p.kl.low for p in points], [p.kl.high for p in points]),
        front=[p.on_front for p in points],
        current=next((i for i, p in enumerate(points) if p.current), None),
        x=f"{phase} speed, × baseline",
    )
    worst = max([p.kl.high for p in points if p.kl.high < float("inf")], default=0.0) or 0.01
    fig.update_yaxes(
        title_text="KL divergence, nats",
        autorange=False,
        range=[1.1 * worst, -0.2 * worst],  # room for a label above 0, which is the best there is
        tickvals=_ticks(worst),
    )
    slow, fast = min([low for low, _ in ends], default=1.0), max([h for _, h in ends], default=1.0)
    pad = max(0.03, 0.15 * (fast - slow))
    fig.update_xaxes(autorange=False, range=[slow - pad, fast + pad])
    return fig.update_layout(height=HEIGHT)


def _ticks(most: float) -> list[float]:
    """Round values from 0 to `most`, about five."""
    decade: float = 10 ** floor(log10(most / 4))
    step = next(decade * m for m in (1, 2, 5, 10) if decade * m * 5 >= most)
    return [round(step * i, 12) for i in range(int(most / step) + 1)]


def plane_title(results: Results | None, text_name: str, baseline: str) -> str:
    """The heading: against what, and whether the present setting is still on its way."""
    waits = results is not None and results.speed is None and not results.is_baseline
    note = f"on {text_name}, against {baseline}"
    if waits and results is not None:
        note += f"; {results.choice.label} is to come"
    return panel_title("everything tried", note)


def plane(points: Sequence[Point], phase: str) -> str:
    """Quality against speed, for renderings without Plotly: right is faster, up is closer."""
    if not points:
        return '<div class="cr-grey">no setting has both quality and speed yet</div>'
    xs = [p.speed.value for p in points]
    ys = [p.kl.value for p in points]
    left, right, worst = min(xs), max(xs), max(ys)
    pad = 0.25 * (right - left) or 0.05

    def place(p: Point) -> tuple[float, float]:
        x = 460 * (p.speed.value - left + pad) / (right - left + 2 * pad)
        return x + 20, 24 + 140 * (p.kl.value / worst if worst else 0)

    front = " ".join(
        "{:.1f},{:.1f}".format(*place(p))
        for p in sorted(points, key=lambda p: p.speed.value)
        if p.on_front
    )
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if p.current else 4}" '
        f'fill="{BLUE if p.current else ORANGE if p.on_front else INK}"/>'
        f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{text(p.label)}</text>'
        for p in points
        for x, y in [place(p)]
    )
    return (
        f'<svg viewBox="0 0 500 180" class="cr-plane"><polyline points="{front}" fill="none" '
        f'stroke="{ORANGE}" stroke-dasharray="3 3"/>{dots}</svg>'
        f'<div class="cr-grey">right: {phase} × {left:.3g} to × {right:.3g} of the baseline; down: '
        f"KL divergence 0 to {worst:.3g} nats; orange: the Pareto front; blue: now</div>"
    )
