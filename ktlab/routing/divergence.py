"""Entropy and Jensen-Shannon divergence of loads, in bits, and what chance alone makes of them.

Letters: T tokens, E experts, B units of resampling, G domains.
"""

import numpy as np
from numpy.typing import NDArray

from ktlab.interval import Interval
from ktlab.routing import intervals

SHUFFLES = 200


def entropy_bits(counts: NDArray) -> NDArray[np.float64]:
    """Shannon entropy of counts along the last axis, in bits; 0 for an all-zero row."""
    total = counts.sum(axis=-1, keepdims=True)
    p = counts / np.where(total > 0, total, 1)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1)


def js_bits(counts_a: NDArray, counts_b: NDArray) -> NDArray[np.float64]:
    """Jensen-Shannon divergence along the last axis, in bits: 0 equal, 1 disjoint (Lin 1991)."""
    p = counts_a / counts_a.sum(axis=-1, keepdims=True)
    q = counts_b / counts_b.sum(axis=-1, keepdims=True)
    mixed = entropy_bits((p + q) / 2) - (entropy_bits(p) + entropy_bits(q)) / 2
    return np.maximum(mixed, 0)


def js_interval(a_BE: NDArray, b_BE: NDArray, *, paired: bool) -> tuple[float, float, float]:
    """Divergence of two samples with the ends of its interval.

    Paired samples (same text, two settings) draw the same units; others each draw their own.
    """
    value = js_bits(a_BE.sum(0), b_BE.sum(0))
    draw_a = intervals.draws(len(a_BE))
    draw_b = draw_a if paired else intervals.draws(len(b_BE), seed=1)
    count = min(len(a_BE), len(b_BE))
    low, high = intervals.spread(value, js_bits(draw_a @ a_BE, draw_b @ b_BE), count)
    return float(value), float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def domain_js(
    hot_TE: NDArray[np.bool_], unit_T: NDArray[np.int64], label_B: NDArray[np.int64]
) -> tuple[NDArray[np.float64], Interval, float]:
    """Pairwise divergence (G, G), its mean with interval, and the mean under shuffled labels."""
    counts_BE = intervals.sums(hot_TE, unit_T)
    domains = int(label_B.max()) + 1
    first, second = np.triu_indices(domains, 1)

    def mean(counts_GE: NDArray) -> NDArray:
        return js_bits(counts_GE[..., first, :], counts_GE[..., second, :]).mean(-1)

    def by_label(label_B: NDArray) -> NDArray:
        return np.stack([counts_BE[label_B == g].sum(0) for g in range(domains)])

    counts_GE = by_label(label_B)
    pairwise_GG = js_bits(counts_GE[:, None], counts_GE[None])
    drawn = np.stack(
        [
            intervals.draws(int((label_B == g).sum()), resamples=SHUFFLES, seed=g)
            @ counts_BE[label_B == g]
            for g in range(domains)
        ],
        axis=1,
    )
    fewest = int(np.bincount(label_B).min())
    value = np.asarray(mean(counts_GE))
    low, high = (float(np.clip(end, 0, 1)) for end in intervals.spread(value, mean(drawn), fewest))
    random = np.random.default_rng(0)
    chance = np.mean([mean(by_label(random.permutation(label_B))) for _ in range(SHUFFLES)])
    interval = Interval(value=float(value), low=low, high=high, n=len(label_B), unit="bits")
    return pairwise_GG, interval, float(chance)


def js_by_chance(a_BE: NDArray, b_BE: NDArray, *, paired: bool) -> float:
    """Mean divergence if both samples came from the same source.

    Paired units are swapped at random; others are pooled and dealt out anew.
    """
    random = np.random.default_rng(0)
    pooled_BE, total_E = np.concatenate([a_BE, b_BE]), a_BE.sum(0) + b_BE.sum(0)
    if paired:
        swap_SB = random.integers(0, 2, (SHUFFLES, len(a_BE)))
        first_SE = swap_SB @ a_BE + (1 - swap_SB) @ b_BE
    else:
        dealt = [random.permutation(len(pooled_BE))[: len(a_BE)] for _ in range(SHUFFLES)]
        first_SE = np.stack([pooled_BE[order].sum(0) for order in dealt])
    return float(js_bits(first_SE, total_E - first_SE).mean())
