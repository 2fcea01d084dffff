"""Intervals against brute force, closed forms and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from ktlab.interval import Interval
from ktlab.measurement import intervals
from ktlab.measurement.blocks import Blocks, student_quantile


def autoregressive(rng, runs, tokens, r):
    """(runs, tokens) standard normal values, each correlated r with the one before."""
    noise = rng.standard_normal((runs, tokens))
    values = noise.copy()
    for t in range(1, tokens):
        values[:, t] = r * values[:, t - 1] + math.sqrt(1 - r * r) * noise[:, t]
    return values


def coverage(build, rows, truth):
    found = [build(row) for row in rows]
    return np.mean([interval.low <= truth <= interval.high for interval in found])


@pytest.mark.parametrize("df", [1, 2, 3, 5, 7.5, 15, 100])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_student_quantile_by_integration(df, probability):
    x = student_quantile(probability, df)
    # The density integrated numerically over a finite range, by the substitution t = tan(u).
    u = np.linspace(0, math.atan(x), 20_001)
    t = np.tan(u)
    log_norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_norm - (df + 1) / 2 * np.log1p(t * t / df)) / np.cos(u) ** 2
    assert 0.5 + np.trapezoid(density, u) == pytest.approx(probability, abs=2e-6)
    assert student_quantile(1 - probability, df) == pytest.approx(-x)


@pytest.mark.parametrize("tokens", [320, 1100, 8192])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_coverage_of_means_of_correlated_tokens(tokens, r):
    rows = autoregressive(np.random.default_rng(tokens), 400, tokens, r)
    blocks = Blocks.cut([tokens])
    share = coverage(lambda row: intervals.mean(row, blocks), rows, 0.0)
    assert 0.90 <= share <= 0.98
    if r == 0.9:  # what an interval that ignores the correlation would have covered
        naive = 1.96 * rows.std(axis=1) / math.sqrt(tokens)
        assert np.mean(np.abs(rows.mean(axis=1)) < naive) < 0.5


@pytest.mark.parametrize("tokens", [1100, 8192])
def test_coverage_of_skewed_divergences(tokens):
    """Log-normal with the spread that KL divergences have (p99 about 30 medians)."""
    z = autoregressive(np.random.default_rng(3), 400, tokens, 0.5)
    rows, blocks = np.exp(1.5 * z - 1.125), Blocks.cut([tokens])
    assert 0.90 <= coverage(lambda x: intervals.mean(x, blocks, scale="log"), rows, 1.0) <= 0.98
    middle = math.exp(-1.125)
    assert 0.90 <= coverage(lambda x: intervals.quantile(x, 0.5, blocks), rows, middle) <= 0.985
    if tokens > 8000:
        p99 = math.exp(1.5 * 2.3263 - 1.125)
        assert 0.90 <= coverage(lambda x: intervals.quantile(x, 0.99, blocks), rows, p99) <= 0.99


@pytest.mark.parametrize("p", [0.6, 0.94])
def test_coverage_of_shares(p):
    from statistics import NormalDist

    z = autoregressive(np.random.default_rng(5), 400, 2048, 0.6)
    blocks, cut = Blocks.cut([2048]), NormalDist().inv_cdf(p)
    found = coverage(lambda row: intervals.share(row < cut, blocks), z, 100 * p)
    assert 0.90 <= found <= 0.985


def test_coverage_with_few_blocks_and_with_strata():
    rows = autoregressive(np.random.default_rng(7), 600, 64, 0.3)
    share = coverage(lambda row: intervals.mean(row, Blocks.cut([64])), rows, 0.0)
    assert 0.90 <= share <= 0.98
    # Seven domains whose means lie far apart: the distance between them is no uncertainty.
    offsets = np.repeat(np.arange(7) * 10.0, 300)
    rows = autoregressive(np.random.default_rng(8), 400, 2100, 0.5) + offsets
    blocks = Blocks.cut([300] * 7)
    assert 0.90 <= coverage(lambda row: intervals.mean(row, blocks), rows, 30.0) <= 0.98
    assert intervals.mean(rows[0], blocks).half_width < 0.5


def test_jackknife_against_brute_force():
    rng = np.random.default_rng(0)
    sums, weights = rng.normal(size=80), rng.integers(1, 6, size=80)
    blocks = Blocks.cut([80])  # 5 blocks of 16: too few to estimate their correlation
    assert blocks.starts_B.tolist() == [0, 16, 32, 48, 64]
    left_out = []
    for i in range(5):
        keep = np.r_[0 : 16 * i, 16 * i + 16 : 80]
        left_out.append(sums[keep].sum() / weights[keep].sum())
    error = math.sqrt(4 / 5 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    found = intervals.mean(sums, blocks, weights_T=weights)
    assert found.value == pytest.approx(sums.sum() / weights.sum())
    assert found.half_width == pytest.approx(2.776445 * error, rel=1e-5)  # t, 4 degrees of freedom


def test_scales():
    x, blocks = np.array([0.0, 2.0] * 40), Blocks.cut([80])
    plain, exp = intervals.mean(x + np.arange(80) / 80, blocks), None
    exp = intervals.mean(x + np.arange(80) / 80, blocks, scale="exp")
    assert (exp.value, exp.low, exp.high) == pytest.approx(
        (math.exp(plain.value), math.exp(plain.low), math.exp(plain.high))
    )
    log = intervals.mean(x + np.arange(80) / 80, blocks, scale="log")
    assert log.low * log.high == pytest.approx(log.value**2)
    assert log.low > 0


def test_one_block_has_no_interval():
    found = intervals.mean(np.arange(20.0), Blocks.cut([20]))
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert "too small" in str(found)
    assert intervals.mean(np.ones(20), Blocks.cut([20]), scale="exp").high == math.inf


def test_blocks_cover_and_stay_inside_strata():
    for lengths in ([5], [63], [1000], [100, 3, 900], [40, 0, 33], [16] * 9):
        blocks, total = Blocks.cut(lengths), sum(lengths)
        assert blocks.sums(np.ones(total)).sum() == total
        ends = np.cumsum([0, *lengths])[:-1]
        assert set(ends[np.array(lengths) > 0]) <= set(blocks.starts_B.tolist())
        assert blocks.sums(np.ones(total)).min() >= min(16, min(x for x in lengths if x))
    # Single blocks have no spread of their own and are compared with one another.
    assert Blocks.cut([16] * 9).stratum_B.tolist() == [-1] * 9


def test_share_at_the_edge_is_not_certain():
    blocks = Blocks.cut([64])
    everything = intervals.share(np.ones(64), blocks)
    assert everything.value == everything.high == 100
    assert 80 < everything.low < 99
    assert intervals.share(np.zeros(64), blocks).low == 0


def test_quantile_that_the_sample_cannot_bound():
    found = intervals.quantile(np.arange(64.0), 0.99, Blocks.cut([64]))
    assert found.high == math.inf
    assert "at least" in str(found)


def test_median_order_statistics_against_enumeration():
    """The stated level is the chance that the pair straddles the median, counted over all signs."""
    for n in (2, 3, 5, 6, 7, 10, 12):
        found = intervals.median(list(range(1, n + 1)))
        low, high = int(found.low), int(found.high)
        inside = 0
        for signs in itertools.product((0, 1), repeat=n):
            below = sum(signs)  # so many of the sorted samples lie below the true median
            inside += low <= below < high
        assert found.level == pytest.approx(inside / 2**n)
        assert (found.level >= 0.95) == (n >= 6)
    assert intervals.median([3.0]).high == math.inf


def test_interval_says_no_change():
    touched = Interval(value=1.01, low=0.99, high=1.03, no_change=1.0)
    assert not touched.changed and "no change inside" in str(touched)
    assert Interval(value=1.05, low=1.02, high=1.08, no_change=1.0).changed
    assert not Interval(value=1.0, low=1.0 + 1e-9, high=1.1, no_change=1.0, tolerance=1e-6).changed
    exact = intervals.exactly(touched, 1.0)
    assert (exact.value, exact.low, exact.high) == (1, 1, 1) and "exact" in exact.method
    assert not Interval(value=1, low=0, high=2).changed  # no such value: never "changed"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(value=0.02134, low=0.0183, high=0.0243, unit="nats"), "0.0213 ± 0.0030 nats"),
        (Interval(value=12345.6, low=12000, high=12700), "12,346 ± 350"),
        (Interval(value=1.0, low=0.9, high=1.6), "1.00 [0.90, 1.60]"),
        (Interval(value=0, low=0, high=0, unit="nats", no_change=0), "0 nats (no change)"),
    ],
)
def test_interval_text(interval, text):
    assert str(interval) == text


def test_interval_survives_json():
    for interval in (
        Interval(value=1.5, low=1, high=math.inf, n=3, unit="x", method="m", no_change=1.0),
        Interval(value=1, low=-math.inf, high=2),
    ):
        assert Interval.from_json(interval.to_json()) == interval
    with pytest.raises(ValueError, match="missing.*value"):
        Interval.from_dict({"low": 1, "high": 2})
    with pytest.raises(ValueError, match="unknown.*vlaue"):
        Interval.from_dict({"value": 1, "low": 1, "high": 2, "vlaue": 3})


def test_strata_against_the_textbook():
    """Two strata of equal blocks: the variance of a stratified mean is sum (N_h/N)^2 s_h^2/n_h."""
    values = np.random.default_rng(2).normal(size=128) + np.repeat([0.0, 50.0], 64)
    blocks = Blocks.cut([64, 64])  # 4 blocks of 16 each; 8 are enough to estimate correlation
    means = values.reshape(8, 16).mean(axis=1)
    variance = sum(0.25 * half.var(ddof=1) / 4 for half in (means[:4], means[4:]))
    d = np.concatenate([half - half.mean() for half in (means[:4], means[4:])])
    r = (d[:3] @ d[1:4] + d[4:7] @ d[5:]) / (d @ d) + 2 / 8
    r = max(0.0, r)
    df = 6 * (1 - r**2) / (1 + r**2)
    expected = student_quantile(0.975, df) * math.sqrt(variance * (1 + r) / (1 - r))
    assert intervals.mean(values, blocks).half_width == pytest.approx(expected, rel=1e-9)


def test_at_least_nothing_has_no_digits() -> None:
    assert str(intervals.median([0.004568], unit="nats")) == "0.004568 (at least 0) nats"
    assert str(intervals.median([12.5], unit="tokens/s")) == "12.5 (at least 0) tokens/s"
