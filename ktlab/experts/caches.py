"""Expert caches replayed from a trace: how often an expert is already where it is needed.

A layer has room for c of its E experts on the fast device. A token looks up all of its experts
before any is loaded; each one found is a hit. After the token the cache keeps c of what it held
plus what was just loaded:

- lru: those used most recently (within a token the heavier choice counts as the more recent);
- lfu: those used most often so far (ties: most recently), so a rare expert need not be admitted;
- oracle: those needed again soonest, starting with any contents: no cache that loads on demand
  does better (Belady 1966; with bypass, so that it is optimal for sets of experts too);
- static: the c experts hottest in the profile, never changed.

With each of the first three a bigger cache always contains the smaller one (Mattson et al. 1970),
so an expert's position in the policy's order says at which capacities it was a hit, and one pass
gives all capacities. Every policy first sees the profile half of each domain's text and is scored
on the other half only; the oracle sees the scored half alone.

Letters: T tokens, K selected, E experts, L layers, C capacities 0..E, B units of resampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktlab import figures, html
from ktlab.errors import TraceError, nearest
from ktlab.experts.cache_order import positions
from ktlab.interval import Interval
from ktlab.routing import intervals

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POLICIES = ("lru", "lfu", "static", "oracle")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hit rate of one policy at capacities 0..E, with its 95 % interval."""

    rate_C: NDArray[np.float64]
    low_C: NDArray[np.float64]
    high_C: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, repr=False)
class CacheReplay:
    """Hit rates by policy and capacity (experts a layer that fit), all layers and each."""

    overall: Mapping[str, Curve]
    by_layer: Mapping[int, Mapping[str, Curve]]
    num_experts: int
    model: str
    tokens: int
    """Scored tokens."""
    requests_per_token: float
    """Experts looked up by a token, over all layers."""
    units: int
    method: str

    @property
    def capacities(self) -> NDArray[np.int64]:
        return np.arange(self.num_experts + 1)

    @property
    def chance_C(self) -> NDArray[np.float64]:
        """Hit rate of c experts picked blindly: c / E."""
        return self.capacities / self.num_experts

    def curve(self, policy: str, layer: int | None = None) -> Curve:
        """One curve; without a layer over all of them at the same capacity each."""
        if layer is not None and layer not in self.by_layer:
            known = ", ".join(map(str, self.by_layer))
            raise TraceError(f"layer {layer} was not replayed; replayed: {known}")
        curves = self.overall if layer is None else self.by_layer[layer]
        if policy not in curves:
            raise TraceError(f"policy {policy!r} was not replayed; replayed: {', '.join(curves)}")
        return curves[policy]

    def hit_rate(self, policy: str, capacity: int, layer: int | None = None) -> Interval:
        """Share of looked-up experts that were there."""
        curve = self.curve(policy, layer)
        if not 0 <= capacity <= self.num_experts:
            raise TraceError(f"expected a capacity of 0..{self.num_experts}, found {capacity}")
        value, low, high = (float(a[capacity]) for a in (curve.rate_C, curve.low_C, curve.high_C))
        return Interval(value=value, low=low, high=high, n=self.units)

    def loads_per_token(self, policy: str, capacity: int) -> float:
        """Experts to fetch for a token, over all layers; times an expert's bytes: the traffic."""
        return (1 - self.hit_rate(policy, capacity).value) * self.requests_per_token

    def to_frame(self) -> Any:
        """A pandas DataFrame: layer ("all" or an index), policy, capacity, hit_rate, low, high."""
        import pandas as pd

        groups: list[tuple[object, Mapping[str, Curve]]] = [("all", self.overall)]
        groups += self.by_layer.items()
        frames = [
            pd.DataFrame(
                {
                    "layer": layer,
                    "policy": policy,
                    "capacity": self.capacities,
                    "hit_rate": curve.rate_C,
                    "low": curve.low_C,
                    "high": curve.high_C,
                    "chance": self.chance_C,
                }
            )
            for layer, curves in groups
            for policy, curve in curves.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def plot(self, layer: int | None = None) -> "Figure":
        """Hit rate against capacity, with bands."""
        curves = {policy: self.curve(policy, layer) for policy in self.overall}
        return figures.hit_rate_curves(
            self.capacities,
            {name: (c.rate_C, c.low_C, c.high_C) for name, c in curves.items()},
            self.chance_C,
            title="all layers" if layer is None else f"layer {layer}",
        )

    def __repr__(self) -> str:
        return "\n  ".join([self._title(), *(" | ".join(row) for row in self._rows()), self.method])

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        headers = ["experts a layer", *self.overall, "blindly"]
        table = html.table(self._rows(), headers)
        return html.mimebundle(repr(self), html.card(self._title(), table, self.method))

    def _title(self) -> str:
        return (
            f"Expert caches of {self.model}: hit rates on {self.tokens:,} held-out tokens, "
            f"{len(self.by_layer)} layers"
        )

    def _rows(self) -> list[list[str]]:
        rows = []
        for eighths in (1, 2, 4, 6):
            capacity = max(1, self.num_experts * eighths // 8)
            rates = [str(self.hit_rate(policy, capacity)) for policy in self.overall]
            rows.append([f"{capacity} of {self.num_experts}", *rates, f"{eighths / 8:.3g}"])
        return rows


def replay(
    trace: Any, *, layers: Sequence[int] | None = None, policies: Sequence[str] = POLICIES
) -> CacheReplay:
    """Replay the routers' choices in a `Trace` (or its statistics) through caches of every size.

    Rates are scored on the held-out half; the interval resamples blocks of its tokens.
    """
    statistics = getattr(trace, "routing", trace)
    layers = tuple(statistics.layers if layers is None else layers)
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown or not policies or not layers:
        raise TraceError(
            f"expected policies out of {', '.join(POLICIES)} and at least one layer, "
            f"found {', '.join(policies) or 'none'} and {len(layers)} layers"
            + nearest(unknown[0] if unknown else "", POLICIES)
        )
    experts, held_T = statistics.num_experts, statistics.held_out_T()
    unit_T = statistics.unit_T[held_T]
    looked_up_B: dict[int, NDArray] = {}
    hits_BC: dict[int, dict[str, NDArray]] = {}
    for layer in layers:
        ids_TK = statistics.ids(layer)
        looked_up_B[layer] = intervals.sums((ids_TK[held_T] >= 0).sum(1), unit_T)
        hits_BC[layer] = {
            policy: hits(position_TK, unit_T, experts)
            for policy, position_TK in (
                (p, positions(p, ids_TK[~held_T], ids_TK[held_T], experts)) for p in policies
            )
        }
    total_B = np.sum(list(looked_up_B.values()), axis=0)
    weights_RB = intervals.draws(len(total_B))
    return CacheReplay(
        overall={
            policy: _curve(
                np.sum([hits_BC[i][policy] for i in layers], axis=0), total_B, weights_RB
            )
            for policy in policies
        },
        by_layer={
            layer: {p: _curve(hits_BC[layer][p], looked_up_B[layer], weights_RB) for p in policies}
            for layer in layers
        },
        num_experts=experts,
        model=statistics.trace.model.name,
        tokens=int(held_T.sum()),
        requests_per_token=float(total_B.sum() / held_T.sum()),
        units=len(total_B),
        method="caches warmed on one half of each domain's text, scored on the other; "
        + intervals.METHOD,
    )


def hits(
    position_TK: NDArray[np.int64], unit_T: NDArray[np.int64], num_experts: int
) -> NDArray[np.float64]:
    """(B, C) hits in each unit at capacities 0..E."""
    unit_B, row_T = np.unique(unit_T, return_inverse=True)
    key_TK = row_T[:, None] * (num_experts + 2) + position_TK
    counts = np.bincount(key_TK[position_TK > 0], minlength=len(unit_B) * (num_experts + 2))
    return np.cumsum(counts.reshape(len(unit_B), -1)[:, : num_experts + 1], axis=1, dtype=float)


def _curve(hits_BC: NDArray, looked_up_B: NDArray, weights_RB: NDArray) -> Curve:
    rate_C = hits_BC.sum(0) / max(1.0, looked_up_B.sum())
    resampled_RC = (weights_RB @ hits_BC) / np.maximum(weights_RB @ looked_up_B, 1)[:, None]
    low_C, high_C = intervals.spread(rate_C, resampled_RC, len(looked_up_B))
    return Curve(rate_C=rate_C, low_C=np.clip(low_C, 0, 1), high_C=np.clip(high_C, 0, 1))
