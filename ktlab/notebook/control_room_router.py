"""The router's panel around its histogram: what changed in numbers, and in every layer.

L layers with a router, E experts.
"""

from dataclasses import replace
from functools import lru_cache
from math import log2
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ktlab import figures
from ktlab.figures import BLUE, ORANGE
from ktlab.html import text
from ktlab.interval import Interval
from ktlab.notebook.control_room_html import panel_title
from ktlab.notebook.control_room_results import WHICH, Histogram, Results
from ktlab.routing.intervals import METHOD

HEIGHT = 200


def figure(found: Histogram | None, layer: int, experts: int) -> go.Figure:
    """Load of every expert of one layer, before and after; empty axes while nothing is known."""
    after_E, before_E = _loads(found, layer) or ([0.0] * experts, [0.0] * experts)
    return figures.router_histogram(after_E, before_E, height=HEIGHT)


def redraw(live: go.FigureWidget, found: Histogram | None, layer: int) -> None:
    """Give the live figure other bars: much quicker than another figure."""
    loads = _loads(found, layer)
    if loads is not None:
        with live.batch_update():
            live.data[1].y, live.data[0].y = loads


def _loads(found: Histogram | None, layer: int) -> tuple[Any, Any] | None:
    if found is None:
        return None
    i = found.layers.index(layer)
    return found.relative("after")[i], found.relative("before")[i]


def router_title(results: Results | None, layer: int) -> str:
    """The heading: which layer, which settings, on how many tokens."""
    found = results.histogram if results else None
    if results is None or found is None:
        return panel_title("router", f"layer {layer}")
    note = (
        f"layer {layer}, {results.baseline.label} → {results.choice.label}, {found.tokens} tokens"
    )
    return panel_title("router", note, "preliminary" if found.preliminary else "")


def router(found: Histogram | None, layer: int) -> str:
    """What the histogram above says in numbers, and every layer's change as a strip."""
    if found is None or layer not in found.layers:
        return ""
    title = (
        f"Counts over the same {found.tokens} tokens. Here: room.results.histogram; of any text: "
        f"model.trace(text).routing.histogram({layer}). {METHOD}"
    )
    return (
        f'<div class="cr-grey" title="{text(title)}">{" · ".join(_figures(found, layer))}</div>'
        f"{strips(found, layer)}"
    )


@lru_cache(maxsize=64)
def _figures(found: Histogram, layer: int) -> tuple[str, ...]:
    """The layer's numbers; the first few tokens are too few for an interval."""
    most = log2(found.before_LE.shape[1])
    taken, bits = (
        " → ".join(_plain(of(which, layer), found) for which in WHICH)
        for of in (found.experts_a_token, found.entropy)
    )
    divergence = _plain(found.divergence(layer), found)
    return (
        f"experts a token {taken}",
        f"entropy {bits} of {most:.3g} bits",
        f"divergence {divergence} bits",
    )


def _plain(interval: Interval, found: Histogram) -> str:
    if found.preliminary:
        return f"{interval.value:.3g}"
    return text(replace(interval, unit=""))


def strips(found: Histogram, layer: int) -> str:
    """Change of load of every expert in every layer: orange more, blue less."""
    change_LE = found.relative("after") - found.relative("before")
    limit = float(np.abs(change_LE).max())
    caption = (
        f'all layers: experts that <b style="color:{ORANGE}">gained</b> and '
        f'<b style="color:{BLUE}">lost</b> load, by up to {limit:.2g} × uniform'
    )
    if limit < 1e-9:
        caption = "all layers: no expert gained or lost load"
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
        f'<div class="cr-grey">{caption}</div>'
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
