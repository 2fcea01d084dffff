"""How many experts n tokens touch, from how the router spreads its choices.

E experts, K of them a token. A load is each expert's share of all choices (it sums to 1).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Load = Sequence[float] | NDArray[np.floating]


def chances(experts: int, k: int, load: Load | None = None) -> NDArray[np.float64]:
    """(E,) chance that one token chooses each expert: K times its share, at most 1.

    Without a load all are alike, which is what DeepSeek-V3's bias is trained for (arXiv 2412.19437,
    2.1.2). Where a share asks for more than 1, the rest is spread over the others.
    """
    if load is None:
        return np.full(experts, k / experts)
    shares = np.asarray(load, dtype=float)
    if shares.shape != (experts,) or shares.min() < 0 or shares.sum() <= 0:
        raise ValueError(f"expected {experts} shares from 0, found {shares.shape}")
    chosen = np.zeros(experts)
    while True:  # ends: each turn fills one more expert
        open_ = chosen < 1
        left = k - chosen[~open_].sum()
        chosen[open_] = left * shares[open_] / max(shares[open_].sum(), 1e-300)
        if (chosen <= 1).all():
            return chosen
        chosen = np.where(chosen >= 1, 1.0, 0.0)


def touched(tokens: int, chances_E: NDArray[np.float64]) -> float:
    """Expected number of distinct experts that the tokens choose, each for itself."""
    return float((1 - (1 - chances_E) ** tokens).sum())


def padded(tokens: int, chances_E: NDArray[np.float64], rows: int) -> float:
    """Expected rows of activations over all experts, where each expert's are padded to `rows`.

    Half a tile of rows is empty on average in each touched expert (exact for rows = 1).
    """
    return float(tokens * chances_E.sum() + touched(tokens, chances_E) * (rows - 1) / 2)
