"""What chance makes of experts that two tokens, or one token, share.

Letters: T tokens, E experts, G groups of tokens.
"""

import numpy as np
from numpy.typing import NDArray

from ktlab.routing import intervals


def chance_overlap(hot_TE: NDArray[np.bool_], group_T: NDArray[np.int64]) -> float:
    """Mean share of a token's experts that another token of the same group selected too."""
    if not len(hot_TE):
        return float("nan")
    counts_GE = intervals.sums(hot_TE, group_T)
    size_G = np.bincount(group_T - group_T.min())
    size_G = size_G[size_G > 0]
    shared_G = (counts_GE * (counts_GE - 1)).sum(1) / np.maximum(size_G - 1, 1)
    return float(shared_G.sum() / max(1.0, counts_GE.sum()))


def quasi_independent(counts_EE: NDArray[np.int64], rounds: int = 200) -> NDArray[np.float64]:
    """Symmetric a_i a_j off the diagonal with the row sums of `counts_EE`, by damped fitting."""
    off = counts_EE - np.diag(np.diag(counts_EE))
    row = off.sum(1).astype(np.float64)
    a = row / max(1.0, np.sqrt(row.sum()))
    for _ in range(rounds):
        rest = a.sum() - a
        a = np.sqrt(a * np.divide(row, rest, out=np.zeros_like(row), where=rest > 0))
    expected = np.outer(a, a)
    np.fill_diagonal(expected, 0)
    return expected
