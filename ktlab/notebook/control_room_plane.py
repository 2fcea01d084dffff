"""The panel of everything tried: settings in the plane of speed and quality."""

from collections.abc import Callable, Sequence
from math import ceil, floor, isfinite, log10

import plotly.graph_objects as go

from ktlab import figures
from ktlab.figures import BLUE, INK, ORANGE
from ktlab.html import text
from ktlab.interval import Interval
from ktlab.notebook.control_room_html import panel_title
from ktlab.notebook.control_room_results import Point, Results

HEIGHT = 330
LEFT, TOP, WIDE, HIGH = 62, 16, 420, 190
"""Of the picture without Plotly: where its axes stand."""


def figure(points: Sequence[Point], phase: str) -> go.Figure:
    """Speed over the baseline's to the right, KL divergence downwards, intervals as bars."""
    ends = [_ends(p.speed) for p in points]
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
        tickvals=_between(0, worst),
    )
    slow, fast = min([low for low, _ in ends], default=1.0), max([h for _, h in ends], default=1.0)
    pad = max(0.03, 0.15 * (fast - slow))
    fig.update_xaxes(autorange=False, range=[slow - pad, fast + pad])
    return fig.update_layout(height=HEIGHT)


def plane_title(results: Results | None, text_name: str, baseline: str) -> str:
    """The heading: against what, and whether the present setting is still on its way."""
    waits = results is not None and results.speed is None and not results.is_baseline
    note = f"on {text_name}, against {baseline}"
    if waits and results is not None:
        note += f"; {results.choice.label} is to come"
    return panel_title("everything tried", note)


def plane(points: Sequence[Point], phase: str) -> str:
    """Quality against speed, for renderings without Plotly: the same axes, points and intervals."""
    if not points:
        return '<div class="cr-grey">no setting has both quality and speed yet</div>'
    fig = figure(points, phase)
    axes = {"x": fig.layout.xaxis, "y": fig.layout.yaxis}
    ticks = {"x": _between(*axes["x"].range), "y": axes["y"].tickvals}

    def place(axis: str, value: float) -> float:
        first, last = axes[axis].range
        share = min(1.0, max(0.0, (value - first) / (last - first)))
        return round(LEFT + WIDE * share if axis == "x" else TOP + HIGH * (1 - share), 1)

    lines = [
        f'<path class="grid" d="M{place("x", at)} {TOP}v{HIGH}"/>'
        f'<text x="{place("x", at)}" y="{TOP + HIGH + 15}" text-anchor="middle">{at:g}</text>'
        for at in ticks["x"]
    ] + [
        f'<path class="grid" d="M{LEFT} {place("y", at)}h{WIDE}"/>'
        f'<text x="{LEFT - 5}" y="{place("y", at) + 4}" text-anchor="end">{at:g}</text>'
        for at in ticks["y"]
    ]
    best = sorted((p for p in points if p.on_front), key=lambda p: p.speed.value)
    steps = "".join(f"V{place('y', p.kl.value)}H{place('x', p.speed.value)}" for p in best)
    front = f"M{place('x', best[0].speed.value)} {place('y', best[0].kl.value)}{steps}"
    return (
        f'<svg viewBox="0 0 500 {TOP + HIGH + 36}" class="cr-plane">{"".join(lines)}'
        f'<path d="{front}" fill="none" stroke="{ORANGE}" stroke-dasharray="3 3"/>'
        f"{''.join(_dot(p, place) for p in points)}"
        f'<text x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 31}" text-anchor="middle">'
        f"{text(axes['x'].title.text)}</text>"
        f'<text transform="translate(11 {TOP + HIGH / 2}) rotate(-90)" text-anchor="middle">'
        f"{text(axes['y'].title.text)}</text></svg>"
        '<div class="cr-grey">orange: the front that nothing else beats; blue: now</div>'
    )


def _dot(p: Point, place: Callable[[str, float], float]) -> str:
    """A setting with both its intervals and its name."""
    x, y = place("x", p.speed.value), place("y", p.kl.value)
    color = BLUE if p.current else ORANGE if p.on_front else INK
    (slow, fast), (near, far) = _ends(p.speed), _ends(p.kl)
    return (
        f'<path stroke="{INK}" fill="none" d="M{place("x", slow)} {y}'
        f'H{place("x", fast)}M{x} {place("y", near)}V{place("y", far)}"/>'
        f'<circle cx="{x}" cy="{y}" r="{6 if p.current else 4}" fill="{color}">'
        f"<title>{text(p.label)}: ×{text(p.speed)}, {text(p.kl)}</title></circle>"
        f'<text x="{x + 8}" y="{y - 7}">{text(p.label)}</text>'
    )


def _ends(interval: Interval) -> tuple[float, float]:
    """Where a bar begins and ends: a single repeat has no interval, and a bar across the whole
    plane would say nothing."""
    if isfinite(interval.low) and isfinite(interval.high) and interval.low > 0:
        return interval.low, interval.high
    return interval.value, interval.value


def _between(first: float, last: float) -> list[float]:
    """About five round values in a range."""
    decade: float = 10 ** floor(log10((last - first) / 4))
    step = next(decade * m for m in (1, 2, 5, 10) if decade * m * 5 >= last - first)
    return [round(step * i, 12) for i in range(ceil(first / step), floor(last / step) + 1)]
