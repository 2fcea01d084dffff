"""Expert caches replayed from a trace: how often an expert is already where it is needed.

A layer has room for c of its E experts on the fast device. What decides which: `ktlab.experts.
policies`. Every policy first sees the profile half of each domain's text and is scored on the other
half only; the oracle sees the scored half alone.

Letters: T tokens, K selected, E experts, L layers, C capacities 0..E, B units of resampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktlab import figures, html
from ktlab.errors import TraceError
from ktlab.experts.halves import Halves, routing_of
from ktlab.experts.policies import USUAL, Policy, get_policy
from ktlab.interval import Interval
from ktlab.routing import intervals

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A policy's hit rate, or its loads a token, at capacities 0..E, with the 95 % interval."""

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
    loads: Mapping[str, Curve]
    """Experts fetched for a token, over all layers, by policy: those that it looked up and did not
    find, and those fetched ahead."""
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
        return self._at(self.curve(policy, layer), capacity)

    def _at(self, curve: Curve, capacity: int) -> Interval:
        if not 0 <= capacity <= self.num_experts:
            raise TraceError(f"expected a capacity of 0..{self.num_experts}, found {capacity}")
        value, low, high = (float(a[capacity]) for a in (curve.rate_C, curve.low_C, curve.high_C))
        return Interval(value=value, low=low, high=high, n=self.units)

    def loads_per_token(self, policy: str, capacity: int) -> Interval:
        """Experts to fetch for a token, over all layers; times an expert's bytes: the traffic."""
        self.curve(policy)
        return self._at(self.loads[policy], capacity)

    def at(self, capacity: int) -> Any:
        """A pandas DataFrame at one capacity (experts a layer), a row for each policy: hit_rate,
        low, high, loads_per_token, loads_low and loads_high, best first."""
        import pandas as pd

        rows = [
            {
                "policy": policy,
                "hit_rate": rate.value,
                "low": rate.low,
                "high": rate.high,
                "loads_per_token": loads.value,
                "loads_low": loads.low,
                "loads_high": loads.high,
            }
            for policy in self.overall
            for rate in [self.hit_rate(policy, capacity)]
            for loads in [self.loads_per_token(policy, capacity)]
        ]
        frame = pd.DataFrame(rows).set_index("policy")
        return frame.sort_values("hit_rate", ascending=False, kind="stable")

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
        headers = ["experts", *self.overall, "blindly"]
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
    trace: Any,
    *,
    layers: Sequence[int] | None = None,
    policies: Sequence[str | Policy] = USUAL,
    profile: Any = None,
) -> CacheReplay:
    """Replay the routers' choices in a `Trace` (or its statistics) with room for 0 to E a layer.

    `policies` by name (`policies.KNOWN`) or as objects. Rates are scored on the held-out half, or
    on all of the trace with another as `profile`; the interval resamples blocks of its tokens.
    """
    statistics = routing_of(trace)
    layers = tuple(statistics.layers if layers is None else layers)
    if not policies or not layers:
        raise TraceError(
            f"expected at least one policy and one layer, found {len(policies)} policies and "
            f"{len(layers)} layers"
        )
    wanted = [get_policy(policy) for policy in policies]
    halves = Halves.of(statistics, layers=layers, profile=profile)
    looked_up_B = {
        layer: intervals.sums((ids_TK >= 0).sum(1), halves.unit_T)
        for layer, ids_TK in halves.scored.items()
    }
    total_B = np.sum(list(looked_up_B.values()), axis=0)
    weights_RB = intervals.draws(len(total_B))
    tokens_B = intervals.sums(np.ones(halves.tokens), halves.unit_T)
    overall, loads = {}, {}
    by_layer: dict[int, dict[str, Curve]] = {layer: {} for layer in layers}
    for policy in wanted:
        hits = policy.hits(halves)
        hits_BC = np.sum([hits.found[layer] for layer in layers], axis=0)
        overall[policy.name] = _curve(hits_BC, total_B, weights_RB)
        for layer in layers:
            curve = _curve(hits.found[layer], looked_up_B[layer], weights_RB)
            by_layer[layer][policy.name] = curve
        ahead_BC = sum(hits.ahead.values(), np.zeros_like(hits_BC))
        loads_BC = total_B[:, None] - hits_BC + ahead_BC
        loads[policy.name] = _curve(loads_BC, tokens_B, weights_RB, most=np.inf)
    return CacheReplay(
        overall=overall,
        by_layer=by_layer,
        loads=loads,
        num_experts=halves.num_experts,
        model=statistics.trace.model.name,
        tokens=halves.tokens,
        requests_per_token=float(total_B.sum() / halves.tokens),
        units=len(total_B),
        method=f"{halves.method}; {intervals.METHOD}",
    )


def _curve(counts_BC: NDArray, of_B: NDArray, weights_RB: NDArray, *, most: float = 1.0) -> Curve:
    """Counts of each unit over what they are of (lookups, tokens), at most `most`."""
    rate_C = counts_BC.sum(0) / max(1.0, of_B.sum())
    resampled_RC = (weights_RB @ counts_BC) / np.maximum(weights_RB @ of_B, 1)[:, None]
    low_C, high_C = intervals.spread(rate_C, resampled_RC, len(of_B))
    if len(of_B) > 1 or np.isfinite(most):  # one unit says nothing of what knows no bound
        low_C, high_C = np.clip(low_C, 0, most), np.clip(high_C, 0, most)
    return Curve(rate_C=rate_C, low_C=low_C, high_C=high_C)
