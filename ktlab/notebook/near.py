"""Experts that are near, as a table of yes and no: what it hits, and where it puts a model.

No widgets. L layers with experts, E experts, B units of resampling.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktlab import figures
from ktlab.experts.halves import Halves
from ktlab.interval import Interval
from ktlab.placement.machine import CPU, GPU
from ktlab.placement.placement import ModelShape, Placement
from ktlab.placement.strategies import Fixed, get_strategy
from ktlab.placement.strategy_placement import with_experts
from ktlab.routing import intervals
from ktlab.routing.selections import hot

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

Cell = tuple[str, int | None]
"""A component of a layer; None: there once."""
PARTS = ("embedding", "attention", "shared", "dense", "output")
"""What can be moved as a whole; cache, norms and router go where attention goes."""
FAR = [[0, "rgba(0,114,178,0.12)"], [0.499, "rgba(0,114,178,0.85)"]]
NEAR = [[0.5, "rgba(230,159,0,0.30)"], [1, "rgba(230,159,0,1)"]]
"""Blue as a CPU's experts in a placement's grid, orange as a GPU's; the stronger, the more used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """What is learnt of a trace, and what choices of experts are scored on."""

    shape: ModelShape
    halves: Halves

    @classmethod
    def of(cls, model: "Model", trace: Any) -> "Routes":
        """TraceError for a trace of another model."""
        return cls(
            shape=ModelShape.of(model.config), halves=Halves.of(trace.require(model.identity))
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return self.halves.layers

    @cached_property
    def load_LE(self) -> NDArray[np.float64]:
        """Load of each expert on the profile half, in multiples of uniform."""
        counts_LE = np.stack(
            [hot(ids_TK, self.shape.experts).sum(0) for ids_TK in self.halves.profile.values()]
        )
        return counts_LE / np.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-9)

    @cached_property
    def _asked(self) -> tuple[NDArray[np.float64], ...]:
        """(B, E) lookups of each expert in each unit of held-out text, by layer."""
        unit_T = self.halves.unit_T
        return tuple(
            intervals.sums(hot(ids_TK, self.shape.experts), unit_T)
            for ids_TK in self.halves.scored.values()
        )

    def choose(self, strategy: str, count: int) -> NDArray[np.bool_]:
        """(L, E) what a fixed strategy keeps near, having seen the profile half."""
        found = get_strategy(strategy)
        if not isinstance(found, Fixed):
            found.chosen(self.shape, count)  # says why it has no choice to show
            raise AssertionError
        layers, experts = len(self.layers), self.shape.experts
        return found.mask(layers, experts, self.halves.profile, [count])[0]

    def hit_rate(self, near_LE: NDArray[np.bool_]) -> Interval:
        """Share of held-out lookups whose expert is near."""
        pairs = zip(self._asked, near_LE, strict=True)
        found_B = np.sum([asked_BE[:, near_E].sum(1) for asked_BE, near_E in pairs], axis=0)
        asked_B = np.sum([asked_BE.sum(1) for asked_BE in self._asked], axis=0)
        return intervals.ratio(found_B, asked_B)

    @cached_property
    def loads(self) -> dict[int, NDArray[np.float64]]:
        """{layer: (E,) held-out lookups of each expert}, as `ktlab.predict` takes them."""
        return {
            layer: asked_BE.sum(0) for layer, asked_BE in zip(self.layers, self._asked, strict=True)
        }

    @property
    def lookups_per_token(self) -> float:
        """Experts that a token asks for, over all layers."""
        return float(sum(asked_BE.sum() for asked_BE in self._asked) / self.halves.tokens)

    @property
    def top_k(self) -> int:
        """Experts that a token asks a layer for, to the nearest."""
        return max(1, round(self.lookups_per_token / len(self.layers)))

    def placement(self, near_LE: NDArray[np.bool_], far: Collection[Cell] = ()) -> Placement:
        """All on the GPU but the experts that are not near, and the parts that are `far`."""
        found = Placement.everywhere(self.shape, GPU).put("experts", CPU)
        for component, layer in far:
            found = found.put(component, CPU, layers=[layer])
        return with_experts(found, self.chosen(near_LE))

    def chosen(self, near_LE: NDArray[np.bool_]) -> Mapping[int, tuple[int, ...]]:
        """{layer: experts that are near}."""
        return {
            layer: tuple(int(e) for e in np.flatnonzero(near_E))
            for layer, near_E in zip(self.layers, near_LE, strict=True)
        }

    def shades(self, near_LE: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(L, E) 0 to 1 for an expert that is far, by its load, 1 to 2 for one that is near."""
        strength_LE = np.clip(self.load_LE / float(self.load_LE.max()), 0, 0.99)
        return near_LE + strength_LE


def expert_map(routes: Routes, near_LE: NDArray[np.bool_], *, title: str = "") -> "Figure":
    """A cell for each expert, coloured by where it is; hovering tells its load."""
    layers = len(routes.layers)
    fig = figures.figure(title, x="expert", y="layer", height=110 + max(22, 240 // layers) * layers)
    fig.add_heatmap(
        z=routes.shades(near_LE), y=[str(layer) for layer in routes.layers], zmin=0, zmax=2,
        customdata=routes.load_LE, colorscale=[*FAR, *NEAR], showscale=False, xgap=1, ygap=2,
        hovertemplate="layer %{y}, expert %{x}: ×%{customdata:.2f} uniform in the profile"
        "<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(showgrid=False)
    return fig.update_yaxes(autorange="reversed", showgrid=False, type="category")


def part_cells(shape: ModelShape) -> list[list[Cell | None]]:
    """Rows of `PARTS`, columns: there once, then the layers; None where a part is not."""
    columns: list[int | None] = [None, *range(shape.layers)]
    rows = {name: set(shape.layers_of(name)) for name in PARTS}
    return [
        [(name, layer) if layer in there else None for layer in columns]
        for name, there in rows.items()
        if there
    ]


def part_shades(shape: ModelShape, far: Collection[Cell]) -> list[list[float | None]]:
    """What `part_map` colours by; None where a part is not (JSON has no nan)."""
    return [
        [None if cell is None else 0.9 if cell in far else 1.9 for cell in row]
        for row in part_cells(shape)
    ]


def part_map(shape: ModelShape, far: Collection[Cell]) -> "Figure":
    """A cell for each part of each layer that is placed as a whole."""
    cells = part_cells(shape)
    fig = figures.figure(x="layer", height=96 + 24 * len(cells))
    fig.add_heatmap(
        z=part_shades(shape, far), zmin=0, zmax=2, colorscale=[*FAR, *NEAR], showscale=False,
        x=["once", *map(str, range(shape.layers))], xgap=1, ygap=2,
        y=[next(cell[0] for cell in row if cell is not None) for row in cells],
        hovertemplate="%{y}, layer %{x}<extra></extra>", hoverongaps=False,
    )  # fmt: skip
    fig.update_xaxes(showgrid=False, type="category")
    return fig.update_yaxes(autorange="reversed", showgrid=False, type="category")
