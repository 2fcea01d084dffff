"""Confidence intervals by block bootstrap, for numbers taken from text.

Neighbouring tokens of a text are alike, so an interval that counts each of them as a fresh draw
is too narrow. Everything here resamples *units*: whole texts where there are enough of them,
otherwise blocks of consecutive tokens (Künsch 1989, non-overlapping variant).

Letters: T tokens, B units, R resamples, X whatever a unit sums up.
"""

from collections.abc import Callable
from math import inf, nan, sqrt

import numpy as np
from numpy.typing import NDArray

from ktlab.interval import Interval

ENOUGH_TEXTS = 20
"""From this many texts on, a text is the unit; below, blocks of consecutive tokens are."""
MIN_BLOCK, MAX_BLOCK = 16, 512
RESAMPLES = 1000

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def runs(*labels: NDArray | None) -> NDArray[np.int64]:
    """Numbers the stretches of consecutive tokens over which no label changes: (T,) from (T,)s."""
    known = [label_T for label_T in labels if label_T is not None]
    change_T = np.zeros(len(known[0]), bool)
    for label_T in known:
        change_T[1:] |= label_T[1:] != label_T[:-1]
    return np.cumsum(change_T)


def units(run_T: NDArray[np.int64], *, block_tokens: int | None = None) -> NDArray[np.int64]:
    """Which unit of resampling each token belongs to: (T,) numbers from 0 on, without holes.

    A unit never crosses a run. With at least `ENOUGH_TEXTS` runs the runs are the units; below,
    each run is cut into equal blocks of about `block_tokens` (default: a 24th of all tokens, but
    16 to 512).
    """
    starts = np.flatnonzero(np.r_[True, run_T[1:] != run_T[:-1]])
    lengths = np.diff(np.r_[starts, len(run_T)])
    if block_tokens is None and len(starts) >= ENOUGH_TEXTS:
        return runs(run_T)
    size = block_tokens or int(np.clip(len(run_T) // 24, MIN_BLOCK, MAX_BLOCK))
    unit_T, first = [], 0
    for length in lengths:
        count = max(1, round(int(length) / size))
        unit_T.append(first + np.arange(length) * count // length)
        first += count
    return np.concatenate(unit_T)


def held_out_half(run_T: NDArray[np.int64], stratum_T: NDArray | None = None) -> NDArray[np.bool_]:
    """(T,) True where a token belongs to the half that nothing may be learnt from.

    Within each stratum (domain) whole runs go to the half that has fewer tokens so far, so
    neighbours stay together. A stratum that is one run is cut in the middle.
    """
    held_T = np.zeros(len(run_T), bool)
    strata = [np.ones(len(run_T), bool)]
    if stratum_T is not None:
        strata = [stratum_T == label for label in np.unique(stratum_T)]
    for member_T in strata:
        own_runs, lengths = np.unique(run_T[member_T], return_counts=True)
        if len(own_runs) == 1:
            index = np.flatnonzero(member_T)
            held_T[index[(len(index) + 1) // 2 :]] = True
            continue
        tokens = [0, 0]
        for run, length in zip(own_runs, lengths, strict=True):
            half = int(tokens[1] < tokens[0])
            tokens[half] += int(length)
            held_T[(run_T == run) & member_T] = bool(half)
    return held_T


def sums(values: NDArray, unit_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum (T,) or (T, X) values over each unit that occurs: (B,) or (B, X). Units in order."""
    starts = np.flatnonzero(np.r_[True, unit_T[1:] != unit_T[:-1]])
    return np.add.reduceat(np.asarray(values, np.float64), starts, axis=0)


def draws(count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """(R, B) how often each of `count` units is drawn in each resample (rows sum to `count`)."""
    share = np.full(count, 1 / count)
    return np.random.default_rng(seed).multinomial(count, share, resamples).astype(np.float64)


def spread(
    value: NDArray[np.float64], resampled: NDArray[np.float64], count: int, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high end around `value` (...) from `resampled` (R, ...).

    Percentiles of the resamples around their own mean, so that a statistic which resampling
    biases (entropy, divergence) is not shifted; widened by sqrt(B/(B-1)) for few units.
    """
    if count < 2:
        return np.full_like(value, -inf), np.full_like(value, inf)
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0) - resampled.mean(axis=0)
    widen = sqrt(count / (count - 1))
    return value + low * widen, value + high * widen


def bootstrap(
    sums_BX: NDArray,
    statistic: Statistic,
    *,
    unit: str = "",
    bounds: tuple[float, float] = (-np.inf, np.inf),
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of `statistic`, a function of sums over all units: (R, X) -> (R,)."""
    count = len(sums_BX)
    value = statistic(sums_BX.sum(axis=0, keepdims=True))
    low, high = spread(value, statistic(draws(count, seed=seed) @ sums_BX), count, level)
    if count > 1:  # one unit bounds nothing: its ends stay infinite
        low, high = np.clip(low, *bounds), np.clip(high, *bounds)
    return Interval(
        value=float(value[0]),
        low=float(low[0]),
        high=float(high[0]),
        level=level,
        n=count,
        unit=unit,
    )


def ratio(
    numerator_B: NDArray, denominator_B: NDArray, *, unit: str = "", seed: int = 0
) -> Interval:
    """Interval of a rate in 0..1: sum of numerators over sum of denominators."""
    used_B = np.asarray(denominator_B) > 0
    if not used_B.any():
        return Interval(value=nan, low=-inf, high=inf, n=0, unit=unit)
    pairs_B2 = np.stack([numerator_B, denominator_B], axis=1)[used_B]
    return bootstrap(
        pairs_B2, lambda total: total[:, 0] / total[:, 1], unit=unit, bounds=(0, 1), seed=seed
    )


METHOD = (
    "95 % interval by block bootstrap, 1,000 resamples; the unit is a whole text where there are "
    f"{ENOUGH_TEXTS} or more, else a block of {MIN_BLOCK} to {MAX_BLOCK} consecutive tokens"
)
