"""Small pictures of the control room as SVG and HTML: light, themed by CSS, alive without scripts.

L layers with a router, E experts.
"""

from collections.abc import Mapping, Sequence
from math import isfinite, log2

import numpy as np

from ktlab.figures import BLUE, COLORS, INK, ORANGE
from ktlab.html import text
from ktlab.notebook.control_room_results import (
    STAGES,
    Histogram,
    Point,
    Progress,
    Results,
    StageTimes,
)

__all__ = ["bars", "log2", "narrowing", "plane", "stage_bars", "strips"]


def narrowing(history: Sequence[Progress], total: int) -> str:
    """The interval of the mean KL divergence against the tokens read so far."""
    known = [step for step in history if isfinite(step.high)]
    if len(known) < 2 or known[-1].high <= 0:
        return ""
    width, height = 400.0, 44.0
    top = min(max(step.high for step in known), 3 * known[-1].high)

    def place(tokens: float, value: float) -> str:
        return f"{width * tokens / total:.1f},{height * (1 - min(value, top) / top):.1f}"

    band = [place(s.tokens, s.high) for s in known] + [
        place(s.tokens, s.low) for s in reversed(known)
    ]
    line = " ".join(place(s.tokens, s.value) for s in known)
    title = f"KL divergence, mean and 95 % interval, after each window; the top is {top:.3g} nats"
    return (
        f'<svg class="cr-narrowing" viewBox="0 0 400 44" preserveAspectRatio="none">'
        f"<title>{title}</title>"
        f'<polygon points="{" ".join(band)}" fill="{BLUE}" fill-opacity=".25"/>'
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.5" '
        f'vector-effect="non-scaling-stroke"/></svg>'
    )


def stage_bars(results: Results | None) -> str:
    """Time by stage: baseline above setting, prefill and decode each to its own scale."""
    found = results.stages if results else None
    if results is None or found is None:
        return '<div class="cr-grey">measured right after the first answer</div>'
    names = {"before": results.baseline.label, "after": results.choice.label}
    rows = [
        _phase("prefill", found.prefill, names, f"{found.prefill_tokens} tokens", found),
        _phase("decode", found.decode, names, f"context {found.context}", found),
    ]
    used = [s for s in STAGES if any(s in t for t in (*found.prefill.values(),))]
    legend = "".join(
        f'<span><i style="background:{_color(stage)}"></i>{"dense" if stage == "mlp" else stage}'
        "</span>"
        for stage in used
    )
    return f'<div class="cr-stages">{"".join(rows)}<div class="cr-legend">{legend}</div></div>'


def _phase(
    phase: str,
    times: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    note: str,
    found: StageTimes,
) -> str:
    longest = max(sum(stages.values()) for stages in times.values()) or 1.0
    rows = []
    for which in ("before", "after") if names["before"] != names["after"] else ("after",):
        total = sum(times[which].values())
        parts = "".join(
            f'<i style="width:{100 * ms / longest:.2f}%;background:{_color(stage)}" '
            f'title="{stage}: {ms:.3g} ms a token, {100 * ms / total:.0f} % of {phase}; median of '
            f"{found.repeats} repeats, in alternation. Here: room.results.stages.{phase}"
            f"[{text(repr(which))}][{text(repr(stage))}]\"></i>"
            for stage, ms in times[which].items()
        )
        rows.append(
            f'<span class="cr-row">{text(names[which])}</span>'
            f'<span class="cr-stack">{parts}</span><span class="cr-ms">{total:.3g} ms</span>'
        )
    return (
        f'<div class="cr-grey"><b>{phase}</b>, ms a token ({note})</div>'
        f'<div class="cr-bars">{"".join(rows)}</div>'
    )


def _color(stage: str) -> str:
    return INK if stage == "other" else COLORS[STAGES.index(stage) % len(COLORS)]


def strips(found: Histogram, layer: int) -> str:
    """Change of load of every expert in every layer: orange more, blue less."""
    change_LE = found.relative("after") - found.relative("before")
    limit = max(1e-9, float(np.abs(change_LE).max()))
    layers, experts = change_LE.shape
    cells = []
    for row, index in enumerate(found.layers):
        for expert in range(experts):
            change = change_LE[row, expert]
            if abs(change) < 1e-9:
                continue
            color = ORANGE if change > 0 else BLUE
            cells.append(
                f'<rect x="{expert}" y="{row}" width="1" height=".9" fill="{color}" '
                f'fill-opacity="{abs(change) / limit:.2f}"><title>layer {index}, expert {expert}: '
                f"{change:+.2f} × uniform</title></rect>"
            )
    mark = found.layers.index(layer)
    frame = (
        f'<rect x="0" y="{mark}" width="{experts}" height=".9" fill="none" stroke="currentColor" '
        'stroke-width="1" vector-effect="non-scaling-stroke"/>'
    )
    names = "".join(f"<span>{index}</span>" for index in found.layers)
    return (
        f'<div class="cr-strips"><div class="cr-axis">{names}</div>'
        f'<svg viewBox="0 0 {experts} {layers}" preserveAspectRatio="none" '
        f'style="height:{12 * layers}px">{"".join(cells)}{frame}</svg></div>'
        f'<div class="cr-grey">every layer: experts that gained <b style="color:{ORANGE}">load</b> '
        f'and lost <b style="color:{BLUE}">it</b>, up to {limit:.2g} × uniform</div>'
    )


def bars(found: Histogram | None, layer: int) -> str:
    """The router's histogram of one layer, for renderings without Plotly."""
    if found is None:
        return ""
    i = found.layers.index(layer)
    before_E, after_E = found.relative("before")[i], found.relative("after")[i]
    top = max(1.0, float(max(before_E.max(), after_E.max())))
    shapes = "".join(
        f'<rect x="{e + 0.05}" y="{1 - b / top:.3f}" width=".9" height="{b / top:.3f}" '
        f'fill="currentColor" fill-opacity=".25"/>'
        f'<rect x="{e + 0.25}" y="{1 - a / top:.3f}" width=".5" height="{a / top:.3f}" '
        f'fill="{BLUE}"><title>expert {e}: × {b:.2f} before, × {a:.2f} after</title></rect>'
        for e, (b, a) in enumerate(zip(before_E, after_E, strict=True))
    )
    return (
        f'<svg viewBox="0 0 {len(after_E)} 1" preserveAspectRatio="none" class="cr-hist">'
        f"{shapes}</svg>"
        f'<div class="cr-grey">load per expert, up to × {top:.1f} uniform; grey before, blue after'
        "</div>"
    )


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
