"""The order in which a cache policy would keep a layer's experts, replayed token by token.

See `ktlab.experts.caches` for what the policies are. Letters: T tokens, K selected, E experts.
"""

import numba
import numpy as np
from numpy.typing import NDArray

LRU, LFU, ORACLE = 0, 1, 2


def positions(
    policy: str, profile_TK: NDArray, scored_TK: NDArray, num_experts: int
) -> NDArray[np.int64]:
    """(T, K) smallest capacity at which each scored lookup hits; E + 1 where none does, 0 empty."""
    profile_TK = np.ascontiguousarray(profile_TK, np.int64)
    scored_TK = np.ascontiguousarray(scored_TK, np.int64)
    if policy == "static":
        load_E = np.bincount(profile_TK[profile_TK >= 0], minlength=num_experts)
        rank_E = np.empty(num_experts, np.int64)
        rank_E[np.argsort(-load_E, kind="stable")] = np.arange(1, num_experts + 1)
        return np.where(scored_TK >= 0, rank_E[scored_TK], 0)
    if policy == "oracle":
        return replay_order(scored_TK, next_use(scored_TK, num_experts), num_experts, ORACLE)
    ids_TK = np.concatenate([profile_TK, scored_TK])
    return replay_order(
        ids_TK, np.zeros_like(ids_TK), num_experts, LRU if policy == "lru" else LFU
    )[len(profile_TK) :]


@numba.njit(cache=True, nogil=True)
def next_use(ids_TK: NDArray, num_experts: int) -> NDArray:
    """(T, K) the next token that needs the expert chosen at (t, k); T where none does."""
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
def replay_order(ids_TK: NDArray, next_TK: NDArray, num_experts: int, policy: int) -> NDArray:
    """(T, K) position (from 1) of each lookup in the policy's order; E + 1 if never loaded.

    `order[i]` is the expert that a cache of i + 1 holds and one of i does not. After a token whose
    experts are the set S, a cache of c keeps the best c of its contents and S; so the new order
    takes, place by place, the best of: S, and the old order down to this place, less those taken.
    """
    tokens, width = ids_TK.shape
    order = np.full(num_experts, -1)
    place_of = np.full(num_experts, num_experts)  # its inverse; E where never loaded
    filled = 0
    worth = np.zeros(num_experts, np.float64)  # how much a policy wants to keep an expert
    waiting = np.full(num_experts + 1, -1)
    asked = np.zeros(num_experts, np.bool_)
    position_TK = np.zeros((tokens, width), np.int64)
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
        for k in range(width):
            e = ids_TK[t, k]
            if e >= 0:
                position_TK[t, k] = place_of[e] + 1
        count = 0
        for k in range(width):
            e = ids_TK[t, k]
            if e >= 0:
                asked[e] = True
                waiting[count] = e
                count += 1
                recency = t + 1 - k / (width + 1)
                if policy == LRU:
                    worth[e] = recency
                elif policy == LFU:
                    worth[e] = np.floor(worth[e]) + 1 + recency / (tokens + 2)
                else:
                    worth[e] = -next_TK[t, k]
        place = 0
        while count > 0:
            if place < filled and not asked[order[place]]:
                waiting[count] = order[place]
                count += 1
            best = 0
            for j in range(1, count):
                if worth[waiting[j]] > worth[waiting[best]]:
                    best = j
            order[place] = waiting[best]
            place_of[waiting[best]] = place
            count -= 1
            waiting[best] = waiting[count]
            place += 1
        if place > filled:
            filled = place
        for k in range(width):
            if ids_TK[t, k] >= 0:
                asked[ids_TK[t, k]] = False
    return position_TK
