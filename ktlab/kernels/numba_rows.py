"""Compiled steps between the products: activations laid out for them, SwiGLU, the weighted sum.

All arguments but numbers are addresses or small tables. Letters: P rows, each one token at one of
its experts, the rows of an expert together; K columns.
"""

import math
from typing import Any

import numpy as np

from ktlab.kernels.codings import CHUNK
from ktlab.kernels.numba_formats import RUN
from ktlab.kernels.numba_jit import SOURCES, inlined, outer
from ktlab.kernels.numba_tiles import NARROW, WIDE
from ktlab.kernels.numba_vectors import add, load_f32, load_f32x16, store, total

NOBODY = -1
"""A row of zeros that fills up a tile."""


@inlined
def _copy(source: Any, columns: Any, target: Any, step: Any) -> Any:
    """`columns` floats to places `step` bytes apart."""
    for k in range(columns):
        store(target + step * k, load_f32(source + 4 * k))


@inlined
def _clear(columns: Any, target: Any, step: Any) -> Any:
    for k in range(columns):
        store(target + step * k, np.float32(0.0))


@outer
def lay_out(
    source: Any, source_stride: Any, cols: Any, rows_P: Any, group: Any, x: Any, padded: Any,
    sums: Any, sources: Any = SOURCES,
) -> Any:  # fmt: skip  # pragma: no cover - compiled
    """One expert's activations, `group` = (first row, rows, fused), into x (P, padded) float32.

    rows_P says which row of `source` each row is. Fused: rows as they are, zeros beyond `cols`,
    and, if `sums` is no null, their sums over 16 columns. Otherwise tiles: for each chunk, for
    each 8 (the last maybe 4) rows, [column][row]."""
    first, rows, fused = group
    base = x + 4 * padded * first
    for i in range(rows):
        taken = source + source_stride * rows_P[first + i]
        if fused:
            to, step = base + 4 * padded * i, 4
            if rows_P[first + i] == NOBODY:
                _clear(padded, to, step)
            else:
                _copy(taken, cols, to, step)
                _clear(padded - cols, to + 4 * cols, step)
            if sums:
                for run in range(padded // RUN):
                    found = total(load_f32x16(to + 4 * RUN * run))
                    store(sums + 4 * (padded // RUN * (first + i) + run), found)
            continue
        tile = i // WIDE
        width = WIDE if rows - tile * WIDE >= WIDE else NARROW
        for start in range(0, padded, CHUNK):
            here = min(CHUNK, padded - start)
            inside = min(here, max(0, cols - start))
            to = base + 4 * (start * rows + tile * WIDE * here + i % WIDE)
            if rows_P[first + i] == NOBODY:
                inside = 0
            else:
                _copy(taken + 4 * start, inside, to, 4 * width)
            _clear(here - inside, to + 4 * width * inside, 4 * width)


@outer
def swiglu(
    both: Any, width: Any, weights_P: Any, first: Any, last: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover
    """both (P, 2 width): gate -> weight * silu(gate) * up, in place, for rows first..last."""
    for p in range(first, last):
        gate = both + 8 * width * p
        up = gate + 4 * width
        for f in range(width):
            g = load_f32(gate + 4 * f)
            value = g / (np.float32(1.0) + math.exp(-g))
            store(gate + 4 * f, weights_P[p] * (value * load_f32(up + 4 * f)))


@outer
def add_rows(
    y: Any, cols: Any, rows_P: Any, out: Any, first: Any, last: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover - compiled
    """out[rows_P[p]] += y[p] (P, cols) for columns first..last, in the order of p."""
    for p in range(len(rows_P)):
        if rows_P[p] == NOBODY:
            continue
        source, target = y + 4 * cols * p, out + 4 * cols * rows_P[p]
        whole = (last - first) // RUN * RUN + first
        for k in range(first, whole, RUN):
            found = add(load_f32x16(target + 4 * k), load_f32x16(source + 4 * k))
            store(target + 4 * k, found)
        for k in range(whole, last):
            store(target + 4 * k, load_f32(target + 4 * k) + load_f32(source + 4 * k))
