"""Settings tried, as points in the plane of size and quality. No widgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktlab import figures
from ktlab.measurement.quality import Quality
from ktlab.model.components import COMPONENTS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AS_LOADED = "as loaded"
CLOSE = 1.4
"""Ratio of two KLs below which their points lie closer than the height of two labels."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting tried on one text."""

    formats: tuple[tuple[str, str], ...]
    text: str
    nbytes: int
    quality: Quality
    layers: tuple[int, ...] = ()
    """The layers whose experts were changed; () for all."""

    @property
    def label(self) -> str:
        return label(dict(self.formats), self.layers)


def label(formats: Mapping[str, str], layers: Sequence[int] = ()) -> str:
    """{"experts": "q4_k"} -> "experts q4_k", or "experts of 4 layers q4_k"."""
    formats = {named(component, layers): format for component, format in formats.items()}
    if len(formats) > 1 and len(set(formats.values())) == 1 and len(formats) == len(COMPONENTS):
        return f"all {next(iter(formats.values()))}"
    return ", ".join(f"{c} {f}" for c, f in formats.items()) or AS_LOADED


def named(component: str, layers: Sequence[int]) -> str:
    """A component; the experts with the number of layers, where that is not all."""
    if component != "experts" or not layers:
        return component
    return f"experts of {len(layers)} layer{'s' if len(layers) > 1 else ''}"


def label_places(size: Sequence[float], kl: Sequence[float], loaded: float) -> list[str]:
    """Where each point's label goes: off the right edge, and apart where points are crowded."""
    places = ["top right"] * len(size)
    crowd = sorted(
        (k, i) for i, (s, k) in enumerate(zip(size, kl, strict=True)) if s > 0.9 * loaded
    )
    groups: list[list[int]] = []  # of points too close for a label between them
    last = 0.0
    for k, index in crowd:
        if groups and k <= CLOSE * last:
            groups[-1].append(index)
        else:
            groups.append([index])
        last = k
    for group in groups:
        for index in group:
            places[index] = "middle left"
        if len(group) > 1:
            places[group[0]], places[group[-1]] = "bottom left", "top left"
    return places


def empty_plane(loaded_bytes: int) -> "Figure":
    """Size against KL, empty: the front, then the points."""
    fig = figures.figure(
        "every setting tried on this text; lower left is better",
        x="size of the weights, MiB",
        y="KL from as loaded, nats/token",
        height=380,
    )
    fig.add_scatter(
        x=[], y=[], mode="lines", hoverinfo="skip",
        line={"color": figures.ORANGE, "dash": "dot", "width": 1.5, "shape": "hv"},
    )  # fmt: skip
    fig.add_scatter(
        x=[], y=[], mode="markers+text", text=[],
        textfont={"color": figures.INK}, marker={"size": 10},
        error_y={"array": [], "arrayminus": [], "color": figures.INK, "thickness": 1.2},
        hovertemplate="%{text}: %{x:,.1f} MiB, KL %{y:.4g}<extra></extra>",
    )  # fmt: skip
    fig.add_vline(
        x=loaded_bytes / 2**20, line={"color": figures.INK, "dash": "dot", "width": 1},
        annotation={"text": "as loaded", "font": {"color": figures.INK, "size": 11}},
    )  # fmt: skip
    fig.update_yaxes(type="log", exponentformat="power", dtick="D2")
    return fig.update_layout(showlegend=False)
