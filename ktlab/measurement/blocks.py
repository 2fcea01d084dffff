"""Blocks of neighbouring tokens, what they say about variance, and Student's quantile.

B blocks, T tokens. Sources: see intervals.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_BLOCKS, MIN_BLOCK_TOKENS, MIN_BLOCKS_FOR_CORRELATION = 16, 16, 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """Where a text of T tokens is cut: start of each block, and the stratum it belongs to."""

    starts_B: NDArray[np.int64]
    stratum_B: NDArray[np.int64]
    tokens: int

    @classmethod
    def cut(cls, lengths: Sequence[int]) -> "Blocks":
        """Cut strata (domains) of these lengths, which follow one another, into blocks.

        One stratum gets up to 16 blocks; of several, each gets up to max(4, its share of 16).
        """
        starts, strata, offset, total = [], [], 0, sum(lengths)
        for stratum, length in enumerate(lengths):
            if not length:
                continue
            most = max(4, round(MAX_BLOCKS * length / total))
            count = max(1, min(most, length // MIN_BLOCK_TOKENS))
            starts += [offset + length * i // count for i in range(count)]
            strata += [stratum] * count
            offset += length
        counts = np.bincount(strata) if strata else np.zeros(0, int)
        stratum_B = np.array(strata, dtype=np.int64)
        # A stratum of one block has no variance of its own: such strata vary among themselves.
        alone = np.array([counts[s] == 1 for s in strata], dtype=bool)
        stratum_B[alone] = -1
        return cls(starts_B=np.array(starts, dtype=np.int64), stratum_B=stratum_B, tokens=total)

    def sums(self, values_T: NDArray[np.generic]) -> Floats:
        """Sum over each block, (B,)."""
        return np.add.reduceat(np.asarray(values_T, dtype=np.float64), self.starts_B)

    def without(self, sums_B: Floats) -> Floats:
        """Total of `sums_B` with each block left out in turn, (B,): the jackknife's replicates.

        The other blocks of its stratum stand in for it, so that the strata keep their weight.
        """
        total_B = np.full(len(self), sums_B.sum())
        for stratum in np.unique(self.stratum_B):
            inside = self.stratum_B == stratum
            count, own = int(inside.sum()), sums_B[inside]
            if count > 1:
                total_B[inside] += (own.sum() - own) * count / (count - 1) - own.sum()
        return total_B

    def __len__(self) -> int:
        return len(self.starts_B)


def student_quantile(probability: float, df: float) -> float:
    """Quantile of Student's t with `df` >= 1 degrees of freedom (Hill 1970, about 6 digits)."""
    tail = 2 * min(probability, 1 - probability)  # two-sided tail, as Hill has it
    sign = 1.0 if probability >= 0.5 else -1.0
    if tail >= 1:
        return 0.0
    if df <= 1:
        return sign / math.tan(tail * math.pi / 2)
    if abs(df - 2) < 1e-9:
        return sign * math.sqrt(2 / (tail * (2 - tail)) - 2)
    a = 1 / (df - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * df
    y = (d * tail) ** (2 / df)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(tail / 2)
        y = x * x
        if df < 5:
            c += 0.3 * (df - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = (
            (1 / (((df + 6) / (df * y) - 0.089 * d - 0.822) * (df + 2) * 3) + 0.5 / (df + 4)) * y
            - 1
        ) * (df + 1) / (df + 2) + 1 / y
    return sign * math.sqrt(df * y)


def jackknife(without_B: Floats, blocks: Blocks) -> tuple[float, float, str]:
    """Variance and degrees of freedom from the estimates that leave out one block each."""
    variance, squares, products, df, strata = 0.0, 0.0, 0.0, 0, np.unique(blocks.stratum_B)
    for stratum in strata:
        d = without_B[blocks.stratum_B == stratum]
        if len(d) > 1:
            d = d - d.mean()
            variance += (len(d) - 1) / len(d) * float(d @ d)
            squares, products = squares + float(d @ d), products + float(d[1:] @ d[:-1])
            df += len(d) - 1
    few = f"{len(blocks)} blocks of about {blocks.tokens // max(1, len(blocks))} tokens"
    if len(strata) > 1:
        few += f" in {len(strata)} strata"
    if len(blocks) < MIN_BLOCKS_FOR_CORRELATION or squares == 0 or df < 1:
        return variance, float(df), few
    r = min(0.8, max(0.0, products / squares + len(strata) / len(blocks)))
    # Of blocks with correlation r, the mean is so much more variable, and the variance so much
    # less well known (Bartlett's formulas for a first-order autoregression).
    return variance * (1 + r) / (1 - r), max(1.0, df * (1 - r * r) / (1 + r * r)), few
