"""The compiled products: a list of tasks, each some rows of one matrix times some tokens.

Few tokens: codes are multiplied as they are decoded, in registers. Many: 16 rows of a chunk are
decoded to float32 once (16 KiB), then a register tile walks the tokens. Activations stay float32.
Every output element is computed by one task in a fixed order, so results do not depend on threads.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels.codings import CHUNK, GROUP, PANEL
from ktlab.kernels.numba_bytes import column_floats, floats
from ktlab.kernels.numba_formats import (
    CHUNK_BYTES,
    CODES,
    DMIN_AT,
    FLOAT,
    GROUP_BYTES,
    LOW,
    PACKED_BYTES,
    PANEL_BYTES,
    PANEL_HEAD,
    ROW_BYTES,
    ROWS,
    RUN,
    SCALE,
    SCRATCH,
    TILE,
    ask_ahead,
    panel_codes,
    panel_floats,
    panel_scales,
    plain_row,
    row_chunk,
    rows_floats,
)
from ktlab.kernels.numba_jit import SOURCES, inlined, inner, outer
from ktlab.kernels.numba_tiles import NARROW, WIDE, narrow_tile, wide_tile
from ktlab.kernels.numba_vectors import (
    add,
    field,
    load_f32,
    load_f32x16,
    load_u8x16,
    minus,
    multiply_add,
    splat,
    store,
    times,
    total,
)
from ktlab.kernels.weights import aligned_bytes

# Columns of a task: which of two stacks, the expert's offset, rows [first, last), where the
# expert's tokens begin in x and y, how many they are, and the column of y for row 0.
MATRIX, BASE, FIRST, LAST, X_ROW, TOKENS, Y_COLUMN, PACKED, FUSED = range(9)
TASK = 9

SUMS = SCRATCH
"""Where a worker's sums begin, behind what decoding needs."""
PANELS = 4
"""Panels that share a pass over the activations: a chunk of them stays in the second cache."""


def scratch(tokens: int) -> NDArray[np.uint8]:
    """Room for one worker, for tasks of up to `tokens` tokens."""
    return aligned_bytes(SUMS + 4 * PANEL * PANELS * (tokens + WIDE))


@inner
def _row_dot(spec: Any, row: Any, cols: Any, x: Any, sums: Any, work: Any) -> Any:
    """One row in blocks times one token, without a float copy of the row."""
    codes, scale, low = work + CODES, work + SCALE, work + LOW
    a, b = splat(np.float32(0.0)), splat(np.float32(0.0))
    taken = splat(np.float32(0.0))
    with_low = field(spec, DMIN_AT) >= 0
    for c in range((cols + CHUNK - 1) // CHUNK):
        groups = row_chunk(spec, row, c, cols, codes, scale, low)
        here = x + 4 * CHUNK * c
        for g in range(groups):
            value = times(floats(load_u8x16(codes + GROUP * g)), splat(load_f32(scale + 8 * g)))
            a = multiply_add(value, load_f32x16(here + 4 * GROUP * g), a)
            value = times(
                floats(load_u8x16(codes + GROUP * g + RUN)), splat(load_f32(scale + 8 * g + 4))
            )
            b = multiply_add(value, load_f32x16(here + 4 * GROUP * g + 4 * RUN), b)
        if with_low:  # only formats of whole chunks have minima
            taken = multiply_add(load_f32x16(low), load_f32x16(sums + 4 * RUN * c), taken)
    return total(minus(add(a, b), taken))


@inlined
def _plain_row_dot(spec: Any, row: Any, cols: Any, x: Any, work: Any) -> Any:
    """The same for f32, f16, bf16."""
    found = splat(np.float32(0.0))
    for c in range((cols + CHUNK - 1) // CHUNK):
        here = min(CHUNK, cols - c * CHUNK)
        plain_row(spec, row + c * field(spec, CHUNK_BYTES), here, work + ROWS)
        for i in range((here + RUN - 1) // RUN):
            value = load_f32x16(work + ROWS + 4 * RUN * i)
            found = multiply_add(value, load_f32x16(x + 4 * CHUNK * c + 4 * RUN * i), found)
    return total(found)


@inner
def _panel_dot(spec: Any, panel: Any, cols: Any, x: Any, sums: Any, y: Any) -> Any:
    """16 packed rows times one token; 16 sums at y."""
    found, taken = splat(np.float32(0.0)), splat(np.float32(0.0))
    with_low = field(spec, DMIN_AT) >= 0
    for c in range((cols + CHUNK - 1) // CHUNK):
        groups = (min(CHUNK, cols - c * CHUNK) + GROUP - 1) // GROUP
        p = panel + field(spec, PANEL_HEAD) + c * field(spec, PACKED_BYTES)
        for g in range(groups):
            ask_ahead(spec, p, g)
            for h in range(2):
                scale, low = panel_scales(spec, panel, p, groups, g, h)
                a, b = splat(np.float32(0.0)), splat(np.float32(0.0))
                for v in range(4 * h, 4 * h + 4):
                    codes = panel_codes(spec, p + g * field(spec, GROUP_BYTES), v)
                    at = x + 4 * (c * CHUNK + GROUP * g + 4 * v)
                    a = multiply_add(column_floats(codes, 0), splat(load_f32(at)), a)
                    b = multiply_add(column_floats(codes, 1), splat(load_f32(at + 4)), b)
                    a = multiply_add(column_floats(codes, 2), splat(load_f32(at + 8)), a)
                    b = multiply_add(column_floats(codes, 3), splat(load_f32(at + 12)), b)
                found = multiply_add(scale, add(a, b), found)
                if with_low:
                    run = c * CHUNK // RUN + 2 * g + h
                    taken = multiply_add(low, splat(load_f32(sums + 4 * run)), taken)
    store(y, minus(found, taken))


@inlined
def _plain_panel_dot(spec: Any, panel: Any, cols: Any, x: Any, y: Any, work: Any) -> Any:
    """The same for f32, f16, bf16."""
    found = splat(np.float32(0.0))
    for c in range((cols + CHUNK - 1) // CHUNK):
        groups = panel_floats(spec, panel, c, cols, work + TILE)
        for k in range(GROUP * groups):
            value = splat(load_f32(x + 4 * (CHUNK * c + k)))
            found = multiply_add(load_f32x16(work + TILE + 4 * PANEL * k), value, found)
    store(y, found)


@inlined
def _write(sums: Any, rows: Any, y: Any) -> Any:
    """16 sums to `rows` places of y."""
    if rows == PANEL:
        store(y, load_f32x16(sums))
    else:
        for r in range(rows):
            store(y + 4 * r, load_f32(sums + 4 * r))


@inlined
def _fused(
    spec: Any, packed: Any, data: Any, first: Any, last: Any, cols: Any, x: Any, x_stride: Any,
    sums: Any, tokens: Any, y: Any, y_stride: Any, work: Any,
) -> Any:  # fmt: skip
    """Rows first..last times each token; x and y are those of the first token."""
    for start in range(first, last, PANEL):
        rows = min(PANEL, last - start)
        panel = data + start // PANEL * field(spec, PANEL_BYTES)
        for t in range(tokens):
            token, own = x + t * x_stride, sums + t * (x_stride // RUN)
            if packed:
                if field(spec, FLOAT):
                    _plain_panel_dot(spec, panel, cols, token, work + SUMS, work)
                else:
                    _panel_dot(spec, panel, cols, token, own, work + SUMS)
            else:
                for r in range(rows):
                    row = data + (start + r) * field(spec, ROW_BYTES)
                    if field(spec, FLOAT):
                        found = _plain_row_dot(spec, row, cols, token, work)
                    else:
                        found = _row_dot(spec, row, cols, token, own, work)
                    store(work + SUMS + 4 * r, found)
            _write(work + SUMS, rows, y + t * y_stride + 4 * start)


@inlined
def _decoded(
    spec: Any, packed: Any, data: Any, first: Any, last: Any, cols: Any, x: Any, x_stride: Any,
    tokens: Any, y: Any, y_stride: Any, work: Any,
) -> Any:  # fmt: skip
    """Rows first..last times all tokens of an expert; x is in tiles (see `tiles`)."""
    padded = (tokens + NARROW - 1) // NARROW * NARROW
    wide, narrow = padded // WIDE, padded % WIDE
    for block in range(first, last, PANELS * PANEL):
        end = min(block + PANELS * PANEL, last)
        for i in range(PANELS * padded):
            store(work + SUMS + 4 * PANEL * i, splat(np.float32(0.0)))
        for c in range((cols + CHUNK - 1) // CHUNK):
            sums = work + SUMS
            for start in range(block, end, PANEL):
                if packed:
                    panel = data + start // PANEL * field(spec, PANEL_BYTES)
                    groups = panel_floats(spec, panel, c, cols, work + TILE)
                else:
                    groups = rows_floats(spec, data, start, last, c, cols, work)
                columns, at = GROUP * groups, x + 4 * CHUNK * padded * c
                for _ in range(wide):
                    wide_tile(work + TILE, at, sums, columns)
                    at += 4 * WIDE * columns
                    sums += 4 * WIDE * PANEL
                if narrow:
                    narrow_tile(work + TILE, at, sums, columns)
                    sums += 4 * NARROW * PANEL
        sums = work + SUMS
        for start in range(block, end, PANEL):
            for t in range(tokens):
                to = y + t * y_stride + 4 * start
                _write(sums + 4 * PANEL * t, min(PANEL, end - start), to)
            sums += 4 * PANEL * padded


@inlined
def _address(array: Any) -> Any:
    return np.int64(array.ctypes.data)


@outer
def products(
    tasks: Any, first: Any, last: Any, specs: Any, data_0: Any, data_1: Any, cols: Any,
    x: Any, sums: Any, y: Any, work: Any, sources: Any = SOURCES,
) -> Any:  # fmt: skip  # pragma: no cover - compiled
    """Tasks first..last: y[rows of x, columns] = x W^T for some rows of one of two stacks.

    data_0 and data_1 are addresses: read-only and writable arrays would be compiled twice.
    x (P, K padded to 32) float32: an expert's tokens together, padded to 4 and in tiles unless
    fused; sums (P, K / 16) over 16 columns; y (P, ...) float32; work: `scratch`."""
    x_stride, y_stride = 4 * x.shape[1], 4 * y.shape[1]
    for i in range(first, last):
        task = tasks[i]
        spec = _address(specs) + 8 * specs.shape[1] * task[MATRIX]
        data = (data_1 if task[MATRIX] else data_0) + task[BASE]
        own_x = _address(x) + task[X_ROW] * x_stride
        own_y = _address(y) + task[X_ROW] * y_stride + 4 * task[Y_COLUMN]
        if task[FUSED]:
            own_sums = _address(sums) + task[X_ROW] * (x_stride // RUN)
            _fused(
                spec, task[PACKED], data, task[FIRST], task[LAST], cols, own_x, x_stride,
                own_sums, task[TOKENS], own_y, y_stride, _address(work),
            )  # fmt: skip
        else:
            _decoded(
                spec, task[PACKED], data, task[FIRST], task[LAST], cols, own_x, x_stride,
                task[TOKENS], own_y, y_stride, _address(work),
            )  # fmt: skip


@outer
def dequantize_rows(
    spec: Any, data: Any, packed: Any, first: Any, last: Any, cols: Any, w: Any, work: Any,
    sources: Any = SOURCES,
) -> Any:  # fmt: skip  # pragma: no cover - compiled
    """Rows first..last of one matrix as exact float32: w (last - first, cols)."""
    form, to, room = _address(spec), _address(w), _address(work)
    for start in range(first // PANEL * PANEL, last, PANEL):
        for c in range((cols + CHUNK - 1) // CHUNK):
            if packed:
                panel = data + start // PANEL * field(form, PANEL_BYTES)
                panel_floats(form, panel, c, cols, room + TILE)
            else:
                rows_floats(form, data, start, last, c, cols, room)
            for n in range(max(start, first), min(start + PANEL, last)):
                for k in range(min(CHUNK, cols - c * CHUNK)):
                    value = load_f32(room + TILE + 4 * (k * PANEL + n - start))
                    store(to + 4 * ((n - first) * cols + c * CHUNK + k), value)
