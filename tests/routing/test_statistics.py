"""Routing statistics against loops over Python sets, closed forms and simulations."""

from itertools import pairwise
from math import inf, log, log2, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ktlab.errors import TraceError
from ktlab.routing import intervals
from ktlab.routing.divergence import entropy_bits, js_bits
from ktlab.routing.heldout import log_odds
from tests.routing.synthetic import draw, holes, sets, trace_of

E, K, T = 12, 3, 240
SEGMENT_T = np.repeat([0, 1, 2, 3, 5], [70, 1, 89, 40, 40])
SKEWED = 1.0 / np.arange(1, E + 1)


@pytest.fixture(scope="module")
def ids() -> dict[int, NDArray]:
    return {i: holes(draw(SKEWED, T, K, seed=i), seed=i) for i in (1, 2)}


def test_load_and_histogram_count_every_selection(ids: dict[int, NDArray]) -> None:
    routing = trace_of(ids, E).routing
    counts = [sum(e in chosen for chosen in sets(ids[1])) for e in range(E)]
    histogram = routing.histogram(1)
    assert np.asarray(histogram).tolist() == counts
    assert histogram[0] == counts[0] and len(histogram) == E
    np.testing.assert_allclose(routing.load(1), np.array(counts) / sum(counts))
    np.testing.assert_allclose(histogram.relative_E.mean(), 1)
    np.testing.assert_array_equal(routing.load_LE()[1], routing.load(2))
    assert "unused" in repr(histogram)


def test_histogram_plots_before_and_after(ids: dict[int, NDArray]) -> None:
    routing = trace_of(ids, E).routing
    fig = routing.histogram(1).plot(before=routing.histogram(2))
    np.testing.assert_allclose(fig.data[0].y, routing.load(2) * E)
    np.testing.assert_allclose(fig.data[1].y, routing.load(1) * E)


def test_domain_load_counts_each_domain_alone(ids: dict[int, NDArray]) -> None:
    domain_T = np.repeat(["prose", "code"], [100, T - 100])
    load = trace_of(ids, E, domain_T=domain_T).routing.domain_load(1)
    alone = trace_of({1: ids[1][100:]}, E).routing.load(1)
    np.testing.assert_allclose(load["code"], alone)
    assert set(load) == {"code", "prose"}


def test_entropy_closed_forms() -> None:
    everyone = np.arange(40)[:, None] % 8
    uniform = trace_of({1: everyone}, 8).routing.entropy(1)
    assert uniform.value == pytest.approx(3) and uniform.maximum == 3
    assert uniform.effective_experts == pytest.approx(8)
    single = trace_of({1: np.full((40, 1), 5)}, 8).routing.entropy(1)
    assert single.value == 0 and single.interval.high == pytest.approx(0)
    assert entropy_bits(np.array([2, 1, 1])) == pytest.approx(1.5)
    assert uniform.small_sample_bias == pytest.approx(7 / (80 * log(2)))


def test_divergence_closed_forms() -> None:
    assert js_bits(np.array([1.0, 0]), np.array([0, 7.0])) == pytest.approx(1)
    # H(3/4, 1/4) - 1/2 for a sure against a fair coin
    expected = -(0.75 * log2(0.75) + 0.25 * log2(0.25)) - 0.5
    assert js_bits(np.array([1, 0]), np.array([3, 3])) == pytest.approx(expected)


loads = st.lists(st.integers(0, 50), min_size=6, max_size=6).filter(any).map(np.array)


@given(loads, loads, st.permutations(range(6)))
def test_entropy_and_divergence_properties(a: NDArray, b: NDArray, order: list[int]) -> None:
    assert -1e-12 <= entropy_bits(a) <= log2(6) + 1e-12
    assert 0 <= js_bits(a, b) <= 1 + 1e-12
    assert js_bits(a, b) == pytest.approx(float(js_bits(b, a)), abs=1e-12)
    assert js_bits(a, a * 3) == pytest.approx(0, abs=1e-12)
    assert js_bits(a[order], b[order]) == pytest.approx(float(js_bits(a, b)), abs=1e-12)


def test_coactivation_counts_pairs_and_knows_chance(ids: dict[int, NDArray]) -> None:
    found = trace_of(ids, E).routing.coactivation(1)
    for i in range(E):
        for j in range(E):
            together = sum({i, j} <= chosen for chosen in sets(ids[1]))
            assert np.asarray(found)[i, j] == together
    off = found.counts_EE - np.diag(np.diag(found.counts_EE))
    np.testing.assert_allclose(found.expected_EE.sum(0), off.sum(0), rtol=1e-3)
    assert np.isnan(np.diag(found.lift_EE)).all()


def test_coactivation_lift_finds_the_pair_and_is_one_elsewhere() -> None:
    tokens = 6000
    ids_TK = draw(np.ones(E), tokens, 2, seed=3)
    assert np.nanstd(trace_of({1: ids_TK}, E).routing.coactivation(1).lift_EE) < 0.15
    ids_TK[::10] = [4, 7]
    found = trace_of({1: ids_TK}, E).routing.coactivation(1)
    assert found.strongest(1)[0][:2] == (4, 7)
    assert found.lift_EE[4, 7] > 2


def test_reuse_against_loops(ids: dict[int, NDArray]) -> None:
    chosen = sets(ids[1])
    for lag in (1, 3):
        reuse = trace_of(ids, E, segment_T=SEGMENT_T).routing.reuse(1, lag=lag)
        pairs = [(t, t + lag) for t in range(T - lag) if SEGMENT_T[t] == SEGMENT_T[t + lag]]
        again = sum(len(chosen[a] & chosen[b]) for a, b in pairs)
        assert reuse.value == pytest.approx(again / sum(len(chosen[a]) for a, _ in pairs))

    slots = sum(map(len, chosen))
    any_two = [len(chosen[a] & chosen[b]) for a in range(T) for b in range(T) if a != b]
    assert reuse.chance == pytest.approx(sum(any_two) / (T - 1) / slots)
    same_text, slots = 0.0, 0
    for segment in (0, 2, 3, 5):
        inside = [chosen[t] for t in np.flatnonzero(SEGMENT_T == segment)]
        shared = sum(len(a & b) for a in inside for b in inside if a is not b)
        same_text += shared / (len(inside) - 1)
        slots += sum(map(len, inside))
    assert reuse.references["same text, any order"] == pytest.approx(same_text / slots)


def test_reuse_of_independent_tokens_is_chance_and_of_sticky_ones_is_not() -> None:
    ids_TK = draw(SKEWED, 4000, K, seed=11)
    assert trace_of({1: ids_TK}, E).routing.reuse(1).verdict == "not distinguishable from chance"
    sticky = trace_of({1: np.repeat(ids_TK, 3, axis=0)}, E).routing.reuse(1)
    assert sticky.verdict == "above chance" and sticky.value > 0.66
    alternating = np.array([[0, 1], [2, 3]] * 50)
    assert trace_of({1: alternating}, 4).routing.reuse(1).verdict == "below chance"


def test_next_layer_of_a_fixed_map_is_foreseen() -> None:
    ids_TK = draw(np.ones(E), 3000, 1, seed=5)
    partner_E = np.random.default_rng(1).permutation(E)
    found = trace_of({1: ids_TK, 2: partner_E[ids_TK]}, E).routing.next_layer_predictability(1)
    assert found.value == 1 and found.gain.low > 0.5 and found.verdict.startswith("better")
    assert found.references["experts at random"] == pytest.approx(1 / E)


def test_next_layer_of_independent_choices_is_not_foreseen() -> None:
    """Nothing leaks from the held-out half: many weak features, few tokens, no gain."""
    ids = {i: draw(SKEWED, 400, K, seed=20 + i) for i in (1, 2)}
    found = trace_of(ids, E).routing.next_layer_predictability(1)
    assert found.gain.low <= 0.01
    train, held = sets(ids[2][:200]), sets(ids[2][200:])
    hottest = sorted(range(E), key=lambda e: -sum(e in s for s in train))[:K]
    expected = sum(len(s & set(hottest)) for s in held) / (K * 200)
    assert found.chance == pytest.approx(expected)
    everything = trace_of(ids, E).routing.next_layer_predictability(1, candidates=E)
    assert everything.value == 1 and everything.chance == 1


def test_log_odds_against_bayes_by_hand() -> None:
    rng = np.random.default_rng(2)
    x, y, new = rng.random((30, 3)) < 0.5, rng.random((30, 2)) < 0.3, rng.random((4, 3)) < 0.5
    found = log_odds(x, y, new)
    for t in range(4):
        for j in range(2):
            yes, no = x[y[:, j]], x[~y[:, j]]
            odds = (len(yes) + 1) / (len(no) + 1)
            for i in range(3):
                p, q = ((rows[:, i].sum() + 1) / (len(rows) + 2) for rows in (yes, no))
                odds *= p / q if new[t, i] else (1 - p) / (1 - q)
            assert found[t, j] == pytest.approx(log(odds), abs=1e-4)


def test_hot_set_is_measured_where_it_was_not_chosen() -> None:
    """Two halves with opposite favourites: in sample all, held out nothing."""
    ids_TK = np.repeat([[0, 1], [2, 3]], 100, axis=0)
    found = trace_of({1: ids_TK}, 8).routing.hot_set(1, share=0.25)
    assert found.experts == (0, 1) and found.in_sample.value == 1
    assert found.coverage.value == 0 and found.hindsight.value == 1
    assert found.verdict.startswith("no hot set") and found.hottest.value == 0


def test_hot_set_verdicts_follow_the_load() -> None:
    uniform = trace_of({1: draw(np.ones(40), 3000, 2, seed=1)}, 40).routing.hot_set(1)
    assert uniform.uniform == 0.25 and uniform.verdict.startswith(("no hot set", "hardly"))
    load = np.r_[np.full(10, 30.0), np.ones(30)]
    hot = trace_of({1: draw(load, 3000, 1, seed=1)}, 40).routing.hot_set(1)
    assert set(hot.experts) == set(range(10)) and hot.verdict.startswith("a hot set")
    assert hot.coverage.value == pytest.approx(300 / 330, abs=0.03)
    assert hot.in_sample.value == pytest.approx(hot.coverage.value, abs=0.03)
    for figure, expected in ((hot.in_sample, 300 / 330), (hot.hottest, 40 * 30 / 330)):
        assert figure.low < figure.value < figure.high and figure.contains(expected)
    assert hot.hindsight.value >= hot.coverage.value and hot.hindsight.half_width > 0
    assert f"best with hindsight: {hot.hindsight}" in repr(hot)
    everything = trace_of({1: draw(load, 300, 1)}, 40).routing.hot_set(1, share=1.0)
    assert everything.coverage.value == 1 and everything.verdict.startswith("no question")


def test_hot_set_on_another_trace() -> None:
    here = trace_of({1: np.zeros((50, 1), int)}, 4)
    there = trace_of({1: np.arange(100)[:, None] % 4}, 4)
    assert here.routing.hot_set(1, held_out=there).coverage.value == 0.25


def test_divergence_of_traces() -> None:
    a, b = (trace_of({1: draw(SKEWED, 1500, K, seed=s)}, E) for s in (1, 2))
    a_moved = trace_of({1: (draw(SKEWED, 1500, K, seed=3) + 6) % E}, E)
    object.__setattr__(b, "ids_T", b.ids_T + 1)  # another text
    alike, moved = a.routing.divergence(b, 1), a.routing.divergence(a_moved, 1)
    assert alike.verdict == "not distinguishable from chance"
    assert moved.verdict == "above chance" and moved.value > 0.1
    assert moved.value == pytest.approx(a_moved.routing.divergence(a.routing, 1).value)
    assert a.routing.divergence(a, 1).value == 0


def test_divergence_of_one_text_under_two_settings_is_paired() -> None:
    """Taking a seventh expert away everywhere is seen through the noise of the text."""
    full = np.c_[np.repeat(draw(SKEWED, 60, K, seed=4), 20, axis=0), np.full(1200, 0)]
    full[:, 3] = [min(set(range(E)) - set(row[:3])) for row in full]
    a, b = trace_of({1: full}, E), trace_of({1: full[:, :3]}, E)
    found = a.routing.divergence(b, 1)
    assert found.chance_is.endswith("swapped at random") and found.interval.low > found.chance


def test_domain_divergence() -> None:
    domain_T = np.repeat(["a", "b", "c"], 400)
    apart = np.repeat([0, 2, 4], 400)[:, None] + draw(np.ones(2), 1200, 1)
    routing = trace_of({1: apart, 2: draw(SKEWED, 1200, 1)}, E, domain_T=domain_T).routing
    found = routing.domain_divergence()
    assert found.mean_L[0].value == pytest.approx(1) and found.chance_L[0] < 0.3
    assert found.pairwise_LGG.shape == (2, 3, 3)
    assert found.mean_L[1].contains(found.chance_L[1])
    by_hand = [js_bits(*(routing.domain_load(2)[d] for d in pair)) for pair in ("ab", "ac", "bc")]
    assert found.mean_L[1].value == pytest.approx(np.mean(by_hand))
    assert found.within_L[0] == pytest.approx(
        np.mean([js_bits(h[:200].sum(0), h[200:].sum(0)) for h in np.split(routing.hot(1), 3)])
    )
    assert len(found.plot().data) == 3


@given(st.integers(0, 10**6), st.permutations(range(E)))
@settings(max_examples=15)
def test_renaming_experts_changes_no_statistic(seed: int, order: list[int]) -> None:
    """Experts' numbers are names (ties aside, which the draw avoids by being long)."""
    ids_TK = holes(draw(SKEWED, 200, K, seed=seed), seed=seed)
    renamed = np.where(ids_TK >= 0, np.array(order)[ids_TK], -1)
    a, b = trace_of({1: ids_TK}, E).routing, trace_of({1: renamed}, E).routing
    assert a.entropy(1).value == pytest.approx(b.entropy(1).value)
    assert a.reuse(1).interval.value == pytest.approx(b.reuse(1).interval.value)
    assert a.reuse(1).chance == pytest.approx(b.reuse(1).chance)


def test_intervals_cover_the_truth_of_correlated_tokens() -> None:
    """95 % intervals of a rate over 20-token-long runs hold the truth 88 to 99 % of the time."""
    rng = np.random.default_rng(7)
    unit_T = intervals.units(np.zeros(6000, np.int64))
    covered = naive = 0
    for _ in range(200):
        hit_T = np.repeat(rng.random(300) < 0.3, 20)
        found = intervals.ratio(intervals.sums(hit_T, unit_T), intervals.sums(hit_T >= 0, unit_T))
        covered += found.contains(0.3)
        naive += abs(hit_T.mean() - 0.3) < 1.96 * (0.3 * 0.7 / 6000) ** 0.5
    assert 0.88 <= covered / 200 <= 0.99
    assert naive / 200 < 0.5


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30))
def test_units_partition_texts(lengths: list[int]) -> None:
    run_T = np.repeat(np.arange(len(lengths)), lengths)
    unit_T = intervals.units(run_T)
    assert unit_T[0] == 0 and set(np.diff(unit_T)) <= {0, 1}
    assert all(len({*run_T[unit_T == u]}) == 1 for u in range(unit_T[-1] + 1))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(1, 3))
def test_held_out_half_keeps_texts_whole(lengths: list[int], domains: int) -> None:
    run_T = np.repeat(np.arange(len(lengths)), lengths)
    domain_T = np.minimum(run_T * domains // len(lengths), domains - 1)
    held_T = intervals.held_out_half(run_T, domain_T)
    for domain in np.unique(domain_T):
        inside = domain_T == domain
        own = [held_T[inside & (run_T == r)] for r in np.unique(run_T[inside])]
        if len(own) > 1:
            assert all(len(set(part)) == 1 for part in own)
            longest = max(map(len, own))
            assert abs(2 * held_T[inside].sum() - inside.sum()) <= longest
        else:
            assert held_T[inside].sum() == len(own[0]) // 2
            assert all(not (a and not b) for a, b in pairwise(own[0]))


def test_one_block_gives_no_interval_and_says_so() -> None:
    found = trace_of({1: draw(SKEWED, 10, K)}, E).routing.reuse(1)
    assert found.interval.low == -inf and "too small for an interval" in str(found.interval)
    assert found.verdict.startswith("undecided")
    assert intervals.ratio(np.zeros(3), np.zeros(3)).value is nan


def test_every_result_shows_itself(ids: dict[int, NDArray]) -> None:
    domain_T = np.repeat(["<b>", "code"], T // 2)
    routing = trace_of(ids, E, segment_T=SEGMENT_T, domain_T=domain_T).routing
    shown: list[Any] = [
        routing, routing.histogram(1), routing.entropy(1), routing.coactivation(1),
        routing.reuse(1), routing.next_layer_predictability(1), routing.hot_set(1),
        routing.divergence(routing, 1), routing.domain_divergence(),
    ]  # fmt: skip
    for value in shown:
        bundle = value._repr_mimebundle_()
        assert bundle["text/plain"] == repr(value)
        assert "<b>" not in bundle["text/html"]
    frame = routing.to_frame()
    assert list(frame.index) == [1, 2]
    for name, value in (
        ("entropy", "entropy_bits"),
        ("hottest", "hottest_relative_to_uniform"),
        ("reuse", "reuse"),
    ):
        low, high = frame[f"{name}_low"], frame[f"{name}_high"]
        assert ((low <= frame[value]) & (frame[value] <= high) & (low < high)).all()
    hottest = str(routing.hottest(1))
    assert routing.hottest(1).low >= 1 and hottest in routing._repr_mimebundle_()["text/html"]
    assert routing.coactivation(1).plot().data[0].z.shape == (E, E)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (
            lambda r: r.load(0),
            "layer 0 is a dense layer: it has no router; layers with a router: 1, 2",
        ),
        (lambda r: r.load(9), "toy has no layer 9"),
        (lambda r: r.load(-1), "toy has no layer -1"),
        (lambda r: r.next_layer_predictability(2), "layer 2 is the last with a router"),
        (lambda r: r.next_layer_predictability(1, candidates=0), r"1..12 candidates"),
        (lambda r: r.reuse(1, lag=500), "longest text in the trace has 240"),
        (lambda r: r.reuse(1, lag=0), "lag of 1 or more"),
        (lambda r: r.hot_set(1, share=0), "share of experts above 0"),
        (lambda r: r.domain_divergence(), "at least 2 domain.*found: none.*domain="),
        (
            lambda r: r.divergence("text", 1),
            "expected a trace or its routing statistics, found str",
        ),
    ],
)
def test_errors_say_what_to_do(ids: dict[int, NDArray], ask: object, expected: str) -> None:
    with pytest.raises(TraceError, match=expected):
        ask(trace_of(ids, E).routing)  # type: ignore[operator]


def test_another_model_is_refused(ids: dict[int, NDArray]) -> None:
    mine, other = trace_of(ids, E).routing, trace_of(ids, E, fingerprint="big-1", name="big")
    with pytest.raises(TraceError, match=r"trace of toy \(toy-0\), found one of big \(big-1\)"):
        mine.divergence(other, 1)
    with pytest.raises(TraceError, match="big"):
        mine.hot_set(1, held_out=other)


def test_a_layer_that_was_not_traced_is_named() -> None:
    trace = trace_of({1: np.zeros((4, 1), int), 2: np.ones((4, 1), int)}, 4)
    del trace.arrays["layers.2.router.ids"]  # type: ignore[attr-defined]
    assert trace.routing.layers == (1,) and trace.routing.load_LE().shape == (1, 4)
    with pytest.raises(TraceError, match=r'names=\["layers.2.router.ids"\]'):
        trace.routing.load(2)
    with pytest.raises(TraceError, match="at least two tokens"):
        trace_of({1: np.zeros((1, 1), int)}, 4).routing.hot_set(1)
