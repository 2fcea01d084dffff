"""Which experts belong on the fast device: strategies with one interface, scored on one trace.

A fixed strategy chooses experts once and gives a `Placement`; a cache moves them while the model
runs and is replayed. All are policies of `ktlab.experts.caches.replay`, so that their hit rates
stand side by side: learnt on one half of a text, scored on the other.

Letters: T tokens, K selected, L layers with experts, E experts, C capacities 0..E a layer.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import PlacementError, TraceError, nearest, short
from ktlab.experts.cache_order import positions
from ktlab.experts.halves import Halves, Ids, routing_of
from ktlab.experts.policies import KNOWN, Hits
from ktlab.placement.placement import ModelShape
from ktlab.placement.ranges import write_ranges
from ktlab.routing.intervals import sums
from ktlab.routing.selections import hot

Chosen = Mapping[int, tuple[int, ...]]
"""{layer: experts on the fast device}."""


class Strategy:
    """What all strategies answer."""

    name: str
    about: str
    """What it does and who says so, in one line."""
    needs_profile: bool = False
    moves: bool = False
    """Whether experts move while the model runs."""

    def chosen(self, shape: ModelShape, count: int, profile: Any = None) -> Chosen:
        """The `count` experts, of all layers together, that go on the fast device.

        `profile` is a trace of this model. PlacementError without one where it is needed, with one
        of another model, and for a cache, which has no fixed choice.
        """
        raise NotImplementedError

    def hits(self, halves: Halves) -> Hits:
        """Lookups found at each capacity: what `replay` asks of a policy."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


class Fixed(Strategy):
    """Chooses once. Subclasses say in which order, or which at all."""

    def order(self, layers: int, experts: int, profile: Ids | None) -> NDArray[np.int64]:
        """(L * E,) all experts, those to keep first; e of the l-th layer is l * E + e."""
        raise NotImplementedError

    def mask(
        self, layers: int, experts: int, profile: Ids | None, counts: Sequence[int]
    ) -> NDArray[np.bool_]:
        """(N, L, E) which experts are kept where there is room for each of the N `counts`."""
        rank = np.empty(layers * experts, np.int64)
        rank[self.order(layers, experts, profile)] = np.arange(layers * experts)
        return (rank < np.asarray(counts)[:, None]).reshape(-1, layers, experts)

    def chosen(self, shape: ModelShape, count: int, profile: Any = None) -> Chosen:
        layers, experts = tuple(shape.moe_layers), shape.experts
        check_count(
            f"{self.name}, count", count, layers=len(layers), experts=experts, model=shape.name
        )
        ids = self._learnt(shape, profile)
        (mask_LE,) = self.mask(len(layers), experts, ids, [count])
        return {
            layer: tuple(int(e) for e in np.flatnonzero(mask_E))
            for layer, mask_E in zip(layers, mask_LE, strict=True)
        }

    def hits(self, halves: Halves) -> Hits:
        layers, experts = len(halves.layers), halves.num_experts
        counts = [layers * capacity for capacity in range(experts + 1)]
        mask_CLE = self.mask(layers, experts, halves.profile, counts)
        found = {}
        for at, layer in enumerate(halves.layers):
            asked_BE = sums(hot(halves.scored[layer], experts), halves.unit_T)
            found[layer] = asked_BE @ mask_CLE[:, at].T
        return Hits(found=found)

    def _learnt(self, shape: ModelShape, profile: Any) -> Ids | None:
        """The profile's choices by layer, checked."""
        if not self.needs_profile:
            return None
        if profile is None:
            raise PlacementError(
                f"{self.name} chooses by a routing profile and was given none; record one: "
                "profile=model.trace(text)"
            )
        try:
            statistics = routing_of(profile, "profile")
        except TraceError as error:
            raise PlacementError(f"{self.name}: {error}") from None
        model, layers = statistics.trace.model, statistics.layers
        wanted = tuple(shape.moe_layers)
        problems = []
        if model.num_experts != shape.experts:
            problems.append(f"{model.num_experts} experts a layer, not {shape.experts}")
        if missing := [layer for layer in wanted if layer not in layers]:
            untraced = set(missing) <= set(model.moe_layers)
            what = "recorded routing" if untraced else "router"
            problems.append(f"no {what} of layers {write_ranges(missing)}")
        if outside := [layer for layer in layers if layer not in wanted]:
            problems.append(f"routers of layers {write_ranges(outside)}, which have none here")
        if problems:
            raise PlacementError(
                f"{self.name}: the profile is of {model.name} and does not fit {shape.name}: it "
                f"has {'; '.join(problems)}"
            )
        return {layer: statistics.ids(layer) for layer in wanted}


class Uniform(Fixed):
    name = "uniform"
    about = "the same number in each layer, lowest numbers first (kt-kernel's uniform)"

    def order(self, layers: int, experts: int, profile: Ids | None) -> NDArray[np.int64]:
        return np.arange(layers * experts).reshape(layers, experts).T.ravel()


class FrontLoading(Fixed):
    name = "front-loading"
    about = "all of the first layers (kt-kernel's front-loading; llama.cpp's --n-cpu-moe backwards)"

    def order(self, layers: int, experts: int, profile: Ids | None) -> NDArray[np.int64]:
        return np.arange(layers * experts)


class ArithmeticIntensity(FrontLoading):
    """Its `place` (strategy_placement) puts whole operators in order of `Part.use`."""

    name = "intensity"
    about = "what a token uses most of what is stored (KTransformers); experts are alike: in order"


class Frequency(Fixed):
    name = "frequency"
    about = "the hottest of the profile, whatever layer they are in (kt-kernel's frequency)"
    needs_profile = True

    def order(self, layers: int, experts: int, profile: Ids | None) -> NDArray[np.int64]:
        return np.argsort(-loads(profile, experts).ravel(), kind="stable")


class Hottest(Fixed):
    name = "static"
    about = "the hottest of the profile, the same number in each layer"
    needs_profile = True

    def order(self, layers: int, experts: int, profile: Ids | None) -> NDArray[np.int64]:
        ranked_LE = np.argsort(-loads(profile, experts), axis=1, kind="stable")
        return (ranked_LE + np.arange(layers)[:, None] * experts).T.ravel()


class LayerBudget(Fixed):
    """An LRU cache in each layer, as large as its hits on the profile deserve.

    Of all ways to divide the room among the layers the one with the most hits on the profile, which
    is replayed from an empty cache. As a placement: each layer's hottest, so many.
    """

    name = "layer-budget"
    moves = True
    about = "LRU caches, the room divided among layers for the most hits on the profile"
    needs_profile = True

    def mask(
        self, layers: int, experts: int, profile: Ids | None, counts: Sequence[int]
    ) -> NDArray[np.bool_]:
        rank_LE = np.argsort(np.argsort(-loads(profile, experts), axis=1, kind="stable"), axis=1)
        return rank_LE[None] < self.rooms(profile, experts, counts)[:, :, None]

    def hits(self, halves: Halves) -> Hits:
        counts = [len(halves.layers) * capacity for capacity in range(halves.num_experts + 1)]
        rooms_CL = self.rooms(halves.profile, halves.num_experts, counts)
        whole = KNOWN["lru"].hits(halves).found
        return Hits(
            found={
                layer: whole[layer][:, rooms_CL[:, at]] for at, layer in enumerate(halves.layers)
            }
        )

    def rooms(self, profile: Ids | None, experts: int, counts: Sequence[int]) -> NDArray[np.int64]:
        """(N, L) room of each layer where there is room for each of the N `counts` in all."""
        assert profile is not None
        hits_LC = []
        for ids_TK in profile.values():
            position_TK, _, _ = positions("lru", ids_TK[:0], ids_TK, experts)
            found = np.bincount(position_TK[position_TK > 0], minlength=experts + 2)
            hits_LC.append(np.cumsum(found[: experts + 1]))
        return divided(np.array(hits_LC, float), counts)


class Cache(Strategy):
    """A policy of `ktlab.experts.policies` among the strategies."""

    moves = True

    def __init__(self, policy: str, about: str) -> None:
        self.name, self.about = policy, about

    def chosen(self, shape: ModelShape, count: int, profile: Any = None) -> Chosen:
        raise PlacementError(
            f"{self.name} moves experts while the model runs, so it has no fixed placement; "
            "strategy_scores.score replays it over a trace"
        )

    def hits(self, halves: Halves) -> Hits:
        return KNOWN[self.name].hits(halves)


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        ArithmeticIntensity(),
        Uniform(),
        FrontLoading(),
        Frequency(),
        Hottest(),
        LayerBudget(),
        Cache("lru", "a cache in each layer, of those used most recently"),
        Cache("lru+next", "such caches, and the next layer's experts foreseen and fetched"),
        Cache("lfu", "a cache in each layer, of those used most often"),
        Cache("lfu+next", "such caches, and the next layer's experts foreseen and fetched"),
        Cache("least-stale", "one cache: what this token has not used goes first (SpecMD)"),
        Cache("oracle", "the bound of a cache in each layer: those needed again soonest"),
        Cache("oracle-shared", "the bound of one cache for all layers"),
    )
}
"""By name."""


def get_strategy(strategy: "str | Strategy") -> Strategy:
    """A strategy by its name; PlacementError with the nearest for an unknown one."""
    if not isinstance(strategy, str):
        return strategy
    if strategy not in STRATEGIES:
        raise PlacementError(
            f"strategy {strategy!r}{nearest(strategy, STRATEGIES)}; there are "
            f"{', '.join(STRATEGIES)}"
        )
    return STRATEGIES[strategy]


def check_count(what: str, count: object, *, layers: int, experts: int, model: str) -> None:
    """PlacementError unless `count` is a number of experts that the layers have together."""
    most = layers * experts
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not whole or not 0 <= count <= most:  # type: ignore[operator]
        raise PlacementError(
            f"{what} = {short(count)}: expected a whole number from 0 to {most}; {model} has "
            f"{most} experts in {layers} layers"
        )


def loads(profile: Ids | None, experts: int) -> NDArray[np.int64]:
    """(L, E) how often each expert was selected."""
    assert profile is not None
    if not any((ids_TK >= 0).any() for ids_TK in profile.values()):
        raise TraceError("the profile selects no expert at all; trace a longer text")
    return np.stack(
        [np.bincount(ids_TK[ids_TK >= 0], minlength=experts) for ids_TK in profile.values()]
    )


def divided(worth_LC: NDArray[np.float64], counts: Sequence[int]) -> NDArray[np.int64]:
    """(N, L) how to divide each of the N `counts` among L layers so that the sum of what each layer
    is worth with its share (worth_LC, C = 0..E, never falling) is largest; exact, layer by layer.
    """
    layers, most = worth_LC.shape[0], worth_LC.shape[1] - 1
    best = np.zeros(1)
    taken: list[NDArray[np.int64]] = []
    for worth_C in worth_LC:
        new = np.full(len(best) + most, -np.inf)
        share = np.zeros(len(new), np.int64)
        for c in range(most + 1):
            reached = new[c : c + len(best)]
            better = best + worth_C[c] > reached
            share[c : c + len(best)][better] = c
            reached[better] = (best + worth_C[c])[better]
        best = new
        taken.append(share)
    found = np.zeros((len(counts), layers), np.int64)
    for row, count in enumerate(counts):
        left = count
        for layer in reversed(range(layers)):
            found[row, layer] = taken[layer][left]
            left -= found[row, layer]
    return found
