"""Which experts stay near: cache policies, replayed over what routers chose.

A token looks up all of a layer's experts before any is loaded; each one found is a hit. After that
the cache keeps as many as it has room for of what it held and what was just loaded.

Each layer with room for c experts of its own:

- lru: those used most recently (within a token the heavier choice counts as the more recent);
- lfu: those used most often so far (ties: most recently), so a rare expert need not be admitted;
- oracle: those needed again soonest, starting with any contents: no cache that loads on demand does
  better (Belady 1966; with bypass, so that it is optimal for sets of experts too). Nor does any
  cache at all load fewer experts;
- static: the c experts hottest in the profile, never changed;
- lru+next, lfu+next: before a layer's lookups, the experts foreseen from what the layer before has
  just chosen are fetched into its c places (speculative loading, arXiv 2312.17238; who is foreseen:
  `Halves.foreseen`). What was fetched and not used goes first. It may hit more often than the
  oracle, which never guesses, but it moves more.

One cache for all L layers, with room for c experts a layer on the average:

- lru-shared, oracle-shared: as above;
- least-stale: what this token has not used yet is stale and goes before what it has; of either,
  whose layer comes round last, then what was used longest ago. After SpecMD's Least-Stale (arXiv
  2602.03921), which keeps apart what the present pass has touched and what is left of earlier ones,
  and relies on layers coming in order; the order within the two is written here as we understand
  it.

With each a bigger cache contains the smaller one (Mattson et al. 1970), so one pass gives all
capacities. Letters: T tokens, K selected, E experts, L layers, B units of resampling, C capacities
0..E a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import TraceError, nearest
from ktlab.experts.cache_order import NOBODY, positions
from ktlab.experts.halves import Halves

Counts = Mapping[int, NDArray[np.float64]]
"""{layer: (B, C)}."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hits:
    """Lookups that found their expert, and experts fetched before they were looked up."""

    found: Counts
    ahead: Counts = field(default_factory=dict)


class Policy(Protocol):
    """Decides which experts are near; says how often they were."""

    @property
    def name(self) -> str: ...

    def hits(self, halves: Halves) -> Hits:
        """On the scored text, having learnt from the profile alone."""
        ...


@dataclass(frozen=True)
class OwnCache:
    """A cache for each layer: lru, lfu, static or oracle; with `ahead`, foreseen ones fetched."""

    order: str
    ahead: bool = False

    @property
    def name(self) -> str:
        return f"{self.order}+next" if self.ahead else self.order

    def hits(self, halves: Halves) -> Hits:
        found, fetched = {}, {}
        for layer in halves.layers:
            position_TK, before_TP, after_TP = positions(
                self.order, halves.profile[layer], halves.scored[layer], halves.num_experts,
                foreseen=halves.foreseen(layer) if self.ahead else (NOBODY, NOBODY),
            )  # fmt: skip
            found[layer] = counted(position_TK, halves.unit_T, halves.num_experts)
            if self.ahead:
                fetched[layer] = counted(after_TP, halves.unit_T, halves.num_experts) - counted(
                    before_TP, halves.unit_T, halves.num_experts
                )
        return Hits(found=found, ahead=fetched)


@dataclass(frozen=True)
class SharedCache:
    """One cache for all layers: lru, oracle or least-stale."""

    order: str

    @property
    def name(self) -> str:
        return self.order if self.order == "least-stale" else f"{self.order}-shared"

    def hits(self, halves: Halves) -> Hits:
        profile_TK, scored_TK = halves.together
        count = len(halves.layers)
        position_TK, _, _ = positions(
            self.order, profile_TK, scored_TK, count * halves.num_experts, layers=count
        )
        return Hits(found=spread(position_TK, halves))


def spread(position_TK: NDArray[np.int64], halves: Halves) -> dict[int, NDArray[np.float64]]:
    """{layer: (B, C)} hits, from the number of experts in all layers together at which each lookup
    of `halves.together` hits: capacity c a layer is L * c of those."""
    count = len(halves.layers)
    a_layer_TK = -(-position_TK // count)  # rounded up: at so many a layer it is in
    return {
        layer: counted(a_layer_TK[at::count], halves.unit_T, halves.num_experts)
        for at, layer in enumerate(halves.layers)
    }


def counted(
    position_TK: NDArray[np.int64], unit_T: NDArray[np.int64], num_experts: int
) -> NDArray[np.float64]:
    """(B, C) how many in each unit have a position up to the capacity; 0 is an empty place."""
    unit_B, row_T = np.unique(unit_T, return_inverse=True)
    key_TK = row_T[:, None] * (num_experts + 2) + np.minimum(position_TK, num_experts + 1)
    counts = np.bincount(key_TK[position_TK > 0], minlength=len(unit_B) * (num_experts + 2))
    return np.cumsum(counts.reshape(len(unit_B), -1)[:, : num_experts + 1], axis=1, dtype=float)


USUAL = ("lru", "lfu", "static", "oracle")
_ALL: tuple[Policy, ...] = (
    *(OwnCache(name) for name in USUAL),
    OwnCache("lru", ahead=True),
    OwnCache("lfu", ahead=True),
    SharedCache("lru"),
    SharedCache("least-stale"),
    SharedCache("oracle"),
)
KNOWN: Mapping[str, Policy] = {policy.name: policy for policy in _ALL}
"""By name."""


def get_policy(policy: str | Policy) -> Policy:
    """A policy by its name; TraceError with the nearest for an unknown one."""
    if not isinstance(policy, str):
        return policy
    if policy not in KNOWN:
        raise TraceError(
            f"expected policies out of {', '.join(KNOWN)}, found {policy!r}{nearest(policy, KNOWN)}"
        )
    return KNOWN[policy]
