"""What can be foreseen of a router on text that nothing was learnt from.

Letters: T tokens, E experts, B units of resampling.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import TraceError
from ktlab.routing import intervals
from ktlab.routing.findings import HotSet, Predictability

HALVES = (
    "learnt on one half of the texts of each domain, measured on the other (a domain that is one "
    "text is cut in the middle)"
)


def predictability(
    x_TE: NDArray[np.bool_],
    y_TE: NDArray[np.bool_],
    held_T: NDArray[np.bool_],
    unit_T: NDArray[np.int64],
    *,
    layer: int,
    following: int,
    candidates: int | None = None,
) -> Predictability:
    """Recall of `y_TE` (layer `following`) guessed from `x_TE` (`layer`) on the held-out tokens."""
    num_experts = y_TE.shape[1]
    if candidates is not None and not 1 <= candidates <= num_experts:
        raise TraceError(f"expected 1..{num_experts} candidates to guess, found {candidates}")
    scores_TE = log_odds(x_TE[~held_T], y_TE[~held_T], x_TE[held_T])
    load_E, truth_TE, unit_T = y_TE[~held_T].sum(0), y_TE[held_T], unit_T[held_T]
    size_T = truth_TE.sum(1) if candidates is None else np.full(len(truth_TE), candidates)
    hits_B, static_B, selected_B = (
        intervals.sums(values_T, unit_T)
        for values_T in (
            recalled(scores_TE, truth_TE, size_T),
            recalled(np.broadcast_to(load_E, truth_TE.shape), truth_TE, size_T),
            truth_TE.sum(1),
        )
    )
    static = intervals.ratio(static_B, selected_B)
    gains_B2 = np.stack([hits_B - static_B, selected_B], axis=1)
    return Predictability(
        what=f"experts of layer {following} guessed from this layer's",
        layer=layer,
        interval=intervals.ratio(hits_B, selected_B),
        chance=static.value,
        chance_is="static: always the most loaded experts of the training half",
        references={"experts at random": float(size_T.mean()) / num_experts},
        static=static,
        gain=intervals.bootstrap(gains_B2, lambda total: total[:, 0] / np.maximum(total[:, 1], 1)),
        candidates=str(candidates or "as many as the token really selects"),
        method=f"{HALVES}; {intervals.METHOD}",
    )


def hot_set(
    train_TE: NDArray[np.bool_],
    test_TE: NDArray[np.bool_],
    train_unit_T: NDArray[np.int64],
    test_unit_T: NDArray[np.int64],
    *,
    layer: int,
    share: float,
    method: str = HALVES,
) -> HotSet:
    """The hottest `share` of experts on `train_TE`, and what they cover of `test_TE`.

    The two flattering figures choose their set anew in each resample, as they do on the text.
    """
    if not 0 < share <= 1:
        raise TraceError(f"expected a share of experts above 0 and up to 1, found {share}")
    num_experts = train_TE.shape[1]
    train_BE = intervals.sums(train_TE, train_unit_T)
    test_BE = intervals.sums(test_TE, test_unit_T)
    count = ceil(share * num_experts - 1e-9)
    hottest = np.argsort(-train_BE.sum(0), kind="stable")[:count]

    def best(counts_RE: NDArray[np.float64]) -> NDArray[np.float64]:
        covered_R = np.sort(counts_RE, axis=1)[:, num_experts - count :].sum(1)
        return covered_R / np.maximum(counts_RE.sum(1), 1)

    return HotSet(
        layer=layer,
        experts=tuple(int(e) for e in hottest),
        num_experts=num_experts,
        coverage=intervals.ratio(test_BE[:, hottest].sum(1), test_BE.sum(1)),
        uniform=count / num_experts,
        in_sample=intervals.bootstrap(train_BE, best, bounds=(0, 1)),
        hindsight=intervals.bootstrap(test_BE, best, bounds=(0, 1)),
        hottest=intervals.bootstrap(
            test_BE,
            lambda counts_RE: (
                num_experts * counts_RE[:, hottest[0]] / np.maximum(counts_RE.sum(1), 1)
            ),
            bounds=(0, num_experts),
        ),
        method=f"{method}; {intervals.METHOD}",
    )


def log_odds(
    x_TE: NDArray[np.bool_], y_TE: NDArray[np.bool_], held_TE: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(T, E) log-odds of each next expert for `held_TE`, learnt from `x_TE` -> `y_TE`."""
    x, y = x_TE.astype(np.float32), y_TE.astype(np.float32)
    tokens, y_E, x_E = len(x), y.sum(0), x.sum(0)
    both_EE = x.T @ y  # (E of this layer, E of the next)
    given = (both_EE + 1) / (y_E + 2)
    otherwise = (x_E[:, None] - both_EE + 1) / (tokens - y_E + 2)
    present = np.log(given / otherwise)
    absent = np.log((1 - given) / (1 - otherwise))
    prior = np.log((y_E + 1) / (tokens - y_E + 1))
    return held_TE.astype(np.float32) @ (present - absent) + absent.sum(0) + prior


def recalled(
    scores_TE: NDArray, truth_TE: NDArray[np.bool_], size_T: NDArray[np.integer]
) -> NDArray[np.int64]:
    """(T,) how many true experts are among the `size_T` best-scored ones (ties: lower id first)."""
    order = np.argsort(-scores_TE, axis=1, kind="stable")
    chosen = np.arange(truth_TE.shape[1]) < size_T[:, None]
    return (np.take_along_axis(truth_TE, order, axis=1) & chosen).sum(1)
