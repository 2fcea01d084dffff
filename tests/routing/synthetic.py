"""Traces made of known numbers, for tests that need no model."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ktlab.model.trace import ModelIdentity, Trace


def identity(num_experts: int, layers: Sequence[int] = (1, 2), **changes: str) -> ModelIdentity:
    names = {"name": "toy", "fingerprint": "toy-0", **changes}
    return ModelIdentity(num_experts=num_experts, top_k=2, moe_layers=tuple(layers), **names)


def trace_of(
    ids: Mapping[int, NDArray],
    num_experts: int,
    *,
    segment_T: NDArray | None = None,
    domain_T: NDArray | None = None,
    **changes: str,
) -> Trace:
    """A trace whose layer i selected `ids[i]` (T, K)."""
    tokens = len(next(iter(ids.values())))
    return Trace(
        ids_T=np.arange(tokens),
        arrays={f"layers.{i}.router.ids": array for i, array in ids.items()},
        model=identity(num_experts, tuple(ids), **changes),
        segment_T=np.zeros(tokens, np.int64) if segment_T is None else segment_T,
        domain_T=domain_T,
    )


def draw(load_E: Sequence[float] | NDArray, tokens: int, k: int, seed: int = 0) -> NDArray:
    """(T, k) experts drawn without replacement with weights `load_E`, each token anew."""
    gumbel = np.random.default_rng(seed).gumbel(size=(tokens, len(load_E)))
    return np.argsort(-(np.log(np.asarray(load_E, float)) + gumbel), axis=1)[:, :k]


def holes(ids_TK: NDArray, seed: int = 0) -> NDArray:
    """The same with some places at the end of a row left empty (-1), never the first."""
    kept = np.random.default_rng(seed).integers(1, ids_TK.shape[1] + 1, len(ids_TK))
    return np.where(np.arange(ids_TK.shape[1]) < kept[:, None], ids_TK, -1)


def sets(ids_TK: NDArray) -> list[set[int]]:
    """What each token selected, as Python sets."""
    return [{int(e) for e in row if e >= 0} for row in ids_TK]
