"""Cache replay against caches simulated one capacity at a time, and exhaustive search."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ktlab.errors import TraceError
from ktlab.experts.cache_order import positions
from ktlab.experts.caches import replay
from ktlab.experts.policies import USUAL, counted
from tests.routing.synthetic import draw, holes, sets, trace_of

E, K = 5, 2


@st.composite
def histories(draw_from: st.DrawFn, experts: int = E, longest: int = 9) -> NDArray:
    rows = st.lists(st.integers(0, experts - 1), min_size=0, max_size=K, unique=True)
    chosen = draw_from(st.lists(rows, min_size=1, max_size=longest))
    return np.array([row + [-1] * (K - len(row)) for row in chosen])


def hit_count(policy: str, profile: NDArray, scored: NDArray, capacity: int) -> int:
    position_TK, _, _ = positions(policy, profile, scored, E)
    return int(((position_TK > 0) & (position_TK <= capacity)).sum())


def simulated(policy: str, profile: NDArray, scored: NDArray, capacity: int) -> int:
    """One cache of one size, kept as a plain set."""
    cache: set[int] = set()
    last: dict[int, tuple[int, int]] = {}
    uses: Counter[int] = Counter()
    found = 0
    for t, row in enumerate([*profile, *scored]):
        asked = [int(e) for e in row if e >= 0]
        if t >= len(profile):
            found += sum(e in cache for e in asked)
        for rank, e in enumerate(row):
            if e >= 0:
                last[int(e)] = (t, -rank)
        uses.update(asked)
        worth = {e: (uses[e] if policy == "lfu" else 0, last[e]) for e in last}
        cache = set(sorted(cache | set(asked), key=lambda e: worth[e], reverse=True)[:capacity])
    return found


def best_possible(scored: NDArray, capacity: int) -> int:
    """Every way to run a cache, by exhaustive search over its contents."""
    full = range(E)
    states = {frozenset(c): 0 for n in range(capacity + 1) for c in combinations(full, n)}
    for asked in sets(scored):
        after: dict[frozenset[int], int] = {}
        for cache, found in states.items():
            now = found + len(cache & asked)
            pool = sorted(cache | asked)
            for n in range(min(capacity, len(pool)) + 1):
                for kept in map(frozenset, combinations(pool, n)):
                    after[kept] = max(after.get(kept, 0), now)
        states = after
    return max(states.values())


@given(histories(longest=20), histories(longest=20), st.sampled_from(["lru", "lfu"]))
@settings(max_examples=60)
def test_one_pass_equals_a_cache_of_each_size(
    profile: NDArray, scored: NDArray, policy: str
) -> None:
    for capacity in range(E + 1):
        expected = simulated(policy, profile, scored, capacity)
        assert hit_count(policy, profile, scored, capacity) == expected


@given(histories())
@settings(max_examples=30)
def test_oracle_is_the_best_there_is(scored: NDArray) -> None:
    for capacity in range(E + 1):
        assert hit_count("oracle", scored, scored, capacity) == best_possible(scored, capacity)


@given(histories(longest=30), histories(longest=30))
@settings(max_examples=60)
def test_no_policy_beats_the_oracle_and_none_loses_by_growing(
    profile: NDArray, scored: NDArray
) -> None:
    best = [hit_count("oracle", profile, scored, c) for c in range(E + 1)]
    assert best[E] == (scored >= 0).sum() and best[0] == 0
    for policy in ("lru", "lfu", "static"):
        found = [hit_count(policy, profile, scored, c) for c in range(E + 1)]
        assert all(f <= b for f, b in zip(found, best, strict=True))
        assert found == sorted(found)


def test_static_keeps_the_hottest_of_the_profile() -> None:
    profile, scored = np.array([[3], [3], [1]]), np.array([[3], [1], [0], [-1]])
    assert positions("static", profile, scored, 4)[0].tolist() == [[1], [2], [3], [0]]


def test_lru_by_hand() -> None:
    """Two slots, A B A C B: the third is a hit, B has gone when it is needed again."""
    scored = np.array([[0], [1], [0], [2], [1]])
    nothing = np.zeros((0, 1), int)
    assert positions("lru", nothing, scored, 3)[0].ravel().tolist() == [4, 4, 2, 4, 3]


def test_hits_are_counted_by_unit() -> None:
    position_TK = np.array([[1, 4], [2, 0], [1, 2]])
    assert counted(position_TK, np.array([7, 7, 9]), 3).tolist() == [[0, 1, 2, 2], [0, 1, 2, 2]]


def test_replay_scores_the_held_out_half_and_weighs_layers_by_lookups() -> None:
    ids = {i: holes(draw(1 / np.arange(1, 9), 800, 3, seed=i), seed=i) for i in (1, 2)}
    found = replay(trace_of(ids, 8))
    assert tuple(found.overall) == USUAL and found.tokens == 400
    lookups = {i: int((array[400:] >= 0).sum()) for i, array in ids.items()}
    for policy in USUAL:
        for i, array in ids.items():
            position_TK, _, _ = positions(policy, array[:400], array[400:], 8)
            expected = ((position_TK > 0) & (position_TK <= 3)).sum() / lookups[i]
            assert found.hit_rate(policy, 3, layer=i).value == pytest.approx(expected)
        parts = [found.hit_rate(policy, 3, layer=i).value * lookups[i] for i in ids]
        overall = found.hit_rate(policy, 3)
        assert overall.value == pytest.approx(sum(parts) / sum(lookups.values()))
        assert overall.low <= overall.value <= overall.high
    assert found.requests_per_token == pytest.approx(sum(lookups.values()) / 400)
    assert found.loads_per_token("oracle", 8).value == 0
    assert found.loads_per_token("lru", 0).value == pytest.approx(found.requests_per_token)
    loads, hits = found.loads_per_token("lru", 3), found.hit_rate("lru", 3)
    assert loads.value == pytest.approx((1 - hits.value) * found.requests_per_token)
    assert 0 < loads.low < loads.value < loads.high < found.requests_per_token
    ends = found.at(3).loc["lru", ["loads_low", "loads_high"]]
    assert list(ends) == [loads.low, loads.high]


def test_equal_loads_leave_a_blind_cache_at_chance() -> None:
    """Without skew or memory, LRU and the static set hit c / E, whatever is chosen."""
    found = replay(trace_of({1: draw(np.ones(16), 6000, 1, seed=2)}, 16))
    for policy in ("lru", "static"):
        assert abs(found.curve(policy).rate_C - found.chance_C).max() < 0.03
        assert found.curve("oracle").rate_C[4] > found.chance_C[4] + 0.1


def test_shows_itself_and_goes_to_a_frame() -> None:
    found = replay(trace_of({1: draw(np.ones(8), 200, 2)}, 8), policies=("lru", "oracle"))
    assert "4 of 8" in repr(found) and "<table>" in found._repr_mimebundle_()["text/html"]
    frame = found.to_frame()
    assert len(frame) == 2 * 2 * 9
    row = frame.query("layer == 1 and policy == 'lru' and capacity == 4").iloc[0]
    assert row["hit_rate"] == found.hit_rate("lru", 4, layer=1).value
    assert [t.name for t in found.plot(layer=1).data if t.showlegend is not False] == [
        "lru", "oracle", "blindly",
    ]  # fmt: skip


def test_errors() -> None:
    trace = trace_of({1: draw(np.ones(8), 200, 2)}, 8)
    with pytest.raises(TraceError, match='lru, lfu, static, oracle.*did you mean "lru"'):
        replay(trace, policies=["lrv"])
    with pytest.raises(TraceError, match="layer 0 is a dense layer"):
        replay(trace, layers=[0])
    found = replay(trace, policies=["lru"])
    with pytest.raises(TraceError, match="0..8, found 9"):
        found.hit_rate("lru", 9)
    with pytest.raises(TraceError, match="'lfu' was not replayed; replayed: lru"):
        found.curve("lfu")
    with pytest.raises(TraceError, match="layer 2 was not replayed; replayed: 1"):
        found.plot(layer=2)
