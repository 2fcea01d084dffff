"""The order in which a cache policy would keep experts, replayed step by step.

See `ktlab.experts.policies` for what the policies are. A step is a token's lookups in one layer;
where the layers share a cache, steps go through the layers of a token in turn, and the expert e of
the l-th layer has the number l * E + e.

Letters: T steps, K selected, P foreseen, E experts in the cache's reach.
"""

import numba
import numpy as np
from numpy.typing import NDArray

LRU, LFU, ORACLE, LEAST_STALE = 0, 1, 2, 3
NUMBERS = {"lru": LRU, "lfu": LFU, "oracle": ORACLE, "least-stale": LEAST_STALE}
NOBODY = np.full((0, 0), -1, np.int64)


def positions(
    policy: str,
    profile_TK: NDArray,
    scored_TK: NDArray,
    num_experts: int,
    *,
    foreseen: tuple[NDArray, NDArray] = (NOBODY, NOBODY),
    layers: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(T, K) smallest capacity at which each scored lookup hits; E + 1 where none does, 0 empty.

    With `foreseen` experts of the profile's and of the scored steps, (T, P) each, best guess first:
    also (T, P) position of each foreseen one before it was fetched, and after (0 where empty). A
    cache of c fetches it where after <= c < before. Without, those are (T, 0).
    """
    profile_TK = np.ascontiguousarray(profile_TK, np.int64)
    scored_TK = np.ascontiguousarray(scored_TK, np.int64)
    nobody_T0 = np.full((len(scored_TK), 0), -1, np.int64)
    if policy == "static":
        load_E = np.bincount(profile_TK[profile_TK >= 0], minlength=num_experts)
        rank_E = np.empty(num_experts, np.int64)
        rank_E[np.argsort(-load_E, kind="stable")] = np.arange(1, num_experts + 1)
        return np.where(scored_TK >= 0, rank_E[scored_TK], 0), nobody_T0, nobody_T0
    if policy == "oracle":
        next_TK = next_use(scored_TK, num_experts)
        return replay_order(scored_TK, next_TK, nobody_T0, num_experts, ORACLE, layers)
    ids_TK, start = np.concatenate([profile_TK, scored_TK]), len(profile_TK)
    guess_TP = np.full((len(ids_TK), 0), -1, np.int64)
    if foreseen[1].size:
        guess_TP = np.ascontiguousarray(np.concatenate(foreseen), np.int64)
    found = replay_order(
        ids_TK, np.zeros_like(ids_TK), guess_TP, num_experts, NUMBERS[policy], layers
    )
    return found[0][start:], found[1][start:], found[2][start:]


@numba.njit(cache=True, nogil=True)
def next_use(ids_TK: NDArray, num_experts: int) -> NDArray:
    """(T, K) the next step that needs the expert chosen at (t, k); T where none does."""
    tokens, width = ids_TK.shape
    following = np.full(num_experts, tokens)
    next_TK = np.zeros((tokens, width), np.int64)
    for t in range(tokens - 1, -1, -1):
        for k in range(width):
            if ids_TK[t, k] >= 0:
                next_TK[t, k] = following[ids_TK[t, k]]
        for k in range(width):
            if ids_TK[t, k] >= 0:
                following[ids_TK[t, k]] = t
    return next_TK


@numba.njit(cache=True, nogil=True)
def _value(e: int, t: int, worth: NDArray, num_experts: int, policy: int, layers: int) -> float:
    """How much the policy wants to keep an expert after step t."""
    if policy != LEAST_STALE:
        return worth[e]
    # Of this token or stale, then how soon its layer comes round, then when it was last used.
    fresh = worth[e] > t - t % layers
    away = (e // (num_experts // layers) - t % layers - 1) % layers + 1
    return 1e12 * fresh - 1e8 * away + worth[e]


@numba.njit(cache=True, nogil=True)
def _keep(
    row: NDArray, t: int, order: NDArray, place_of: NDArray, filled: int, worth: NDArray,
    asked: NDArray, waiting: NDArray, values: NDArray, policy: int, layers: int,
) -> int:  # fmt: skip
    """Bring the experts of `row` in; returns how many were ever brought in.

    `order[i]` is the expert that a cache of i + 1 holds and one of i does not. A cache of c keeps
    the best c of its contents and the row's; so the new order takes, place by place, the best of:
    the row, and the old order down to this place, less those taken. That holds however the worth of
    experts has changed since the last step, as long as it is the same for caches of all sizes.
    """
    num_experts, count, place = len(place_of), 0, 0
    for k in range(len(row)):
        e = row[k]
        if e >= 0:
            asked[e] = True
            waiting[count], values[count] = e, _value(e, t, worth, num_experts, policy, layers)
            count += 1
    while count > 0:
        if place < filled and not asked[order[place]]:
            e = order[place]
            waiting[count], values[count] = e, _value(e, t, worth, num_experts, policy, layers)
            count += 1
        best = 0
        for j in range(1, count):
            if values[j] > values[best]:
                best = j
        order[place] = waiting[best]
        place_of[waiting[best]] = place
        count -= 1
        waiting[best], values[best] = waiting[count], values[count]
        place += 1
    for k in range(len(row)):
        if row[k] >= 0:
            asked[row[k]] = False
    return max(place, filled)


@numba.njit(cache=True, nogil=True)
def replay_order(
    ids_TK: NDArray, next_TK: NDArray, guess_TP: NDArray, num_experts: int, policy: int, layers: int
) -> tuple[NDArray, NDArray, NDArray]:
    """(T, K) position (from 1) of each lookup in the policy's order, E + 1 if never loaded; and
    (T, P) of each foreseen expert before and after it was fetched ahead of the lookups."""
    tokens, width = ids_TK.shape
    ahead = guess_TP.shape[1]
    order = np.full(num_experts, -1)
    place_of = np.full(num_experts, num_experts)  # its inverse; E where never loaded
    filled = 0
    worth = np.zeros(num_experts, np.float64)
    held = np.zeros(ahead, np.float64)
    waiting = np.full(num_experts + 1, -1)
    values = np.zeros(num_experts + 1, np.float64)
    asked = np.zeros(num_experts, np.bool_)
    position_TK = np.zeros((tokens, width), np.int64)
    before_TP = np.zeros((tokens, ahead), np.int64)
    after_TP = np.zeros((tokens, ahead), np.int64)
    if policy == ORACLE:  # it may start with any contents, so with those needed first
        seen = np.zeros(num_experts, np.bool_)
        for t in range(tokens):
            for k in range(width):
                e = ids_TK[t, k]
                if e >= 0 and not seen[e]:
                    seen[e] = True
                    order[filled], place_of[e] = e, filled
                    worth[e] = -t
                    filled += 1
    for t in range(tokens):
        if ahead:
            for p in range(ahead):
                e = guess_TP[t, p]
                if e >= 0:
                    before_TP[t, p] = place_of[e] + 1
                    held[p], worth[e] = worth[e], 1e18 * (1 - p / (2 * ahead))
            filled = _keep(
                guess_TP[t], t, order, place_of, filled, worth, asked, waiting, values, policy,
                layers,
            )  # fmt: skip
            for p in range(ahead):
                e = guess_TP[t, p]
                if e >= 0:
                    after_TP[t, p] = place_of[e] + 1
                    worth[e] = held[p]  # until it is used it is worth what it was
        for k in range(width):
            e = ids_TK[t, k]
            if e >= 0:
                position_TK[t, k] = place_of[e] + 1
        for k in range(width):
            e = ids_TK[t, k]
            if e >= 0:
                recency = t + 1 - k / (width + 1)
                if policy == LFU:
                    worth[e] = np.floor(worth[e]) + 1 + recency / (tokens + 2)
                elif policy == ORACLE:
                    worth[e] = -next_TK[t, k]
                else:
                    worth[e] = recency
        filled = _keep(
            ids_TK[t], t, order, place_of, filled, worth, asked, waiting, values, policy, layers
        )
    return position_TK, before_TP, after_TP
