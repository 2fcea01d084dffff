"""Pure functions from numbers to Plotly figures; nothing here computes a statistic.

Backgrounds are transparent and text is mid-grey, so that a figure reads on light and dark pages.
Colours are Okabe and Ito's, which colour-blind readers tell apart; the two sides of every
comparison also differ in fill, dash or marker. Low and high ends are confidence limits; nan where
there are none. Letters: E experts, L layers, G domains, C capacities, P points.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK = "#797979"
"""Text: a contrast of 4.3 on white and on JupyterLab's dark background, the most for both."""
FAINT = "rgba(128,128,128,0.22)"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW = "#56B4E9", "#D55E00", "#F0E442"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "diamond-open", "square", "triangle-up-open")
WORDS = 0.07
"""Of an axis: the height of a line of small words in a figure that a legend leaves half of."""
SLOPE_WORDS = 0.2
"""Of an axis, from its left end: what the words of a roofline's slope take."""
SEQUENTIAL = "Cividis"
DIVERGING = [[0, BLUE], [0.5, "#9a9a9a"], [1, VERMILION]]
"""The middle is grey, not white: it must not glare on a dark page."""


def figure(title: str = "", *, x: str = "", y: str = "", height: int = 320) -> "Figure":
    """An empty figure in the shared style, with axis titles (units in them)."""
    import plotly.graph_objects as go

    axis = {"gridcolor": FAINT, "linecolor": FAINT, "zerolinecolor": FAINT, "automargin": True}
    font = {"color": INK, "family": "system-ui, sans-serif", "size": 12}
    return go.Figure(
        layout={
            "template": "none",
            "colorway": COLORS,
            "font": font,
            "title": {"text": title, "font": {**font, "size": 14}, "x": 0, "xref": "paper"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 8, "t": 36 if title else 12, "b": 8},
            "height": height,
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
            "legend": {
                "orientation": "h",
                "y": 1.02,
                "yanchor": "bottom",
                "x": 1,
                "xanchor": "right",
            },
            "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        }
    )


def router_histogram(
    load_E: ArrayLike, before_E: ArrayLike | None = None, *, title: str = "", height: int = 260
) -> "Figure":
    """Load per expert in multiples of uniform: bars, and behind them outlines of `before_E`."""
    fig = figure(title, x="expert", y="load, × uniform", height=height)
    experts = np.arange(len(np.asarray(load_E)))
    hover = "expert %{x}: ×%{y:.2f} uniform"
    if before_E is not None:
        fig.add_bar(
            x=experts, y=np.asarray(before_E), name="before", hovertemplate=hover,
            marker={"color": FAINT, "line": {"color": INK, "width": 1}},
        )  # fmt: skip
    fig.add_bar(
        x=experts, y=np.asarray(load_E), name="after" if before_E is not None else "load",
        hovertemplate=hover, marker={"color": BLUE, "opacity": 0.9}, width=0.55,
    )  # fmt: skip
    _reference(fig, 1.0)  # the axis says what 1 is
    fig.update_layout(barmode="overlay", bargap=0.1, showlegend=before_E is not None)
    return fig


def load_heatmap(
    load_LE: ArrayLike, layers: Sequence[int], *, title: str = "", height: int = 260
) -> "Figure":
    """Load of every expert of every layer, in multiples of uniform."""
    fig = _heatmap(
        load_LE, list(layers), "× uniform", "layer %{y}, expert %{x}: ×%{z:.2f} uniform",
        title=title, height=height,
    )  # fmt: skip
    return fig.update_layout(xaxis_title_text="expert", yaxis_title_text="layer")


def domain_heatmap(
    load_GE: ArrayLike, domains: Sequence[str], *, title: str = "", height: int = 300
) -> "Figure":
    """Load of every expert by domain, in multiples of uniform."""
    fig = _heatmap(
        load_GE, list(domains), "× uniform", "%{y}, expert %{x}: ×%{z:.2f} uniform",
        title=title, height=height,
    )  # fmt: skip
    return fig.update_layout(xaxis_title_text="expert")


def coactivation_heatmap(
    lift_EE: ArrayLike, *, title: str = "", height: int = 520, limit: float = 2.0
) -> "Figure":
    """Pairs of experts: observed over expected on a log2 scale, cut at +-`limit`."""
    with np.errstate(divide="ignore"):
        log_EE = np.clip(np.log2(np.asarray(lift_EE, float)), -limit, limit)
    fig = _heatmap(
        log_EE, list(range(len(log_EE))), "log2 of observed / expected",
        "experts %{y} and %{x}: 2^%{z:.2f} times what their loads explain",
        title=title, height=height, colorscale=DIVERGING, zmin=-limit, zmax=limit,
    )  # fmt: skip
    ends = np.arange(-limit, limit + 1)
    cut = {-limit: f"≤ {-limit:g}", limit: f"≥ {limit:g}"}
    fig.update_traces(
        colorbar_tickvals=ends, colorbar_ticktext=[cut.get(end, f"{end:g}") for end in ends]
    )
    fig.update_xaxes(dtick=8).update_yaxes(dtick=8)
    return fig.update_layout(xaxis_title_text="expert", yaxis_title_text="expert")


def entropy_by_layer(
    layers: Sequence[int], bits: ArrayLike, low: ArrayLike, high: ArrayLike, maximum: float,
    *, title: str = "",
) -> "Figure":  # fmt: skip
    """Entropy of the load by layer, under its maximum; the axis begins where the lowest one is."""
    fig = figure(title, x="layer", y="entropy of the load, bits")
    fig.add_scatter(
        x=[str(layer) for layer in layers], y=np.asarray(bits), error_y=_error(bits, low, high),
        mode="markers", marker={"color": BLUE, "size": 9},
        hovertemplate="layer %{x}: %{y:.4f} bits<extra></extra>",
    )  # fmt: skip
    _reference(fig, maximum, f"all experts alike: {maximum:.4g} bits, the most there can be")
    ends = np.r_[np.asarray(bits, float), np.asarray(low, float)]
    below = max(maximum - ends[np.isfinite(ends)].min(), 1e-3 * maximum)
    fig.update_yaxes(range=[maximum - 1.15 * below, maximum + 0.2 * below])
    fig.update_xaxes(type="category")
    return fig.update_layout(showlegend=False)


def rates_by_layer(
    layers: Sequence[int], rate: ArrayLike, low: ArrayLike, high: ArrayLike, chance: ArrayLike,
    *, y: str, chance_name: str = "chance", title: str = "",
) -> "Figure":  # fmt: skip
    """Some rate by layer with its interval, and beside each point what chance gives."""
    fig = figure(title, x="layer", y=y)
    fig.add_scatter(
        x=[str(layer) for layer in layers], y=np.asarray(chance), name=chance_name, mode="markers",
        marker={"symbol": "line-ew", "size": 18, "line": {"color": INK, "width": 2}},
        hovertemplate=f"{chance_name}: %{{y:.4f}}",
    )  # fmt: skip
    fig.add_scatter(
        x=[str(layer) for layer in layers], y=np.asarray(rate), name="measured", mode="markers",
        marker={"color": BLUE, "size": 9}, error_y=_error(rate, low, high),
        hovertemplate="layer %{x}: %{y:.4f}",
    )  # fmt: skip
    fig.update_xaxes(type="category")
    return fig.update_yaxes(rangemode="tozero")


def divergence_by_layer(
    layers: Sequence[int], bits: ArrayLike, low: ArrayLike, high: ArrayLike, chance: ArrayLike,
    *, within: ArrayLike | None = None, title: str = "",
) -> "Figure":  # fmt: skip
    """Jensen-Shannon divergence by layer, beside shuffled labels and halves of one domain."""
    fig = rates_by_layer(
        layers, bits, low, high, chance,
        y="Jensen-Shannon divergence, bits", chance_name="labels shuffled", title=title,
    )  # fmt: skip
    if within is not None:
        fig.add_scatter(
            x=[str(layer) for layer in layers], y=np.asarray(within), name="halves of one domain",
            mode="markers", marker={"symbol": "diamond-open", "size": 9, "color": ORANGE},
            hovertemplate="halves of one domain: %{y:.4f}",
        )  # fmt: skip
    return fig


def rates_by_name(
    names: Sequence[str], rate: ArrayLike, low: ArrayLike, high: ArrayLike, *,
    hollow: Sequence[bool], kinds: tuple[str, str], chance: float, x: str, title: str = "",
) -> "Figure":  # fmt: skip
    """Rates with intervals, one line a name, first on top; `hollow` ones are of the second kind."""
    fig = figure(title, x=x, height=110 + 24 * len(names))
    value, ends = np.asarray(rate, float), (np.asarray(low, float), np.asarray(high, float))
    for second, name in enumerate(kinds):
        at = [i for i, outline in enumerate(hollow) if outline == bool(second)]
        fig.add_scatter(
            y=[names[i] for i in at], x=value[at], name=name, mode="markers",
            error_x=_error(value[at], ends[0][at], ends[1][at]),
            marker={"color": (BLUE, ORANGE)[second], "symbol": SYMBOLS[second], "size": 10},
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )  # fmt: skip
    fig.add_vline(x=chance, line={"color": INK, "dash": "dot", "width": 1})
    fig.update_yaxes(
        type="category", categoryorder="array", categoryarray=list(names)[::-1], title_text=""
    )
    return fig.update_xaxes(range=[0, 1.02], tickformat=".0%")


def hit_rate_curves(
    capacities: ArrayLike,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    chance: ArrayLike | None = None,
    *,
    title: str = "",
) -> "Figure":
    """Cache hit rate (rate, low, high by policy) against capacity, with bands."""
    fig = figure(title, x="experts a layer that fit in the cache", y="hit rate", height=380)
    capacities = np.asarray(capacities)
    for number, (name, (rate, low, high)) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        fig.add_scatter(
            x=np.r_[capacities, capacities[::-1]], y=np.r_[np.asarray(high), np.asarray(low)[::-1]],
            fill="toself", fillcolor=_see_through(color), line={"width": 0}, mode="lines",
            hoverinfo="skip", showlegend=False, legendgroup=name,
        )  # fmt: skip
        fig.add_scatter(
            x=capacities, y=np.asarray(rate), name=name, mode="lines", legendgroup=name,
            line={"color": color, "dash": DASHES[number % len(DASHES)], "width": 2},
            hovertemplate=f"{name}, %{{x}} experts: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    if chance is not None:
        fig.add_scatter(
            x=capacities, y=np.asarray(chance), name="blindly", mode="lines",
            line={"color": INK, "dash": "dot", "width": 1}, hoverinfo="skip",
        )  # fmt: skip
    return fig.update_yaxes(range=[0, 1.02], tickformat=".0%")


def pareto(
    speed: ArrayLike, kl: ArrayLike, labels: Sequence[str], *,
    speed_ends: tuple[ArrayLike, ArrayLike] | None = None,
    kl_ends: tuple[ArrayLike, ArrayLike] | None = None,
    front: ArrayLike | None = None, current: int | None = None,
    x: str = "decode speed, tokens/s", title: str = "",
) -> "Figure":  # fmt: skip
    """Settings tried: quality lost (KL, lower is better) against speed; the axis of KL points down.

    `front` (P,) marks points that no other beats in both (see `pareto_front`); `current` is the
    index of the setting now in use.
    """
    fig = figure(title, x=x, y="KL divergence from the baseline, nats/token", height=360)
    speed, kl = np.asarray(speed, float), np.asarray(kl, float)
    on_front = np.zeros(len(speed), bool) if front is None else np.asarray(front, bool)
    order = np.flatnonzero(on_front)[np.argsort(speed[on_front], kind="stable")]
    fig.add_scatter(
        x=speed[order], y=kl[order], mode="lines", name="front", hoverinfo="skip",
        line={"color": ORANGE, "dash": "dot", "width": 1.5, "shape": "vh"},
    )  # fmt: skip
    colors = np.where(on_front, ORANGE, INK).astype(object)
    sizes = np.where(on_front, 10, 8)
    if current is not None:
        colors[current], sizes[current] = BLUE, 15
    fig.add_scatter(
        x=speed, y=kl, mode="markers+text", name="settings", text=list(labels),
        textposition="top right", textfont={"color": INK},
        marker={
            "color": list(colors), "size": sizes, "opacity": 1, "line": {"color": INK, "width": 1}
        },
        error_x=_error(speed, *speed_ends) if speed_ends else None,
        error_y=_error(kl, *kl_ends) if kl_ends else None,
        hovertemplate="%{text}: %{x:,.4g}, KL %{y:.4g}<extra></extra>",
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(showlegend=False)


def pareto_front(speed: ArrayLike, kl: ArrayLike) -> NDArray[np.bool_]:
    """(P,) True where no other point is at least as good in both and better in one; nan never."""
    speed, kl = np.asarray(speed, float), np.asarray(kl, float)
    known = np.isfinite(speed) & np.isfinite(kl)
    at_least = (speed[:, None] >= speed) & (kl[:, None] <= kl) & known[:, None]
    better = (speed[:, None] > speed) | (kl[:, None] < kl)
    return known & ~(at_least & better).any(axis=0)


def stage_bars(
    stages: Mapping[str, Mapping[str, float]], *, title: str = "", unit: str = "ms/token"
) -> "Figure":
    """Time by stage, one stacked bar for each setting: {setting: {stage: time}}."""
    fig = figure(title, x=f"time, {unit}", height=90 + 44 * max(1, len(stages)))
    names = list(dict.fromkeys(stage for times in stages.values() for stage in times))
    for number, name in enumerate(names):
        fig.add_bar(
            y=list(stages), x=[times.get(name, 0.0) for times in stages.values()], name=name,
            orientation="h", hovertemplate=f"{name}: %{{x:.4g}} {unit}",
            marker={"color": COLORS[number % len(COLORS)], "line": {"color": INK, "width": 0.5},
                    "pattern": {"shape": "/" if number >= len(COLORS) else ""}},
        )  # fmt: skip
    fig.update_yaxes(autorange="reversed")
    return fig.update_layout(barmode="stack", legend_traceorder="normal")


def memory_bars(
    devices: Mapping[str, Mapping[str, float]],
    limits: Mapping[str, float | None],
    *,
    title: str = "",
) -> "Figure":
    """Bytes of each device by what they are for, {device: {kind: bytes}}, and a line where the
    device ends, as far as `limits` says. Each device has an axis of its own: host memory is often
    thirty times a GPU's."""
    count = max(1, len(devices))
    fig = figure(title, height=110 + 105 * count)
    names = list(dict.fromkeys(kind for kinds in devices.values() for kind in kinds))
    shown: set[str] = set()
    style = fig.layout.xaxis.to_plotly_json()
    for row, (device, kinds) in enumerate(devices.items()):
        number = "" if row == 0 else str(row + 1)
        top = 1 - row / count
        place = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        end = max(sum(kinds.values()), limits.get(device) or 0) / 1e9
        fig.layout[f"xaxis{number}"] = {
            **style, "anchor": f"y{number}", "range": [0, 1.03 * end],
            "title": {"text": "GB" if row == count - 1 else ""},
        }  # fmt: skip
        fig.layout[f"yaxis{number}"] = {
            **style, "anchor": f"x{number}", "domain": [top - 0.6 / count, top], "showgrid": False,
            "title": {"text": ""},
        }  # fmt: skip
        for kind, size in kinds.items():
            index = names.index(kind)
            fig.add_bar(
                y=[device], x=[size / 1e9], name=kind, orientation="h", legendgroup=kind,
                showlegend=kind not in shown, **place,
                hovertemplate=f"{kind}: %{{x:,.4g}} GB<extra>{device}</extra>",
                marker={"color": COLORS[index % len(COLORS)], "line": {"color": INK, "width": 0.5},
                        "pattern": {"shape": "/" if index >= len(COLORS) else ""}},
            )  # fmt: skip
            shown.add(kind)
        limit = limits.get(device)
        if limit is not None:
            fig.add_scatter(
                x=[limit / 1e9], y=[device], mode="markers", name="capacity", **place,
                legendgroup="capacity", showlegend="capacity" not in shown,
                marker={"symbol": "line-ns", "size": 46, "line": {"color": INK, "width": 3}},
                hovertemplate="capacity: %{x:,.4g} GB<extra></extra>",
            )  # fmt: skip
            shown.add("capacity")
    below = {"orientation": "h", "y": -0.55 / count, "yanchor": "top", "x": 0, "xanchor": "left"}
    return fig.update_layout(barmode="stack", legend=below, legend_traceorder="normal")


def size_quality(
    size_bytes: ArrayLike, loss: ArrayLike, labels: Sequence[str], *,
    low: ArrayLike | None = None, high: ArrayLike | None = None,
    y: str = "KL divergence from the baseline, nats/token", title: str = "",
) -> "Figure":  # fmt: skip
    """Formats: quality lost against size of the weights; lower left is better."""
    fig = figure(title, x="size of the weights, MiB", y=y, height=360)
    fig.add_scatter(
        x=np.asarray(size_bytes, float) / 2**20, y=np.asarray(loss), text=list(labels),
        mode="markers+text", textposition="top right", textfont={"color": INK},
        marker={"color": BLUE, "size": 10},
        error_y=_error(loss, low, high) if low is not None and high is not None else None,
        hovertemplate="%{text}: %{x:,.1f} MiB, %{y:.4g}<extra></extra>",
    )  # fmt: skip
    return fig.update_layout(showlegend=False)


def roofline(
    points: Mapping[str, Sequence[tuple[float, float, str]]], *, read: float,
    peaks: Mapping[str, float], unit: str = "GFLOP/s", title: str = "", height: int = 460,
) -> "Figure":  # fmt: skip
    """Measured (operations per byte, rate, label) by name under the ceilings: `read` in GB/s is the
    slope, `peaks` the flats, both in units of 10^9 a second. Logarithmic axes.
    """
    fig = figure(title, x="operations per byte of weights touched", y=unit, height=height)
    at = [x for found in points.values() for x, _, _ in found]
    # Room for the words of the slope on the left, of the flats on the right.
    low, high = (min(at) / 4, max(at) * 5) if at else (0.5, 1000.0)
    if read > 0 and peaks:
        top = max(peaks.values())
        end = max(high, 2 * top / read)
        ceilings = [([low, top / read], [low * read, top])]
        ceilings += [([p / read, end], [p, p]) for p in peaks.values()]
        for x, y in ceilings:
            fig.add_scatter(
                x=x, y=y, mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": INK, "width": 1.2},
            )  # fmt: skip
        # Left of the slope and above it, where no ceiling and no point can be.
        slope = min(low * (end / low) ** SLOPE_WORDS, top / read)
        notes = [(slope, slope * read, f"read {read:.3g} GB/s", "right", "bottom")]
        # Not at the very end of the lines, which is the end of the axis: rounding decides there
        # whether Plotly takes the words to be inside and draws them.
        right = end / 1.02
        rates = [
            *peaks.values(),
            low * read,
            *(y for found in points.values() for _, y, _ in found),
        ]
        apart = (max(rates) / min(rates)) ** WORDS
        notes += [
            (right, peak, words, "right", "bottom") for peak, words in _side_by_side(peaks, apart)
        ]
        for at_x, at_y, words, side, above in notes:
            fig.add_annotation(
                x=np.log10(at_x), y=np.log10(at_y), text=words, showarrow=False, xanchor=side,
                yanchor=above, font={"color": INK, "size": 11},
            )  # fmt: skip
    for number, (name, found) in enumerate(points.items()):
        fig.add_scatter(
            x=[x for x, _, _ in found], y=[y for _, y, _ in found], name=name,
            mode="lines+markers", text=[label for _, _, label in found],
            line={"width": 1.5, "color": COLORS[number % len(COLORS)]},
            marker={"size": 9, "symbol": SYMBOLS[number // len(COLORS) % len(SYMBOLS)],
                    "line": {"color": INK, "width": 0.5}},
            hovertemplate=f"{name}, %{{text}}: %{{y:,.3g}} {unit}<extra></extra>",
        )  # fmt: skip
    fig.update_xaxes(type="log", dtick="D2").update_yaxes(type="log", dtick=1)
    below = {"y": -0.28, "yanchor": "top", "x": 0, "xanchor": "left"}  # beside, it halves the plot
    return fig.update_layout(legend=below)


def _side_by_side(peaks: Mapping[str, float], apart: float) -> list[tuple[float, str]]:
    """(height, words) of each ceiling; those less than a factor apart share a line of words."""
    lines: list[tuple[float, str]] = []
    for name, peak in sorted(peaks.items(), key=lambda item: item[1]):
        words = f"{name} {peak:,.0f}"
        if lines and peak < apart * lines[-1][0]:
            lines[-1] = (peak, f"{lines[-1][1]} · {words}")
        else:
            lines.append((peak, words))
    return lines


def _heatmap(
    values: ArrayLike, rows: list[Any], unit: str, hover: str, *,
    title: str, height: int, colorscale: Any = SEQUENTIAL, **options: Any,
) -> "Figure":  # fmt: skip
    fig = figure(title, height=height)
    fig.add_heatmap(
        z=np.asarray(values), y=[str(row) for row in rows], colorscale=colorscale,
        hovertemplate=hover + "<extra></extra>",
        colorbar={"title": {"text": unit, "side": "right"}, "outlinewidth": 0, "thickness": 12},
        **options,
    )  # fmt: skip
    fig.update_xaxes(showgrid=False)
    return fig.update_yaxes(autorange="reversed", showgrid=False, type="category")


def _error(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> dict[str, Any]:
    """Error bars from limits; where a limit is missing or infinite, no bar."""
    value = np.asarray(value, float)
    up, down = np.asarray(high, float) - value, value - np.asarray(low, float)
    up, down = (np.where(np.isfinite(d), np.maximum(d, 0), 0) for d in (up, down))
    return {"array": up, "arrayminus": down, "color": INK, "thickness": 1.2, "width": 4}


def _reference(fig: "Figure", value: float, name: str = "") -> None:
    fig.add_hline(y=value, line={"color": INK, "dash": "dot", "width": 1})
    if name:
        fig.add_annotation(
            text=name, font={"color": INK, "size": 11}, showarrow=False, x=1, xref="x domain",
            xanchor="right", y=value, yanchor="bottom",
        )  # fmt: skip


def _see_through(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
