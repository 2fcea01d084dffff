"""Encoders of `quantization.kquants` and of gguf's plain 4, 5 and 8 bits, compiled: the same bytes.

A format is a row of numbers here too (`_spec`), so that all share one compiled function. 16 blocks
of 32 or sub-blocks of a super-block are encoded side by side, each in its own lane of a vector: a
unit. Everything but the outermost functions takes addresses.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels import codings
from ktlab.kernels.encodings import (
    AFFINE,
    ENCODED,
    ROUNDED,
    SCALES_6_BIT,
    SCALES_BYTES,
    SCALES_Q2_K,
    SCALES_Q3_K,
    SYMMETRIC,
)
from ktlab.kernels.numba_bytes import bits, brain_floats, half, halves, turn_16x16, with_high
from ktlab.kernels.numba_jit import SOURCES, folded, inner, outer
from ktlab.kernels.numba_rounding import (
    bit_word,
    eighths,
    half_bits,
    largest,
    magnitude,
    nearest_whole,
    over,
    signed_as,
    to_bytes,
    truncated,
    where_less,
)
from ktlab.kernels.numba_search import (
    MOST,
    ROW,
    SEARCH,
    WEIGHT,
    codes,
    extremes,
    search_affine,
    search_symmetric,
)
from ktlab.kernels.numba_vectors import (
    add,
    field,
    load_f32,
    load_f32x16,
    load_u8,
    load_u8x16,
    load_u8x32,
    load_u16x16,
    minus,
    splat,
    store,
    times,
)
from ktlab.kernels.numba_workers import share
from ktlab.quantization import QTensor, float8, get_format, kquants
from ktlab.quantization.formats import SMALLEST

LANES = 16
PIECE = 1 << 18
"""Weights that a thread takes at a time: a megabyte of float32, where the source must be decoded
to them first, stays in its cache."""

F32, F16, BF16, FP8 = range(4)
READ = {"f32": F32, "f16": F16, "bf16": BF16, "fp8_e4m3": FP8}
"""Formats that the encoder reads itself; of others it takes float32."""

# Places in a spec; planes follow.
(
    KIND, COUNT, LOW, HIGH, D_AT, ZERO, SCALES, SCALES_AT, SCALE_LIMIT, WORD_AT,
    BLOCK, BLOCK_BYTES, STEPS, GRID, PLANES,
) = range(15)  # fmt: skip
PLANE_AT, PLANE_WIDTH, PLANE_MEMBERS, PLANE_RUN, PLANE_SHIFT = range(PLANES + 1, PLANES + 6)
PLANE = 5

# A worker's scratch: a unit as it comes and turned, what the search needs, codes as bytes,
# scales and minima as floats and as bytes, the largest magnitudes so far.
PLAIN = SEARCH
TURNED = PLAIN + MOST * ROW
CODES = TURNED + MOST * ROW
SCALE = CODES + MOST * LANES
MINIMUM = SCALE + ROW
D = MINIMUM + ROW
DMIN = D + ROW
SCALE_BYTES = DMIN + ROW
MINIMUM_BYTES = SCALE_BYTES + LANES
LARGEST = MINIMUM_BYTES + LANES
SCRATCH = LARGEST + ROW


@lru_cache(maxsize=64)
def _spec(name: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The numbers that the compiled functions read, and the grid of the search."""
    coded, format = ENCODED[name], get_format(name)
    grid = np.ascontiguousarray(kquants.GRIDS.get(name, ()), np.float32)
    found = [
        coded.kind, coded.size, coded.low, coded.high, coded.d_at, coded.zero, coded.scales,
        coded.scales_at, coded.scale_limit, coded.bit_word_at, format.block_size,
        format.block_bytes, len(grid), grid.ctypes.data, len(coded.planes),
    ]  # fmt: skip
    for p in coded.planes:
        found += [p.at, p.width, p.members, p.run, p.shift]
    return np.array(found, np.int64), grid


# ---- in ------------------------------------------------------------------------------------------


@folded
def _floats(kind: Any, source: Any, at: Any) -> Any:
    """16 elements from number `at` on."""
    if kind == F32:
        found = load_f32x16(source + 4 * at)
    elif kind == F16:
        found = halves(load_u16x16(source + 2 * at))
    elif kind == BF16:
        found = brain_floats(load_u16x16(source + 2 * at))
    else:
        block = source + at // float8.GROUP * float8.BLOCK_BYTES
        codes = eighths(load_u8x16(block + 4 + at % float8.GROUP))
        found = times(splat(load_f32(block)), codes)
    return found


@folded
def _read(kind: Any, source: Any, first: Any, here: Any, work: Any) -> Any:
    """Elements first..first + here as float32, values near 0 as 0; zeros after."""
    none, smallest = splat(np.float32(0.0)), splat(SMALLEST)
    for i in range(0, MOST * LANES, LANES):
        value = none
        if i < here:
            value = _floats(kind, source, first + i)
        store(work + LARGEST, largest(load_f32x16(work + LARGEST), value))
        store(work + PLAIN + 4 * i, where_less(magnitude(value), smallest, none, value))


# ---- scales and codes ----------------------------------------------------------------------------


@inner
def _affine(spec: Any, count: Any, units: Any, work: Any) -> Any:
    """Codes at TURNED, scales and minima as bytes, d and dmin of each super-block as floats."""
    high = np.float32(field(spec, HIGH))
    x, limit = work + TURNED, np.float32(field(spec, SCALE_LIMIT))
    scale = search_affine(x, count, high, field(spec, GRID), field(spec, STEPS), work)
    minimum = load_f32x16(work + WEIGHT)
    store(work + SCALE, scale)
    store(work + MINIMUM, minimum)
    per = LANES // units
    for unit in range(units):
        d, dmin = np.float32(0.0), np.float32(0.0)
        for lane in range(unit * per, (unit + 1) * per):
            d = max(d, load_f32(work + SCALE + 4 * lane))
            dmin = max(dmin, load_f32(work + MINIMUM + 4 * lane))
        d, dmin = half(half_bits(d / limit)), half(half_bits(dmin / limit))
        for lane in range(unit * per, (unit + 1) * per):
            store(work + D + 4 * lane, d)
            store(work + DMIN + 4 * lane, dmin)
    d16, dmin16 = load_f32x16(work + D), load_f32x16(work + DMIN)
    limit16 = splat(limit)
    scales, minima = over(scale, d16), over(minimum, dmin16)
    scales = nearest_whole(where_less(limit16, scales, limit16, scales))
    minima = nearest_whole(where_less(limit16, minima, limit16, minima))
    store(work + SCALE_BYTES, to_bytes(scales))
    store(work + MINIMUM_BYTES, to_bytes(minima))
    inverse = over(splat(np.float32(1.0)), times(d16, scales))
    codes(x, times(dmin16, minima), inverse, np.float32(0.0), high, count, x)


@inner
def _symmetric(spec: Any, count: Any, work: Any) -> Any:
    """The same with scales that have a sign, and no minima; all 16 are of one super-block."""
    low, high = np.float32(field(spec, LOW)), np.float32(field(spec, HIGH))
    x, limit = work + TURNED, np.float32(field(spec, SCALE_LIMIT))
    scale = search_symmetric(x, count, low, high, field(spec, GRID), field(spec, STEPS), work)
    store(work + SCALE, scale)
    extreme = load_f32(work + SCALE)
    for lane in range(1, LANES):
        value = load_f32(work + SCALE + 4 * lane)
        if abs(value) > abs(extreme):
            extreme = value
    d16 = splat(half(half_bits(extreme / limit)))
    store(work + D, d16)
    lowest, highest = splat(limit), splat(-limit - np.float32(1.0))
    scales = over(scale, d16)
    scales = where_less(scales, lowest, lowest, scales)
    scales = nearest_whole(where_less(highest, scales, highest, scales))
    store(work + SCALE_BYTES, to_bytes(scales))
    inverse = over(splat(np.float32(1.0)), times(d16, scales))
    codes(x, splat(np.float32(0.0)), inverse, low, high, count, x)


@inner
def _plain(spec: Any, work: Any) -> Any:
    """Formats with one scale, as gguf encodes them: d is rounded after the codes are made."""
    x, one = work + TURNED, splat(np.float32(1.0))
    extreme = extremes(x, 32)
    rounded = field(spec, KIND) == ROUNDED
    if rounded:
        d = over(magnitude(extreme), splat(np.float32(field(spec, HIGH))))
    else:
        d = over(extreme, splat(-np.float32(field(spec, ZERO))))
    inverse = over(one, d)
    store(work + D, d)
    middle = splat(np.float32(field(spec, ZERO)) + np.float32(0.5))
    most = splat(np.float32(field(spec, HIGH)) + np.float32(0.5))
    for i in range(32):
        value = times(load_f32x16(x + ROW * i), inverse)
        if rounded:  # halves away from 0
            own = magnitude(value)
            whole = truncated(own)
            rest = minus(own, whole)
            found = signed_as(add(whole, truncated(add(rest, rest))), value)
        else:
            value = add(value, middle)
            found = truncated(where_less(most, value, most, value))
        store(x + ROW * i, found)


# ---- out -----------------------------------------------------------------------------------------


@inner
def _write_codes(spec: Any, count: Any, work: Any) -> Any:
    """Codes [element][lane] as floats -> bytes [lane][element]."""
    zero = np.float32(field(spec, ZERO))
    shift = splat(zero if field(spec, LOW) else np.float32(0.0))
    for start in range(0, count, 16):
        turn_16x16(work + TURNED + ROW * start, ROW, work + PLAIN)
        for lane in range(LANES):
            value = add(load_f32x16(work + PLAIN + ROW * lane), shift)
            store(work + CODES + count * lane + start, to_bytes(value))


@inner
def _write_planes(spec: Any, own: Any, target: Any) -> Any:
    """The codes of one block, bytes at `own`, into their planes."""
    for plane in range(field(spec, PLANES)):
        form = spec + 8 * PLANE * plane
        to, width = target + field(form, PLANE_AT), field(form, PLANE_WIDTH)
        members, run = field(form, PLANE_MEMBERS), field(form, PLANE_RUN)
        shift, mask = field(form, PLANE_SHIFT), (1 << width) - 1
        for start in range(0, field(spec, BLOCK), members * run):
            for i in range(start, start + run, 16):
                found = bits(load_u8x16(own + i), shift, mask)
                for member in range(1, members):
                    value = bits(load_u8x16(own + i + member * run), shift, mask)
                    found = with_high(found, value, member * width)
                store(to, found)
                to += 16
    at = field(spec, WORD_AT)
    if at >= 0:
        store(target + at, bit_word(bits(load_u8x32(own), 4, 1)))


@inner
def _write_scales(spec: Any, scales: Any, minima: Any, to: Any) -> Any:
    kind = field(spec, SCALES)
    if kind == SCALES_BYTES:
        store(to, load_u8x16(scales))
    elif kind == SCALES_Q2_K:
        store(to, with_high(load_u8x16(scales), load_u8x16(minima), 4))
    elif kind == SCALES_6_BIT:
        for i in range(4):
            scale, minimum = load_u8(scales + i), load_u8(minima + i)
            scale_4, minimum_4 = load_u8(scales + 4 + i), load_u8(minima + 4 + i)
            store(to + i, np.uint8(scale | (scale_4 >> 4) << 6))
            store(to + 4 + i, np.uint8(minimum | (minimum_4 >> 4) << 6))
            store(to + 8 + i, np.uint8(scale_4 & 15 | (minimum_4 & 15) << 4))
    elif kind == SCALES_Q3_K:
        for i in range(8):
            low, high = load_u8(scales + i) + 32, load_u8(scales + 8 + i) + 32
            store(to + i, np.uint8(low & 15 | (high & 15) << 4))
        for i in range(4):
            found = 0
            for member in range(4):
                found |= (load_u8(scales + 4 * member + i) + 32 >> 4 & 3) << 2 * member
            store(to + 8 + i, np.uint8(found))


@outer
def encode_rows(
    spec: Any, kind: Any, source: Any, elements: Any, target: Any, work: Any,
    sources: Any = SOURCES,
) -> Any:  # fmt: skip  # pragma: no cover - compiled
    """`elements`, whole blocks, from address `source` to `target`; work: `SCRATCH` bytes."""
    form, room = np.int64(spec.ctypes.data), np.int64(work.ctypes.data)
    count, block = field(form, COUNT), field(form, BLOCK)
    unit = count * LANES
    blocks, per = unit // block, block // count
    for first in range(0, elements, unit):
        here = min(unit, elements - first)
        _read(kind, source, first, here, room)
        for start in range(0, count, 16):
            turn_16x16(room + PLAIN + 4 * start, 4 * count, room + TURNED + ROW * start)
        if field(form, KIND) == AFFINE:
            _affine(form, count, blocks, room)
        elif field(form, KIND) == SYMMETRIC:
            _symmetric(form, count, room)
        else:
            _plain(form, room)
        _write_codes(form, count, room)
        for i in range(here // block):
            to = target + (first // block + i) * field(form, BLOCK_BYTES)
            lane = i * per
            _write_planes(form, room + CODES + count * lane, to)
            _write_scales(
                form, room + SCALE_BYTES + lane, room + MINIMUM_BYTES + lane,
                to + field(form, SCALES_AT),
            )  # fmt: skip
            at = to + field(form, D_AT)
            store(at, half_bits(load_f32(room + D + 4 * lane)))
            if field(form, KIND) == AFFINE:
                store(at + 2, half_bits(load_f32(room + DMIN + 4 * lane)))


@outer
def read_rows(
    kind: Any, source: Any, elements: Any, target: Any, sources: Any = SOURCES
) -> Any:  # pragma: no cover - compiled
    """`elements`, a multiple of 16, as float32 from address `source` to `target`, exact."""
    for i in range(0, elements, LANES):
        store(target + 4 * i, _floats(kind, source, i))


def encode(tensor: QTensor, name: str, out: NDArray[np.uint8], threads: int) -> None:
    """`tensor` in a format of `ENCODED`, into `out` (rows, row_bytes); `FormatError` where values
    are too large for it. The same bytes as `Format.quantize`."""
    format, (spec, _) = get_format(name), _spec(name)

    def work(pieces: Iterator[slice]) -> None:
        room = np.zeros(SCRATCH + codings.ALIGN, np.uint8)
        room = room[-room.ctypes.data % codings.ALIGN :]
        most = room[LARGEST:SCRATCH].view(np.float32)
        for piece in pieces:
            kind, source = _source(tensor, piece)
            count = len(source) * tensor.shape[-1]
            to = out[piece].ctypes.data
            encode_rows(spec, kind, source.ctypes.data, count, to, room)
            format.check_largest(float(most.max()))

    share(threads, _pieces(tensor), work)


def floats(tensor: QTensor, out: NDArray[np.float32], threads: int) -> None:
    """The values of a tensor in a format of `READ`, into `out` (rows, K)."""

    def work(pieces: Iterator[slice]) -> None:
        for piece in pieces:
            kind, source = _source(tensor, piece)
            to = out[piece]
            read_rows(kind, source.ctypes.data, to.size, to.ctypes.data)

    share(threads, _pieces(tensor), work)


def _pieces(tensor: QTensor) -> list[slice]:
    rows, step = math.prod(tensor.shape[:-1]), max(1, PIECE // tensor.shape[-1])
    return [slice(first, first + step) for first in range(0, rows, step)]


def _source(tensor: QTensor, piece: slice) -> tuple[int, NDArray[np.uint8]]:
    """Rows of a tensor as the compiled functions take them: which of `READ`, and contiguous."""
    rows = tensor.blocks.reshape(-1, tensor.blocks.shape[-1])[piece]
    if tensor.format.name in READ:
        return READ[tensor.format.name], np.ascontiguousarray(rows)
    return F32, tensor.format.dequantize(rows).view(np.uint8)
