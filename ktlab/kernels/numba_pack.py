"""Blocks to the packed layout and back, and to the formats made at load: NumPy over whole panels.

A second reading of ktlab_ext/csrc/packed.h, which the C packer is compared with byte by byte.
Letters: R rows, C columns rounded up to 32, P panels of 16 rows, G groups of 32 columns.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import FormatError
from ktlab.kernels import codings
from ktlab.kernels.block_parts import Bytes, Parts, read_blocks, write_blocks
from ktlab.kernels.codings import CHUNK, CODINGS, GROUP, PANEL, Coding
from ktlab.kernels.numba_formats import spec
from ktlab.kernels.numba_products import dequantize_rows, scratch
from ktlab.kernels.numba_workers import share
from ktlab.kernels.threads import default_threads
from ktlab.kernels.weights import GGML_BLOCKS, PACKED, Weights, aligned_bytes, check_cols
from ktlab.quantization import get_format

CONVERTIBLE = ("int8_channel", "int4_group32", "int4_group128")
"""Formats that any other can be converted to."""
PIECE = 1 << 19
"""Weights that a thread takes at a time: their codes and what is made of them stay in cache."""


def pack(weights: Weights, out: Bytes | None = None, threads: int | None = None) -> Weights:
    """The same numbers packed, bit for bit, into `out` (64-byte aligned) or new memory."""
    _expect(weights, GGML_BLOCKS)
    size = codings.packed_bytes(weights.format, weights.rows, weights.cols)
    found = _empty(weights, weights.format, PACKED, size, out)
    panel_bytes = codings.panel_bytes(weights.format, weights.cols)

    def work(pieces: Iterator[tuple[int, int, int]]) -> None:
        for expert, first, last in pieces:
            source = weights.expert(expert).reshape(weights.rows, -1)[first:last]
            start = first // PANEL * panel_bytes
            panels = -(-(last - first) // PANEL)
            target = found.expert(expert)[start : start + panels * panel_bytes]
            _pack_rows(weights.format, source, weights.cols, target.reshape(panels, -1))

    share(_threads(threads), _pieces(weights), work)
    return found


def unpack(weights: Weights, out: Bytes | None = None, threads: int | None = None) -> Weights:
    """Packed weights back in blocks, bit for bit."""
    _expect(weights, PACKED)
    size = weights.rows * weights.row_bytes
    found = _empty(weights, weights.format, GGML_BLOCKS, size, out)
    panel_bytes = codings.panel_bytes(weights.format, weights.cols)

    def work(pieces: Iterator[tuple[int, int, int]]) -> None:
        for expert, first, last in pieces:
            start = first // PANEL * panel_bytes
            panels = -(-(last - first) // PANEL)
            source = weights.expert(expert)[start : start + panels * panel_bytes]
            target = found.expert(expert).reshape(weights.rows, -1)[first:last]
            rows = _unpack_rows(weights.format, source.reshape(panels, -1), weights.cols)
            target[:] = rows[: last - first]

    share(_threads(threads), _pieces(weights), work)
    return found


def convert(
    weights: Weights, format: str, out: Bytes | None = None, threads: int | None = None
) -> Weights:
    """Weights of any format and layout as one of `CONVERTIBLE`, in blocks.

    x is the exact value; all arithmetic is float32, one operation after the other.
    `int8_channel`: scale = max |x| of the row / 127; code = x / scale rounded to the nearest, ties
    to even; 0 where the scale is 0.
    `int4_group*`: m = the x of largest magnitude in the group (the first of equals, with its sign);
    d = m / -8 rounded to float16; code = floor(x / d + 8.5) cut to 0..15; 8 where d is 0.
    """
    if format not in CONVERTIBLE:
        raise FormatError(f"{format} is not made at load; expected one of {', '.join(CONVERTIBLE)}")
    check_cols(format, weights.cols)
    size = weights.rows * codings.row_bytes(format, weights.cols)
    found = _empty(weights, format, GGML_BLOCKS, size, out)

    def work(pieces: Iterator[tuple[int, int, int]]) -> None:
        for expert, first, last in pieces:
            target = found.expert(expert).reshape(weights.rows, -1)
            target[first:last] = get_format(format).quantize(
                dequantize(weights, expert, first, last)
            )

    share(_threads(threads), _pieces(weights), work)
    return found


def dequantize(
    weights: Weights, expert: int = 0, first: int = 0, last: int | None = None
) -> NDArray[np.float32]:
    """Rows first..last of one matrix as exact float32, (rows, K)."""
    last = weights.rows if last is None else last
    if not 0 <= first <= last <= weights.rows:
        raise FormatError(f"rows {first}..{last} of {weights.rows}: expected a range inside")
    data = weights.expert(expert)
    values = np.empty((last - first, weights.cols), np.float32)
    packed = weights.layout == PACKED
    numbers = spec(weights.format, weights.cols)
    dequantize_rows(
        numbers, data.ctypes.data, packed, first, last, weights.cols, values, scratch(1)
    )
    return values


# ---- panels --------------------------------------------------------------------------------------


def _pack_rows(format: str, rows: Bytes, cols: int, target: Bytes) -> None:
    """(R, row_bytes) in blocks -> (P, panel_bytes)."""
    if format in codings.FLOATS:
        _pack_floats(codings.FLOATS[format], rows, cols, target)
        return
    coding = CODINGS[format]
    parts = read_blocks(coding, rows, cols)
    planes = _planes(coding, _panels(parts.codes_RC, 0 if coding.table else coding.packed_zero))
    head = codings.panel_head(format)
    if head:
        target[:, :head] = _panels(parts.head_R[:, None], 0)[:, :, 0].view(np.uint8)
    fields = (
        (_panels(parts.scale_RS, 0), coding.sub),
        (_panels(parts.min_RS, 0), coding.sub),
        (_panels(parts.d_RB, 0), max(coding.block, GROUP)),
        (_panels(parts.dmin_RB, 0), CHUNK),
    )
    for chunks, groups, view in _chunks(format, cols, target):
        first = chunks * (CHUNK // GROUP)
        size = codings.packed_chunk(format, groups)
        count = view.shape[1]
        own = planes[:, first : first + count * groups]
        view[:, :, : size.scale] = own.reshape(len(own), count, -1)
        view[:, :, size.scale :] = 0  # what pads the chunk
        offsets = (size.scale, size.min, size.d, size.dmin)
        for (values, columns), at in zip(fields, offsets, strict=True):
            if not values.shape[2]:
                continue
            each = -(-groups * GROUP // columns)
            start = chunks * CHUNK // columns
            taken = values[:, :, start : start + count * each].reshape(len(own), PANEL, count, each)
            raw = np.ascontiguousarray(taken.transpose(0, 2, 3, 1)).view(np.uint8)
            raw = raw.reshape(len(own), count, -1)
            view[:, :, at : at + raw.shape[2]] = raw


def _chunks(format: str, cols: int, target: Bytes) -> Iterator[tuple[int, int, Bytes]]:
    """(first chunk, groups of each, (P, chunks, bytes) to write or read): the whole chunks, then
    the rest."""
    all_groups = -(-cols // GROUP)
    whole, rest = divmod(all_groups, CHUNK // GROUP)
    at = codings.panel_head(format)
    for first, count, groups in ((0, whole, CHUNK // GROUP), (whole, 1, rest)):
        if count and groups:
            size = codings.packed_chunk(format, groups).bytes
            view = target[:, at : at + count * size].reshape(len(target), count, size)
            at += count * size
            yield first, groups, view


def _panels(values: NDArray, fill: int) -> NDArray:
    """(R, ...) -> (P, 16, ...), filled up."""
    missing = -len(values) % PANEL
    if missing:
        values = np.concatenate([values, np.full((missing, values.shape[1]), fill, values.dtype)])
    return values.reshape(len(values) // PANEL, PANEL, values.shape[1])


def _planes(coding: Coding, codes: Bytes) -> Bytes:
    """(P, 16, C) codes -> (P, G, vectors, 64) bit planes."""
    words = np.ascontiguousarray(codes.view(np.uint32).swapaxes(1, 2))
    vectors = words.view(np.uint8).reshape(len(codes), -1, 8, 64)
    planes = [_plane(vectors & np.uint8((1 << coding.base_bits) - 1), coding.base_bits)]
    if coding.high_bits:
        planes.append(_plane(vectors >> np.uint8(coding.base_bits), coding.high_bits))
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)


def _plane(vectors: Bytes, width: int) -> Bytes:
    """(P, G, 8, 64) codes below 2**width -> (P, G, width, 64)."""
    each = 8 // width
    parts = vectors.reshape(*vectors.shape[:2], width, each, 64)
    found = parts[:, :, :, 0].copy()
    for i in range(1, each):
        found |= parts[:, :, :, i] << np.uint8(width * i)
    return found


def _unplane(planes: Bytes, width: int) -> Bytes:
    """(P, G, width, 64) -> (P, G, 8, 64) codes below 2**width."""
    each = 8 // width
    found = np.empty((*planes.shape[:2], width, each, 64), np.uint8)
    for i in range(each):
        found[:, :, :, i] = (planes >> np.uint8(width * i)) & np.uint8((1 << width) - 1)
    return found.reshape(*planes.shape[:2], 8, 64)


def _unpack_rows(format: str, panels: Bytes, cols: int) -> Bytes:
    """(P, panel_bytes) -> (16 P, row_bytes) in blocks."""
    if format in codings.FLOATS:
        return _unpack_floats(codings.FLOATS[format], panels, cols)
    coding = CODINGS[format]
    width = coding.base_bits + coding.high_bits
    found: dict[str, list[NDArray]] = {name: [] for name in ("codes", "scale", "min", "d", "dmin")}
    for _, groups, view in _chunks(format, cols, panels):
        size = codings.packed_chunk(format, groups)
        planes = view[:, :, : size.scale].reshape(len(panels), -1, width, 64)
        codes = _unplane(planes[:, :, : coding.base_bits], coding.base_bits)
        if coding.high_bits:
            high = _unplane(planes[:, :, coding.base_bits :], coding.high_bits)
            codes |= high << np.uint8(coding.base_bits)
        words = codes.reshape(len(panels), -1, 64).view(np.uint32)
        found["codes"].append(np.ascontiguousarray(words.swapaxes(1, 2)).view(np.uint8))
        halves = PANEL * 2
        ends = {
            "scale": (size.scale, size.min, np.uint8),
            "min": (size.min, size.d, np.uint8),
            "d": (size.d, size.dmin, np.uint16),
            "dmin": (size.dmin, size.dmin + halves * (coding.dmin_offset >= 0), np.uint16),
        }
        for name, (start, end, kind) in ends.items():
            raw = np.ascontiguousarray(view[:, :, start:end]).view(kind)
            raw = raw.reshape(len(panels), -1, PANEL)
            found[name].append(raw.swapaxes(1, 2))
    joined = {
        name: np.concatenate(parts, axis=2).reshape(len(panels) * PANEL, -1)
        for name, parts in found.items()
    }
    head = codings.panel_head(format)
    heads = np.ascontiguousarray(panels[:, :head]).view(np.uint32).reshape(-1)
    parts = Parts(
        codes_RC=joined["codes"],
        scale_RS=joined["scale"],
        min_RS=joined["min"],
        d_RB=joined["d"],
        dmin_RB=joined["dmin"],
        head_R=heads,
    )
    return write_blocks(coding, parts, cols)


def _pack_floats(size: int, rows: Bytes, cols: int, target: Bytes) -> None:
    """[column][16] float32, or [column / 2][16][2] of two bytes: words of 4 bytes either way."""
    padded = np.zeros((len(rows), -(-cols // GROUP) * GROUP * size), np.uint8)
    padded[:, : rows.shape[1]] = rows
    words = _panels(padded.view(np.uint32), 0)
    target[:] = np.ascontiguousarray(words.swapaxes(1, 2)).view(np.uint8).reshape(target.shape)


def _unpack_floats(size: int, panels: Bytes, cols: int) -> Bytes:
    words = np.ascontiguousarray(panels).view(np.uint32).reshape(len(panels), -1, PANEL)
    rows = np.ascontiguousarray(words.swapaxes(1, 2)).view(np.uint8)
    return rows.reshape(len(panels) * PANEL, -1)[:, : cols * size]


# ---- shared --------------------------------------------------------------------------------------


def _expect(weights: Weights, layout: str) -> None:
    if weights.layout != layout:
        raise FormatError(f"expected weights in {layout}, found {weights!r}")


def _empty(weights: Weights, format: str, layout: str, size: int, out: Bytes | None) -> Weights:
    """Room for the same matrices at `size` bytes each."""
    total = weights.experts * size
    if out is not None and (out.dtype != np.uint8 or out.shape != (total,)):
        raise FormatError(f"expected out of {total} uint8, found {out.dtype} {out.shape}")
    return Weights(
        format=format,
        layout=layout,
        experts=weights.experts,
        rows=weights.rows,
        cols=weights.cols,
        data=aligned_bytes(total) if out is None else out,
        expert_stride=size,
    )


def _pieces(weights: Weights) -> list[tuple[int, int, int]]:
    """(expert, first row, last row), whole panels of about `PIECE` weights."""
    step = max(1, PIECE // max(1, weights.cols * PANEL)) * PANEL
    return [
        (expert, first, min(first + step, weights.rows))
        for expert in range(weights.experts)
        for first in range(0, weights.rows, step)
    ]


def _threads(threads: int | None) -> int:
    return default_threads() if threads is None else threads
