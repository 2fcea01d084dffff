"""Strategies: what they choose, how they are scored, what they put where."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ktlab
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import PlacementError, TraceError
from ktlab.experts.caches import replay
from ktlab.model.model import Model
from ktlab.model.trace import Trace
from ktlab.placement.placement import ModelShape
from ktlab.placement.plan import plan
from ktlab.placement.strategies import (
    STRATEGIES,
    Chosen,
    Fixed,
    LayerBudget,
    divided,
    get_strategy,
)
from ktlab.placement.strategy_placement import intensities, place
from ktlab.placement.strategy_scores import Scores, curves, score
from tests.routing.synthetic import draw, holes, trace_of

SHAPE = ModelShape(name="toy", layers=4, dense_layers=1, experts=8, shared=True, hidden=64)
SKEW = {1: np.ones(8), 2: 1 / np.arange(1, 9) ** 2, 3: np.arange(1, 9) ** 1.0}
"""Layer 1 has no favourites, 2 the low numbers, 3 the high ones."""


def toy(tokens: int = 600, seed: int = 0) -> Trace:
    ids = {i: holes(draw(load, tokens, 3, seed=seed + i), seed=i) for i, load in SKEW.items()}
    return trace_of(ids, 8)


def names(*, fixed: bool) -> list[str]:
    return [name for name, s in STRATEGIES.items() if isinstance(s, Fixed) == fixed]


@pytest.mark.parametrize("name", names(fixed=True))
def test_fixed_ones_choose_as_many_as_there_is_room_for(name: str) -> None:
    strategy, profile = get_strategy(name), toy()
    for count in (0, 1, 7, 12, 24):
        chosen = strategy.chosen(SHAPE, count, profile)
        assert tuple(chosen) == (1, 2, 3) and sum(map(len, chosen.values())) == count
        assert all(sorted(set(ids)) == list(ids) for ids in chosen.values())
    with pytest.raises(PlacementError, match="0 to 24"):
        strategy.chosen(SHAPE, 25, profile)


def test_they_choose_what_they_say() -> None:
    profile = toy()

    def chosen(name: str, count: int) -> dict[int, tuple[int, ...]]:
        return dict(get_strategy(name).chosen(SHAPE, count, profile))

    assert chosen("uniform", 7) == {1: (0, 1, 2), 2: (0, 1), 3: (0, 1)}
    assert chosen("front-loading", 11) == {1: tuple(range(8)), 2: (0, 1, 2), 3: ()}
    assert chosen("intensity", 11) == chosen("front-loading", 11)
    assert chosen("frequency", 1) == {1: (), 2: (0,), 3: ()}
    static = chosen("static", 6)
    assert static[2] == (0, 1) and static[3] == (6, 7) and len(static[1]) == 2
    kept = chosen("frequency", 12)[2]
    load_E = np.bincount(profile["layers.2.router.ids"].ravel() + 1, minlength=9)[1:]
    assert set(kept) == set(np.argsort(-load_E, kind="stable")[: len(kept)])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_room_is_divided_as_well_as_it_can_be(layers: int, most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gains = rng.integers(0, 5, size=(layers, most))
    worth_LC = np.concatenate([np.zeros((layers, 1)), np.cumsum(gains, axis=1)], axis=1)
    counts = list(range(layers * most + 1))
    for count, rooms_L in zip(counts, divided(worth_LC, counts), strict=True):
        assert rooms_L.sum() == count
        found = sum(worth_LC[i, c] for i, c in enumerate(rooms_L))
        every = (r for r in product(range(most + 1), repeat=layers) if sum(r) == count)
        assert found == max(sum(worth_LC[i, c] for i, c in enumerate(r)) for r in every)


def test_a_layers_room_follows_its_hits_on_the_profile() -> None:
    """One layer asks for the same two again and again, the other for anything."""
    same = np.tile([[0, 1]], (400, 1))
    trace = trace_of({1: same, 2: draw(np.ones(8), 400, 2)}, 8)
    found = replay(trace, policies=("lru", LayerBudget()))
    assert found.hit_rate("layer-budget", 1).value > found.hit_rate("lru", 1).value + 0.1
    chosen = LayerBudget().chosen(
        ModelShape(name="toy", layers=3, dense_layers=1, experts=8, shared=False, hidden=8),
        4, trace,
    )  # fmt: skip
    assert chosen[1] == (0, 1) and len(chosen[2]) == 2


def by_hand(chosen: Chosen, ids: dict[int, NDArray]) -> float:
    hits = sum(int(np.isin(x[x >= 0], chosen[i]).sum()) for i, x in ids.items())
    return hits / sum(int((x >= 0).sum()) for x in ids.values())


@pytest.mark.parametrize("name", names(fixed=True))
def test_hit_rates_are_those_of_the_choice_on_held_out_text(name: str) -> None:
    trace = toy()
    held_T = trace.routing.held_out_T()
    profile = trace_of({i: trace.routing.ids(i)[~held_T] for i in SKEW}, 8)
    scored = {i: trace.routing.ids(i)[held_T] for i in SKEW}
    found = curves([name], trace)
    for capacity in (0, 1, 3, 8):
        expected = by_hand(get_strategy(name).chosen(SHAPE, 3 * capacity, profile), scored)
        if name != "layer-budget":  # that one is a cache of this size
            assert found.hit_rate(name, capacity).value == pytest.approx(expected)


def test_scores_of_all_strategies_on_one_trace() -> None:
    trace = toy(900)
    found = score(None, trace, 9)
    assert {row.strategy for row in found.rows} == set(STRATEGIES) and found.budget == 9
    rates = [row.hit_rate.value for row in found.rows]
    assert rates == sorted(rates, reverse=True)
    assert all(row.hit_rate.low <= row.hit_rate.value <= row.hit_rate.high for row in found.rows)
    bound = found["oracle-shared"].hit_rate.value
    for row in found.rows:
        if not row.strategy.endswith("+next"):
            assert row.hit_rate.value <= bound + 1e-12, row.strategy
        assert row.loads_per_token.value >= found["oracle-shared"].loads_per_token.value - 1e-9
    assert found["frequency"].hit_rate.value > found["uniform"].hit_rate.value
    assert Scores.from_json(found.to_json()) == found
    frame = found.to_frame()
    assert frame.loc["static", "needs_profile"] and not frame.loc["uniform", "needs_profile"]
    assert frame.loc["lru", "moves"] and "9 of 24 experts" in repr(found)
    assert "<table>" in found._repr_mimebundle_()["text/html"]
    fig = found.plot()
    assert {n for trace in fig.data for n in trace.y} == set(STRATEGIES)
    assert score(None, trace, 11).budget == 9, "a whole number a layer"
    some = curves(["lru", "frequency"], trace)
    assert [r.strategy for r in score(["lru", "frequency"], trace, 9, replayed=some).rows] == [
        row.strategy for row in found.rows if row.strategy in ("lru", "frequency")
    ]


def test_a_profile_of_its_own_trains_and_all_of_the_text_is_scored() -> None:
    profile, trace = toy(400, seed=50), toy(300, seed=7)
    found = score(["frequency"], trace, 12, profile=profile)
    chosen = get_strategy("frequency").chosen(SHAPE, 12, profile)
    ids = {i: trace.routing.ids(i) for i in SKEW}
    assert found.tokens == 300
    assert found["frequency"].hit_rate.value == pytest.approx(by_hand(chosen, ids))


def test_intensities_are_the_published_ones() -> None:
    """MLA's 512 (on 512 of 576 numbers) against 0.075 (KTransformers' DeepSeek-V2 tutorial)."""
    found = intensities("deepseek-v2", format="q4_k_m")
    assert found.index[0] == "cache" and found.loc["cache", "use"] == pytest.approx(512, rel=0.06)
    assert found.loc["experts", "use"] == pytest.approx(0.075)
    assert list(found.index[-3:]) != [] and found.loc["embedding", "use"] == 0


@pytest.mark.parametrize("name", names(fixed=True))
def test_a_placement_fills_the_gpu_and_fits(name: str) -> None:
    model = ktlab.load("tiny")
    profile = model.trace("def quicksort(items):\n    return sorted(items)\n" * 4)
    found = place(name, model, vram="510MB", profile=profile, context=512)
    assert found.fits and found.placement is not None
    assert found.placement.device("attention", layer=3) == "cuda:0"
    kept = sum(len(found.placement.experts(layer=i, device="cuda:0")) for i in range(1, 7))
    assert 0 < kept < 384
    with_one_more = found["cuda:0"].headroom
    expert = 3 * 96 * 256 * 4.25 / 8
    assert with_one_more is not None and with_one_more < 2 * expert, "no room is left unused"
    assert plan("tiny", placement=found.placement, vram="510MB", context=512).fits


def test_a_big_model_by_intensity_and_by_experts() -> None:
    found = place("intensity", "deepseek-v3", format="q4_k_m", vram="8GB")
    placement = found.placement
    assert found.fits and placement is not None
    assert placement.device("attention", layer=0) == "cuda:0"
    assert placement.device("embedding") == "cpu"
    assert not placement.experts(layer=3, device="cuda:0")
    whole = place("uniform", "deepseek-v3", format="q4_k_m", vram="24GB").placement
    assert whole is not None
    counts = [len(whole.experts(layer=i, device="cuda:0")) for i in range(3, 61)]
    assert max(counts) - min(counts) <= 1 and min(counts) > 3


def test_what_cannot_be_placed_or_scored_is_said() -> None:
    model = ktlab.load("tiny")
    trace = model.trace("a short text of a few tokens")
    for arguments, words in (
        (("frequency", model, "1GB", None), "chooses by a routing profile and was given none"),
        (("frequency", model, "1GB", "text"), r"the profile is a str.*Trace.load\('text'\)"),
        (("lru", model, "1GB", None), "no fixed placement"),
        (("freqency", model, "1GB", None), 'did you mean "frequency"'),
        (("uniform", model, None, None), "nothing says how large"),
        (("uniform", "deepseek-v3", "8GB", None), "GB too little"),
        (("intensity", "deepseek-v3", "501MB", None), "hold no operator"),
        (("frequency", "deepseek-v3", "24GB", trace), "64 experts a layer, not 256"),
        (("uniform", Model(synthesize(TINY_TEST_CONFIG)), "1GB", None), "made in memory"),
    ):
        name, source, vram, profile = arguments
        with pytest.raises(PlacementError, match=words):
            place(name, source, vram=vram, profile=profile)
    bad: list[Any] = ["9", 9.5, True, None, -1, 25]
    for wrong in bad:
        with pytest.raises(PlacementError, match="expected a whole number from 0 to 24"):
            score(["lru"], toy(), wrong)
        with pytest.raises(PlacementError, match="uniform, count = .* whole number from 0 to 24"):
            get_strategy("uniform").chosen(SHAPE, wrong)
    assert score(["lru"], toy(), np.int64(9)).budget == 9
    other = Model(synthesize(TINY_TEST_CONFIG)).trace(list(range(9)))
    with pytest.raises(TraceError, match="expected a trace of ktlab tiny"):
        place("frequency", model, vram="1GB", profile=other)
    with pytest.raises(PlacementError, match="24 experts in 3 layers"):
        score(None, toy(), 25)
    with pytest.raises(PlacementError, match="was not scored"):
        score(["lru"], toy(), 3)["lfu"]
    with pytest.raises(TraceError, match="the very|would be scored on"):
        score(["frequency"], toy(), 3, profile=toy())


def test_traces_without_routing_and_paths_of_traces() -> None:
    """What was not recorded is said, with what records it; a path is not read, but could be."""
    model = ktlab.load("tiny")
    bare = model.trace("a short text of a few tokens", names=["layers.1.attention.*"])
    some = model.trace("a short text of a few tokens", names=["layers.3.router.*"])
    path = Path("profiles/python.trace")
    unrecorded = (
        r"the (trace|profile) of ktlab tiny recorded no routing; record it with model.trace"
    )
    for wrong, words in ((bare, unrecorded), (path, r"Trace\.load\('profiles/python\.trace'\)")):
        with pytest.raises(PlacementError, match=f"frequency: .*{words}"):
            place("frequency", model, vram="1GB", profile=wrong)
        with pytest.raises(TraceError, match=words):
            score(["lru"], wrong, 9)
        with pytest.raises(TraceError, match=words):
            score(["frequency"], toy(), 9, profile=wrong)
    with pytest.raises(PlacementError, match="it has no recorded routing of layers 1-2, 4-6"):
        place("frequency", model, vram="1GB", profile=some)
