"""Compiled steps between the products: activations laid out for them, SwiGLU, the weighted sum.

Letters: P rows, each one token at one of
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


@inlined
def _lay_out_row(
    source: Any, cols: Any, size: Any, fused: Any, i: Any, x: Any, padded: Any, sums: Any
) -> Any:
    """Row i of an expert's `size`; source is its address, 0 for a row of padding."""
    if fused:
        to = x + 4 * padded * i
        inside = cols if source else 0
        _copy(source, inside, to, 4)
        _clear(padded - inside, to + 4 * inside, 4)
        if sums:
            for run in range(padded // RUN):
                found = total(load_f32x16(to + 4 * RUN * run))
                store(sums + 4 * (padded // RUN * i + run), found)
        return
    tile = i // WIDE
    width = WIDE if size - tile * WIDE >= WIDE else NARROW
    for start in range(0, padded, CHUNK):
        here = min(CHUNK, padded - start)
        inside = min(here, max(0, cols - start)) if source else 0
        to = x + 4 * (start * size + tile * WIDE * here + i % WIDE)
        _copy(source + 4 * start, inside, to, 4 * width)
        _clear(here - inside, to + 4 * width * inside, 4 * width)


@outer
def lay_out(
    source: Any, source_stride: Any, cols: Any, rows_P: Any, groups: Any, first: Any, last: Any,
    x: Any, padded: Any, sums: Any, with_sums: Any, sources: Any = SOURCES,
) -> Any:  # fmt: skip  # pragma: no cover - compiled
    """Activations of experts first..last (`numba_plan` groups) into x (P, padded) float32.

    rows_P says which row of `source` each row is. Fused: rows as they are, zeros beyond `cols`,
    and, if asked for, their sums over 16 columns. Otherwise tiles: for each chunk, for each 8 (the
    last maybe 4) rows, [column][row]."""
    for g in range(first, last):
        start, size, fused = groups[g, 1], groups[g, 2], groups[g, 4]
        own = np.int64(x.ctypes.data) + 4 * padded * start
        own_sums = np.int64(sums.ctypes.data) + 4 * (padded // RUN) * start if with_sums else 0
        for i in range(size):
            row = rows_P[start + i]
            taken = 0 if row == NOBODY else source + source_stride * row
            _lay_out_row(taken, cols, size, fused, i, own, padded, own_sums)


@outer
def swiglu(
    both: Any, weights_P: Any, first: Any, last: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover - compiled
    """both (P, 2 F): gate -> weight * silu(gate) * up, in place, for rows first..last."""
    width = both.shape[1] // 2
    for p in range(first, last):
        gate = np.int64(both.ctypes.data) + 8 * width * p
        up = gate + 4 * width
        for f in range(width):
            g = load_f32(gate + 4 * f)
            value = g / (np.float32(1.0) + math.exp(-g))
            store(gate + 4 * f, weights_P[p] * (value * load_f32(up + 4 * f)))


@outer
def add_rows(
    y: Any, rows_P: Any, out: Any, first: Any, last: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover - compiled
    """out[rows_P[p]] += y[p] for columns first..last, in the order of p."""
    cols = y.shape[1]
    whole = (last - first) // RUN * RUN + first
    for p in range(len(rows_P)):
        if rows_P[p] == NOBODY:
            continue
        source = np.int64(y.ctypes.data) + 4 * cols * p
        target = np.int64(out.ctypes.data) + 4 * cols * rows_P[p]
        for k in range(first, whole, RUN):
            found = add(load_f32x16(target + 4 * k), load_f32x16(source + 4 * k))
            store(target + 4 * k, found)
        for k in range(whole, last):
            store(target + 4 * k, load_f32(target + 4 * k) + load_f32(source + 4 * k))
