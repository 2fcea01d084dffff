"""Caches that look ahead or are shared by the layers, against plain sets; what they learn from."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ktlab.errors import TraceError
from ktlab.experts.cache_order import positions
from ktlab.experts.caches import replay
from ktlab.experts.halves import Halves
from ktlab.experts.policies import KNOWN, Hits, SharedCache
from tests.experts.test_caches import E, K, histories
from tests.routing.synthetic import draw, holes, trace_of

L = 3


@st.composite
def guesses(draw_from: st.DrawFn, tokens: int, most: int = 3) -> NDArray:
    rows = st.lists(st.integers(0, E - 1), min_size=most, max_size=most, unique=True)
    kept = draw_from(st.integers(0, most))
    found = [draw_from(rows) for _ in range(tokens)]
    return np.array([row[:kept] + [-1] * (most - kept) for row in found]).reshape(-1, most)


def with_foresight(
    policy: str, ids: NDArray, guess: NDArray, start: int, capacity: int
) -> tuple[int, int]:
    """(hits, experts fetched ahead) from step `start` on, one cache as a plain set."""
    cache: set[int] = set()
    last: dict[int, tuple[int, int]] = {}
    uses: Counter[int] = Counter()

    def worth(e: int) -> tuple[int, tuple[int, int]]:
        return (uses[e] if policy == "lfu" else 0, last.get(e, (-1, 0)))

    found = fetched = 0
    for t, (row, ahead) in enumerate(zip(ids, guess, strict=True)):
        foreseen = [int(e) for e in ahead if e >= 0]
        if foreseen:
            rest = sorted(cache - set(foreseen), key=worth, reverse=True)
            after = set([*foreseen, *rest][:capacity])
            if t >= start:
                fetched += len(after - cache)
            cache = after
        asked = [int(e) for e in row if e >= 0]
        if t >= start:
            found += sum(e in cache for e in asked)
        for rank, e in enumerate(row):
            if e >= 0:
                last[int(e)] = (t, -rank)
        uses.update(asked)
        cache = set(sorted(cache | set(asked), key=worth, reverse=True)[:capacity])
    return found, fetched


@given(st.data(), histories(longest=14), st.sampled_from(["lru", "lfu"]))
@settings(max_examples=80, deadline=None)
def test_foreseen_experts_are_fetched_before_the_lookups(
    data: st.DataObject, scored: NDArray, policy: str
) -> None:
    # All are used once before: of experts that never were, any may go first.
    every = np.pad(np.arange(E), (0, -E % K), constant_values=-1).reshape(-1, K)
    guess = data.draw(guesses(len(scored)))
    nobody = np.full((len(every), guess.shape[1]), -1)
    position_TK, before_TP, after_TP = positions(policy, every, scored, E, foreseen=(nobody, guess))
    best_TK, _, _ = positions("oracle", every, scored, E)
    ids, ahead = np.concatenate([every, scored]), np.concatenate([nobody, guess])
    for capacity in range(E + 1):
        hits = int(((position_TK > 0) & (position_TK <= capacity)).sum())
        moved = int(((after_TP > 0) & (after_TP <= capacity) & (capacity < before_TP)).sum())
        assert (hits, moved) == with_foresight(policy, ids, ahead, len(every), capacity)
        misses = int((position_TK > 0).sum()) - hits
        assert misses + moved >= int((best_TK > capacity).sum()), "the oracle loads fewest"


def least_stale(ids: NDArray, capacity: int) -> int:
    """Hits of one cache for all layers; `ids` (T * L, K) with numbers l * E + e."""
    cache: set[int] = set()
    last: dict[int, tuple[int, int]] = {}
    found = 0
    for step, row in enumerate(ids):
        asked = [int(e) for e in row if e >= 0]
        found += sum(e in cache for e in asked)
        for rank, e in enumerate(row):
            if e >= 0:
                last[int(e)] = (step, -rank)

        def worth(e: int, step: int = step) -> tuple[bool, int, tuple[int, int]]:
            used_by_this_token = last[e][0] // L == step // L
            rounds = (e // E - step % L - 1) % L + 1
            return used_by_this_token, -rounds, last[e]

        cache = set(sorted(cache | set(asked), key=worth, reverse=True)[:capacity])
    return found


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_least_stale_equals_a_cache_of_each_size(tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids_TLK = np.argsort(rng.random((tokens, L, E)), axis=2)[:, :, :K]
    ids = (ids_TLK + np.arange(L)[None, :, None] * E).reshape(-1, K)
    position_TK, _, _ = positions("least-stale", ids[:0], ids, L * E, layers=L)
    for capacity in range(L * E + 1):
        assert int((position_TK <= capacity).sum()) == least_stale(ids, capacity)


def chained(tokens: int, seed: int = 0) -> dict[int, NDArray]:
    """Layer 2 selects what layer 1 did, two numbers on."""
    first = draw(np.ones(16), tokens, 2, seed=seed)
    return {1: first, 2: (first + 2) % 16}


def test_what_follows_from_the_layer_before_is_foreseen() -> None:
    found = replay(trace_of(chained(2000), 16), policies=("lru", "lru+next", "oracle"))
    assert found.hit_rate("lru+next", 2, layer=2).value > 0.95
    assert found.hit_rate("lru", 2, layer=2).value < 0.25
    assert found.hit_rate("lru+next", 2, layer=1) == found.hit_rate("lru", 2, layer=1)
    assert found.hit_rate("lru+next", 2).value > found.hit_rate("oracle", 2).value
    for capacity in (0, 2, 5, 16):
        moved = found.loads_per_token("lru+next", capacity).value
        assert moved >= found.loads_per_token("oracle", capacity).value - 1e-9, "nobody moves less"
    assert found.loads_per_token("lru+next", 0).value == found.requests_per_token
    missed = (1 - found.hit_rate("lru+next", 5).value) * found.requests_per_token
    assert found.loads_per_token("lru+next", 5).value > missed, "what was fetched ahead counts"
    frame = found.at(2)
    assert list(frame.index) == ["lru+next", "oracle", "lru"]
    assert frame.loc["lru", "loads_per_token"] == found.loads_per_token("lru", 2).value


def test_every_known_policy_is_scored_on_the_same_text() -> None:
    ids = {i: holes(draw(1 / np.arange(1, 9), 600, 3, seed=i), seed=i) for i in (1, 2, 3)}
    trace = trace_of(ids, 8)
    found = replay(trace, policies=tuple(KNOWN))
    assert tuple(found.overall) == tuple(KNOWN)
    for name in KNOWN:
        curve = found.curve(name)
        assert curve.rate_C[0] == 0 and (np.diff(curve.rate_C) >= -1e-12).all(), name
        assert curve.rate_C[8] >= 0.99, name
        by_hand = [found.curve(name, layer).rate_C[4] for layer in (1, 2, 3)]
        assert min(by_hand) <= curve.rate_C[4] <= max(by_hand)
    shared, own = (found.curve(name).rate_C for name in ("oracle-shared", "oracle"))
    assert (shared >= own - 1e-12).all(), "a cache for all layers may do what those of each do"
    for name in ("lru-shared", "least-stale"):
        assert (found.curve(name).rate_C <= shared + 1e-12).all()
    assert len(found.plot().data) == 2 * len(KNOWN) + 1


def test_a_policy_of_ones_own() -> None:
    class Even:
        """Experts with even numbers."""

        name = "even"

        def hits(self, halves: Halves) -> Hits:
            capacities = np.arange(halves.num_experts + 1) > 0
            return Hits(
                found={
                    layer: np.outer(
                        [
                            ((x[halves.unit_T == u] % 2) == 0).sum()
                            for u in np.unique(halves.unit_T)
                        ],
                        capacities,
                    ).astype(float)
                    for layer, x in halves.scored.items()
                }
            )

    found = replay(trace_of({1: draw(np.ones(8), 400, 2)}, 8), policies=("lru", Even()))
    assert 0.4 < found.hit_rate("even", 1).value < 0.6


def test_with_a_profile_all_of_the_text_is_scored() -> None:
    trace = trace_of({1: draw(1 / np.arange(1, 9), 400, 2, seed=1)}, 8)
    profile = trace_of({1: draw(1 / np.arange(1, 9), 300, 2, seed=2)}, 8)
    found = replay(trace, policies=("static",), profile=profile)
    assert found.tokens == 400 and "another text" in found.method
    hottest = np.argsort(-np.bincount(profile["layers.1.router.ids"].ravel(), minlength=8))[:3]
    expected = np.isin(trace["layers.1.router.ids"], hottest).mean()
    assert found.hit_rate("static", 3).value == pytest.approx(expected)


def test_profiles_that_do_not_fit_are_refused() -> None:
    trace = trace_of({1: draw(np.ones(8), 200, 2), 2: draw(np.ones(8), 200, 2)}, 8)
    with pytest.raises(TraceError, match="the profile is the text that it would be scored on"):
        replay(trace, profile=trace)
    other = trace_of({1: draw(np.ones(8), 90, 2), 2: draw(np.ones(8), 90, 2)}, 8, fingerprint="z")
    with pytest.raises(TraceError, match="expert numbers of two models"):
        replay(trace, profile=other)
    part = trace_of({1: draw(np.ones(8), 90, 2)}, 8)
    with pytest.raises(TraceError, match=r"no router of layers \[2\]"):
        replay(trace, profile=part)
    with pytest.raises(TraceError, match='did you mean "least-stale"'):
        replay(trace, policies=["least_stale"])
    with pytest.raises(TraceError, match="at least one policy"):
        replay(trace, policies=[])
    assert SharedCache("lru").name == "lru-shared"
