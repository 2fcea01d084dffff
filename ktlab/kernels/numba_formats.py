"""Decoding in Numba: one function for all formats in blocks, one for all packed ones.

A format is a row of numbers (`spec`, made from `codings.CODINGS`) that says where its bits lie, so
that everything is compiled once, not once a format. Values are exact: the same roundings as the
`gguf` package's decoders. Chunks are 256 columns, groups 32, runs 16. `spec`, `row`, `panel`, `p`,
`codes`, `scale`, `low` and `w` are addresses.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels import codings
from ktlab.kernels.codings import CHUNK, CODINGS, GROUP, PANEL
from ktlab.kernels.numba_bytes import (
    bit_string,
    bits,
    brain_float,
    brain_floats,
    column_floats,
    every_second,
    floats,
    from_table,
    half,
    halves,
    minus_byte,
    nibbles,
    pairs_of_bytes,
    strided_halves,
    turn_16x16,
    two_words,
    with_high,
)
from ktlab.kernels.numba_jit import folded, inlined, inner
from ktlab.kernels.numba_vectors import (
    field,
    load_f32,
    load_f32x16,
    load_u8,
    load_u8x16,
    load_u8x32,
    load_u8x64,
    load_u16,
    load_u16x16,
    load_u16x32,
    load_u32,
    load_u64,
    minus,
    prefetch,
    splat,
    store,
    times,
)

# Places in a spec; the last eight are the first of eight numbers, one a group or code vector.
(
    FLOAT, ROW_BYTES, PANEL_BYTES, ROW_HEAD, PANEL_HEAD, CHUNK_BYTES, PACKED_BYTES, BASE_BITS,
    BASE_MASK, HIGH_MASK, HALVES, HIGH_STRING, TABLED, ZERO, PACKED_ZERO, SCALES, BLOCK,
    BLOCK_BYTES, D_AT, DMIN_AT, GROUP_BYTES, HIGH_PLANE, SUBS, SCALE_BYTES, MIN_BYTES, D_GROUPS,
) = range(26)  # fmt: skip
TABLES = 32
(
    CODES_AT, CODES_SHIFT, HIGH_AT, HIGH_SHIFT,
    VECTOR_AT, VECTOR_SHIFT, TOP_AT, TOP_SHIFT,
) = range(TABLES, TABLES + 64, 8)  # fmt: skip

F32, F16, BF16 = 1, 2, 3
SCALES_D, SCALES_ROW, SCALES_Q2_K, SCALES_Q3_K, SCALES_Q4_K, SCALES_Q6_K, SCALES_IQ4_XS = range(7)
_SCALES = ("d", "row", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs")

GROUPS = CHUNK // GROUP
RUN = 16
AHEAD = 4096
"""Bytes. Packed panels are read in pieces that the processor does not foresee well: asking so far
ahead takes Q4_K from 56 to 44 ns for 256 weights, Q6_K from 85 to 47, Q8_0 from 58 to 40 (2048
and 8192 take 2 to 10 more). A single row in blocks gains nothing."""
AHEAD_IN_ROW = 512
"""The same where 16 rows in blocks are read side by side: four tokens of Q6_K from 245 to 138 ns,
Q8_0 from 190 to 128, Q4_K from 150 to 125 (1024 takes 2 to 20 more)."""

LOW_1 = np.uint64(0x0303030303030303)
LOW_4 = np.uint64(0x0F0F0F0F0F0F0F0F)
LOW_6 = np.uint64(0x3F3F3F3F)
TOP_2 = np.uint64(0x30303030)
NIBBLES = np.uint64(0x0F0F0F0F)
PAIRS = np.uint64(0x03030303)
HALF_WORD = np.uint64(32)
U2, U4, U6 = np.uint64(2), np.uint64(4), np.uint64(6)


@lru_cache(maxsize=256)
def spec(format: str, cols: int) -> NDArray[np.int64]:
    """The numbers that the compiled functions read."""
    found = np.zeros(TABLES + 64, np.int64)
    found[ROW_BYTES] = codings.row_bytes(format, cols)
    found[PANEL_BYTES] = codings.panel_bytes(format, cols)
    found[ROW_HEAD] = codings.row_head(format)
    found[PANEL_HEAD] = codings.panel_head(format)
    if format in codings.FLOATS:
        size = codings.FLOATS[format]
        found[FLOAT] = {"f32": F32, "f16": F16, "bf16": BF16}[format]
        found[CHUNK_BYTES] = CHUNK * size
        found[PACKED_BYTES] = CHUNK * PANEL * size
        return found
    coding = CODINGS[format]
    chunk = codings.packed_chunk(format, GROUPS)
    found[CHUNK_BYTES] = coding.chunk_bytes
    found[PACKED_BYTES] = chunk.bytes
    found[BASE_BITS] = coding.base_bits
    found[BASE_MASK] = (1 << coding.base_bits) - 1
    found[HIGH_MASK] = (1 << coding.high_bits) - 1
    found[HALVES] = coding.halves
    found[HIGH_STRING] = coding.high_string
    found[TABLED] = coding.table
    found[ZERO] = coding.zero
    found[PACKED_ZERO] = coding.packed_zero
    found[SCALES] = _SCALES.index(coding.scales)
    found[BLOCK] = coding.block
    found[BLOCK_BYTES] = coding.block_bytes
    found[D_AT] = coding.d_offset
    found[DMIN_AT] = coding.dmin_offset
    found[GROUP_BYTES] = chunk.group_bytes
    found[HIGH_PLANE] = chunk.high
    found[SUBS] = GROUP // min(coding.sub, GROUP)
    found[SCALE_BYTES] = coding.scale_bytes
    found[MIN_BYTES] = coding.min_bytes
    found[D_GROUPS] = max(1, coding.block // GROUP)
    for i in range(GROUPS):
        found[CODES_AT + i], found[CODES_SHIFT + i] = coding.codes(i)
        if coding.high is not None:
            found[HIGH_AT + i], found[HIGH_SHIFT + i] = coding.high(i)
        for width, at, shift in (
            (coding.base_bits, VECTOR_AT, VECTOR_SHIFT),
            (coding.high_bits, TOP_AT, TOP_SHIFT),
        ):
            if width:
                found[at + i] = codings.ALIGN * (i * width // 8)
                found[shift + i] = i * width % 8
    return found


# A worker's scratch, in bytes: codes, scales and minima of 16 rows of a chunk; its codes turned to
# [4 columns][row][4]; 16 rows of floats; and 256 columns of 16 rows of floats, the result.
CODES = 0
SCALE = CODES + PANEL * CHUNK
LOW = SCALE + 4 * PANEL * RUN
TURNED = LOW + 4 * PANEL * RUN
ROWS = TURNED + PANEL * CHUNK
TILE = ROWS + 4 * PANEL * CHUNK
SCRATCH = TILE + 4 * PANEL * CHUNK


@inlined
def _store_column(scale: Any, codes: Any, j: Any, with_low: Any, low: Any, to: Any) -> Any:
    value = times(scale, column_floats(codes, j))
    store(to, minus(value, low) if with_low else value)


@inlined
def _store_columns(scale: Any, codes: Any, with_low: Any, low: Any, to: Any) -> Any:
    """The four columns of a code vector, times the scales of 16 rows."""
    _store_column(scale, codes, 0, with_low, low, to)
    _store_column(scale, codes, 1, with_low, low, to + 4 * PANEL)
    _store_column(scale, codes, 2, with_low, low, to + 8 * PANEL)
    _store_column(scale, codes, 3, with_low, low, to + 12 * PANEL)


# ---- rows in blocks -----------------------------------------------------------------------------


@folded
def _row_scales(spec: Any, row: Any, p: Any, groups: Any, scale: Any, low: Any) -> Any:
    """Of the 16 runs of a chunk at p: their scales and minima, as floats."""
    kind = field(spec, SCALES)
    if kind == SCALES_D:
        if field(spec, BLOCK) == GROUP:
            store(scale, strided_halves(p, field(spec, BLOCK_BYTES), groups))
        else:
            for i in range(2 * groups):
                at = p + i * RUN // field(spec, BLOCK) * field(spec, BLOCK_BYTES)
                store(scale + 4 * i, half(load_u16(at)))
        return
    if kind == SCALES_ROW:
        store(scale, splat(load_f32(row)))
        return
    d = splat(half(load_u16(p + field(spec, D_AT))))
    if kind == SCALES_Q4_K:
        first = np.uint64(load_u32(p + 4))
        second = np.uint64(load_u32(p + 8))
        both = np.uint64(load_u32(p + 12))
        upper = (both & NIBBLES) | ((first >> U2) & TOP_2)
        scales = (first & LOW_6) | (upper << HALF_WORD)
        upper = ((both >> U4) & NIBBLES) | ((second >> U2) & TOP_2)
        minima = (second & LOW_6) | (upper << HALF_WORD)
        dmin = splat(half(load_u16(p + field(spec, DMIN_AT))))
        store(scale, times(d, floats(pairs_of_bytes(scales))))
        store(low, times(dmin, floats(pairs_of_bytes(minima))))
    elif kind == SCALES_Q6_K:
        store(scale, times(d, floats(load_u8x16(p + 192))))
    elif kind == SCALES_Q2_K:
        both16 = load_u8x16(p)
        dmin = splat(half(load_u16(p + field(spec, DMIN_AT))))
        store(scale, times(d, floats(bits(both16, 0, 15))))
        store(low, times(dmin, floats(bits(both16, 4, 15))))
    elif kind == SCALES_Q3_K:
        word = load_u64(p + 96)
        tops = np.uint64(load_u32(p + 104))
        upper = (tops & PAIRS) | (((tops >> U2) & PAIRS) << HALF_WORD)
        first = (word & LOW_4) | (upper << U4)
        upper = ((tops >> U4) & PAIRS) | (((tops >> U6) & PAIRS) << HALF_WORD)
        second = ((word >> U4) & LOW_4) | (upper << U4)
        store(scale, times(d, floats(minus_byte(two_words(first, second), 32))))
    else:
        tops = np.uint64(load_u16(p + 2))
        tops = (tops | (tops << np.uint64(24))) & np.uint64(0x000000FF000000FF)
        tops = (tops | (tops << np.uint64(12))) & np.uint64(0x000F000F000F000F)
        tops = (tops | (tops << U6)) & LOW_1
        word = np.uint64(load_u32(p + 4))
        word = (word | (word << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
        word = (word | (word << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        word = (word | (word << U4)) & LOW_4
        store(scale, times(d, floats(minus_byte(pairs_of_bytes(word | (tops << U4)), 32))))


@folded
def _row_codes(spec: Any, p: Any, groups: Any, codes: Any) -> Any:
    """Whole groups of a chunk at p: signed codes, zero and table applied."""
    in_halves, tabled, zero = (
        field(spec, HALVES),
        field(spec, TABLED),
        field(spec, ZERO),
    )
    base_bits, base_mask = field(spec, BASE_BITS), field(spec, BASE_MASK)
    high_mask, high_string = field(spec, HIGH_MASK), field(spec, HIGH_STRING)
    for g in range(groups):
        at = p + field(spec, CODES_AT + g)
        if in_halves:
            found = nibbles(load_u8x16(at))
        else:
            found = bits(load_u8x32(at), field(spec, CODES_SHIFT + g), base_mask)
        if high_mask:
            at = p + field(spec, HIGH_AT + g)
            if high_string:
                high = bit_string(load_u32(at))
            else:
                high = bits(load_u8x32(at), field(spec, HIGH_SHIFT + g), high_mask)
            found = with_high(found, high, base_bits)
        if tabled:
            found = from_table(found)
        store(codes + GROUP * g, minus_byte(found, zero))


@folded
def row_chunk(spec: Any, row: Any, c: Any, cols: Any, codes: Any, scale: Any, low: Any) -> Any:
    """Chunk c of the row at `row`: 256 codes, 16 scales, 16 minima; columns
    beyond `cols` have code 0. Returns its groups."""
    p = row + field(spec, ROW_HEAD) + c * field(spec, CHUNK_BYTES)
    here = min(CHUNK, cols - c * CHUNK)
    whole = here // GROUP
    _row_codes(spec, p, whole, codes)
    groups = whole
    if here % GROUP:  # only where a byte is a code: other rows have whole blocks
        for i in range(whole * GROUP, (whole + 1) * GROUP):
            store(codes + i, load_u8(p + i) if i < here else np.uint8(0))
        groups += 1
    _row_scales(spec, row, p, groups, scale, low)
    return groups


@folded
def plain_row(spec: Any, p: Any, here: Any, w: Any) -> Any:
    """`here` floats of f32, f16 or bf16 at p, then zeros up to a multiple of 32."""
    kind = field(spec, FLOAT)
    whole = here // RUN
    for i in range(whole):
        if kind == F32:
            found = load_f32x16(p + 4 * RUN * i)
        elif kind == F16:
            found = halves(load_u16x16(p + 2 * RUN * i))
        else:
            found = brain_floats(load_u16x16(p + 2 * RUN * i))
        store(w + 4 * RUN * i, found)
    for i in range(whole * RUN, (here + GROUP - 1) // GROUP * GROUP):
        value = np.float32(0.0)
        if i < here:
            if kind == F32:
                value = load_f32(p + 4 * i)
            elif kind == F16:
                value = half(load_u16(p + 2 * i))
            else:
                value = brain_float(load_u16(p + 2 * i))
        store(w + 4 * i, value)


@inner
def rows_floats(
    spec: Any, data: Any, start: Any, last: Any, c: Any, cols: Any, work: Any
) -> Any:  # fmt: skip
    """Chunk c of 16 rows in blocks as exact float32 at work + TILE, [column][row], zeros beyond
    `cols`; row `last` - 1 stands for those beyond. Returns its groups."""
    here = min(CHUNK, cols - c * CHUNK)
    groups = (here + GROUP - 1) // GROUP
    for r in range(PANEL):
        row = data + min(start + r, last - 1) * field(spec, ROW_BYTES)
        p = row + c * field(spec, CHUNK_BYTES)
        for i in range(0, field(spec, CHUNK_BYTES), codings.ALIGN):
            prefetch(p + i + AHEAD_IN_ROW)
        if field(spec, FLOAT):
            plain_row(spec, p, here, work + ROWS + 4 * CHUNK * r)
        else:
            scale, low = work + SCALE + 4 * RUN * r, work + LOW + 4 * RUN * r
            row_chunk(spec, row, c, cols, work + CODES + CHUNK * r, scale, low)
    if field(spec, FLOAT):
        for i in range(2 * groups):
            turn_16x16(work + ROWS + 4 * RUN * i, 4 * CHUNK, work + TILE + 4 * PANEL * RUN * i)
        return groups
    # Four codes are as wide as a float, so turning them costs a quarter of turning the values.
    for i in range((groups + 1) // 2):
        turn_16x16(work + CODES + 4 * PANEL * i, CHUNK, work + TURNED + 64 * PANEL * i)
    with_low = field(spec, DMIN_AT) >= 0
    turn_16x16(work + SCALE, 4 * RUN, work + ROWS)
    if with_low:
        turn_16x16(work + LOW, 4 * RUN, work + ROWS + 4 * RUN * PANEL)
    none = splat(np.float32(0.0))
    for run in range(2 * groups):
        scale16 = load_f32x16(work + ROWS + 4 * PANEL * run)
        low16 = load_f32x16(work + ROWS + 4 * PANEL * (RUN + run)) if with_low else none
        for v in range(4 * run, 4 * run + 4):
            codes = load_u8x64(work + TURNED + 64 * v)
            _store_columns(scale16, codes, with_low, low16, work + TILE + 4 * PANEL * 4 * v)
    return groups


# ---- packed panels ------------------------------------------------------------------------------


@inlined
def ask_ahead(spec: Any, p: Any, g: Any) -> Any:
    """Ask memory for the share of group g in what lies `AHEAD` of the chunk at p."""
    share = field(spec, PACKED_BYTES) // GROUPS
    for i in range(0, share, codings.ALIGN):
        prefetch(p + g * share + i + AHEAD)


@inlined
def panel_codes(spec: Any, p: Any, v: Any) -> Any:
    """Code vector v of the group at p: 4 columns of 16 rows, signed, zero and table applied."""
    raw = load_u8x64(p + field(spec, VECTOR_AT + v))
    found = bits(raw, field(spec, VECTOR_SHIFT + v), field(spec, BASE_MASK))
    if field(spec, HIGH_MASK):
        raw = load_u8x64(p + field(spec, HIGH_PLANE) + field(spec, TOP_AT + v))
        high = bits(raw, field(spec, TOP_SHIFT + v), field(spec, HIGH_MASK))
        found = with_high(found, high, field(spec, BASE_BITS))
    if field(spec, TABLED):
        found = from_table(found)
    return minus_byte(found, field(spec, PACKED_ZERO))


@inlined
def panel_scales(spec: Any, panel: Any, p: Any, groups: Any, g: Any, h: Any) -> tuple[Any, Any]:
    """Scale and minimum of 16 rows, for run h (0, 1) of group g of the chunk at p."""
    none = splat(np.float32(0.0))
    if field(spec, PANEL_HEAD):
        return load_f32x16(panel), none
    subs = groups * field(spec, SUBS) * field(spec, SCALE_BYTES)
    scales_at = p + groups * field(spec, GROUP_BYTES)
    minima_at = scales_at + PANEL * subs
    d_at = minima_at + PANEL * subs * field(spec, MIN_BYTES)
    scale = halves(load_u16x16(d_at + 2 * PANEL * (g // field(spec, D_GROUPS))))
    if not field(spec, SCALE_BYTES):
        return scale, none
    i = g * field(spec, SUBS) + h * (field(spec, SUBS) - 1)
    raw = load_u8x16(scales_at + PANEL * i)
    if field(spec, DMIN_AT) < 0:
        return times(scale, floats(raw)), none
    dmin = halves(load_u16x16(d_at + 2 * PANEL))
    if field(spec, MIN_BYTES):
        low = load_u8x16(minima_at + PANEL * i)
    else:
        low = bits(raw, 4, 15)
        raw = bits(raw, 0, 15)
    return times(scale, floats(raw)), times(dmin, floats(low))


@inlined
def _plain_panel(spec: Any, p: Any, groups: Any, w: Any) -> Any:
    kind = field(spec, FLOAT)
    for k in range(groups * GROUP):
        if kind == F32:
            found = load_f32x16(p + 4 * PANEL * k)
        else:
            pair = load_u16x32(p + 4 * PANEL * (k // 2))
            one = every_second(pair, k % 2)
            found = halves(one) if kind == F16 else brain_floats(one)
        store(w + 4 * PANEL * k, found)


@inner
def panel_floats(spec: Any, panel: Any, c: Any, cols: Any, w: Any) -> Any:
    """Chunk c of a panel as exact float32 at w, [column][row]. Returns its groups."""
    groups = (min(CHUNK, cols - c * CHUNK) + GROUP - 1) // GROUP
    p = panel + field(spec, PANEL_HEAD) + c * field(spec, PACKED_BYTES)
    if field(spec, FLOAT):
        _plain_panel(spec, p, groups, w)
        return groups
    with_low = field(spec, DMIN_AT) >= 0
    for g in range(groups):
        ask_ahead(spec, p, g)
        for h in range(2):
            scale, low = panel_scales(spec, panel, p, groups, g, h)
            for v in range(4 * h, 4 * h + 4):
                codes = panel_codes(spec, p + g * field(spec, GROUP_BYTES), v)
                to = w + 4 * PANEL * (GROUP * g + 4 * v)
                _store_columns(scale, codes, with_low, low, to)
    return groups
