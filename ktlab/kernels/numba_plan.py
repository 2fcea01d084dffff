"""Compiled planning: which rows belong to which expert, and how products are cut into tasks.

In Python this would take longer than a token of a small model. Plain loops and single assignments:
filling a row from a tuple, or `np.full`, takes seconds to compile.
"""

from typing import Any

import numpy as np

from ktlab.kernels.codings import PANEL
from ktlab.kernels.numba_jit import SOURCES, outer
from ktlab.kernels.numba_products import (
    BASE,
    FIRST,
    FUSED,
    LAST,
    MATRIX,
    PACKED,
    PANELS,
    TASK,
    TOKENS,
    X_ROW,
    Y_COLUMN,
)
from ktlab.kernels.numba_rows import NOBODY
from ktlab.kernels.numba_tiles import NARROW

# Columns of a group: an expert, its rows [first, first + size) inside its batch, of which `tokens`
# are real, whether it is computed fused, and the first row of its batch.
EXPERT, START, SIZE, COUNT, IS_FUSED, BATCH = range(6)
# Columns of a matrix table: rows, columns, bytes between experts, packed, its first column in y.
ROWS, COLS, STRIDE, IS_PACKED, AT = range(5)
BLOCK = PANELS * PANEL
"""Rows of a task are a multiple of this where weights are decoded, of 16 where they are not."""


@outer
def plan(
    ids_TK: Any, weights_TK: Any, experts: Any, few: Any, limit: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover - compiled
    """-> groups, token of each row (`NOBODY`: padding), its weight; and the lowest and highest id.

    Rows of an expert follow each other in the order of tokens and slots. A batch has at most
    `limit` rows, or one expert. Ids out of range are left out: look at the lowest and highest."""
    tokens, slots = ids_TK.shape
    counts = np.zeros(experts, np.int64)
    lowest, highest = -1, -1
    for t in range(tokens):
        for k in range(slots):
            e = ids_TK[t, k]
            lowest, highest = min(lowest, e), max(highest, e)
            if 0 <= e < experts:
                counts[e] += 1
    used = 0
    for e in range(experts):
        used += 1 if counts[e] else 0
    groups = np.empty((used, 6), np.int64)
    place = np.empty(experts, np.int64)
    row, batch, g = 0, 0, 0
    for e in range(experts):
        count = counts[e]
        if count == 0:
            continue
        fused = 1 if count <= few else 0
        size = count if fused else (count + NARROW - 1) // NARROW * NARROW
        if row > batch and row - batch + size > limit:
            batch = row
        groups[g, EXPERT], groups[g, START], groups[g, SIZE] = e, row - batch, size
        groups[g, COUNT], groups[g, IS_FUSED], groups[g, BATCH] = count, fused, batch
        place[e] = row
        row += size
        g += 1
    token_P = np.empty(row, np.int64)
    weight_P = np.zeros(row, np.float32)
    for p in range(row):
        token_P[p] = NOBODY
    for t in range(tokens):
        for k in range(slots):
            e = ids_TK[t, k]
            if 0 <= e < experts:
                token_P[place[e]] = t
                weight_P[place[e]] = weights_TK[t, k]
                place[e] += 1
    return groups, token_P, weight_P, lowest, highest


@outer
def cut(
    groups: Any, matrices: Any, size: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover - compiled
    """Tasks for `products`: groups times matrices, cut into about `size` products each."""
    total = 0
    for pass_ in range(2):
        if pass_ == 1:
            tasks = np.empty((total, TASK), np.int64)
        total = 0
        for g in range(len(groups)):
            unit = PANEL if groups[g, IS_FUSED] else BLOCK
            for m in range(len(matrices)):
                rows = matrices[m, ROWS]
                each = max(1, matrices[m, COLS] * groups[g, COUNT])
                step = max(unit, size // each // unit * unit)
                for first in range(0, rows, step):
                    if pass_ == 1:
                        task = tasks[total]
                        task[MATRIX], task[PACKED] = m, matrices[m, IS_PACKED]
                        task[BASE] = groups[g, EXPERT] * matrices[m, STRIDE]
                        task[FIRST], task[LAST] = first, min(first + step, rows)
                        task[X_ROW], task[TOKENS] = groups[g, START], groups[g, COUNT]
                        task[Y_COLUMN], task[FUSED] = matrices[m, AT], groups[g, IS_FUSED]
                    total += 1
    return tasks
