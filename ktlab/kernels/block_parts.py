"""Rows of an integer format taken apart into codes, scales and minima, and put together again.

Plain NumPy, bit for bit, from the table in `codings`. Letters: R rows, C columns (rounded up to 32
where read), B blocks of a row, S scales of a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktlab.kernels.codings import GROUP, Coding

Bytes = NDArray[np.uint8]


@dataclass(kw_only=True)
class Parts:
    """Everything in some rows, as unsigned numbers in the order of columns and blocks."""

    codes_RC: Bytes
    scale_RS: Bytes
    """A byte for each `sub` columns, as packed."""
    min_RS: Bytes
    d_RB: NDArray[np.uint16]
    dmin_RB: NDArray[np.uint16]
    head_R: NDArray[np.uint32]


def read_blocks(coding: Coding, rows: Bytes, cols: int) -> Parts:
    """(R, row_bytes) -> parts; columns beyond `cols` have the code of nothing."""
    if coding.scales == "row":
        row_codes = np.full((len(rows), -(-cols // GROUP) * GROUP), coding.packed_zero, np.uint8)
        row_codes[:, :cols] = rows[:, 4:] ^ np.uint8(coding.xor)
        head = np.ascontiguousarray(rows[:, :4]).view(np.uint32)[:, 0]
        none, halves = np.zeros((len(rows), 0), np.uint8), np.zeros((len(rows), 0), np.uint16)
        return Parts(
            codes_RC=row_codes, scale_RS=none, min_RS=none, d_RB=halves, dmin_RB=halves, head_R=head
        )
    blocks = rows.reshape(len(rows), -1, coding.block_bytes)
    codes = np.empty((*blocks.shape[:2], coding.block // GROUP, GROUP), np.uint8)
    for group in range(codes.shape[2]):
        codes[:, :, group] = _read_codes(coding, blocks, group)
    scale, minimum = _read_scales(coding, blocks)
    return Parts(
        codes_RC=codes.reshape(len(rows), -1),
        scale_RS=scale.reshape(len(rows), -1),
        min_RS=minimum.reshape(len(rows), -1),
        d_RB=_half_at(blocks, coding.d_offset),
        dmin_RB=_half_at(blocks, coding.dmin_offset),
        head_R=np.zeros(len(rows), np.uint32),
    )


def _read_codes(coding: Coding, blocks: Bytes, group: int) -> Bytes:
    at, shift = coding.codes(group)
    if coding.halves:
        raw = blocks[..., at : at + GROUP // 2]
        codes = np.concatenate([raw & 15, raw >> 4], axis=-1)
    else:
        raw = blocks[..., at : at + GROUP]
        codes = (raw >> np.uint8(shift)) & np.uint8((1 << coding.base_bits) - 1)
    if coding.high is not None:
        at, shift = coding.high(group)
        if coding.high_string:
            high = np.unpackbits(blocks[..., at : at + GROUP // 8], axis=-1, bitorder="little")
        else:
            raw = blocks[..., at : at + GROUP]
            high = (raw >> np.uint8(shift)) & np.uint8((1 << coding.high_bits) - 1)
        codes = codes | high << np.uint8(coding.base_bits)
    return codes ^ np.uint8(coding.xor)


def _half_at(blocks: Bytes, at: int) -> NDArray[np.uint16]:
    """The float16 at a byte of each block, as bits; none if at is -1."""
    if at < 0:
        return np.zeros((len(blocks), 0), np.uint16)
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.uint16)[..., 0]


def _read_scales(coding: Coding, blocks: Bytes) -> tuple[Bytes, Bytes]:
    """(R, B, subs) scale and minimum bytes as the packed layout has them."""
    none = blocks[..., :0]
    if coding.scales == "q2_k":
        return blocks[..., :16], none
    if coding.scales == "q6_k":
        return blocks[..., 192:208], none
    if coding.scales == "q3_k":
        raw = blocks[..., 96:104]
        low = np.concatenate([raw & 15, raw >> 4], axis=-1)
        tops = blocks[..., 104:108]
        high = np.concatenate([(tops >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
        return (low | high << 4) - np.uint8(32), none
    if coding.scales == "q4_k":
        first, second, both = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
        scales = [first & 63, (both & 15) | (first >> 6) << 4]
        minima = [second & 63, (both >> 4) | (second >> 6) << 4]
        return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)
    if coding.scales == "iq4_xs":
        raw, tops = blocks[..., 4:8], blocks[..., 2:4]
        low = np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], 8)
        high = np.stack([(tops >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
        return (low | high.reshape(low.shape) << 4) - np.uint8(32), none
    return none, none


def write_blocks(coding: Coding, parts: Parts, cols: int) -> Bytes:
    """Parts -> (R, row_bytes): the inverse of `read_blocks`."""
    count = len(parts.codes_RC)
    if coding.scales == "row":
        head = parts.head_R[:, None].view(np.uint8)
        return np.concatenate([head, parts.codes_RC[:, :cols] ^ np.uint8(coding.xor)], axis=1)
    blocks = np.zeros((count, cols // coding.block, coding.block_bytes), np.uint8)
    codes = parts.codes_RC[:, :cols].reshape(*blocks.shape[:2], -1, GROUP) ^ np.uint8(coding.xor)
    mask = np.uint8((1 << coding.base_bits) - 1)
    for group in range(coding.block // GROUP):
        at, shift = coding.codes(group)
        low = codes[:, :, group] & mask
        if coding.halves:
            blocks[..., at : at + 16] = low[..., :16] | low[..., 16:] << 4
        else:
            blocks[..., at : at + GROUP] |= low << shift
        if coding.high is not None:
            at, shift = coding.high(group)
            high = codes[:, :, group] >> coding.base_bits
            if coding.high_string:
                blocks[..., at : at + 4] = np.packbits(high, axis=-1, bitorder="little")
            else:
                blocks[..., at : at + GROUP] |= high << shift
    _write_scales(coding, parts, blocks)
    for at, halves in ((coding.d_offset, parts.d_RB), (coding.dmin_offset, parts.dmin_RB)):
        if at >= 0:
            blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(count, -1)


def _write_scales(coding: Coding, parts: Parts, blocks: Bytes) -> None:
    """The inverse of `_read_scales`."""
    scale = parts.scale_RS.reshape(*blocks.shape[:2], -1)
    if coding.scales == "q2_k":
        blocks[..., :16] = scale
    elif coding.scales == "q6_k":
        blocks[..., 192:208] = scale
    elif coding.scales == "q3_k":
        scale = scale + np.uint8(32)
        blocks[..., 96:104] = (scale[..., :8] & 15) | (scale[..., 8:] & 15) << 4
        for i, shift in enumerate((0, 2, 4, 6)):
            blocks[..., 104:108] |= (scale[..., 4 * i : 4 * i + 4] >> 4) << shift
    elif coding.scales == "q4_k":
        low = parts.min_RS.reshape(scale.shape)
        blocks[..., 4:8] = scale[..., :4] | (scale[..., 4:] >> 4) << 6
        blocks[..., 8:12] = low[..., :4] | (low[..., 4:] >> 4) << 6
        blocks[..., 12:16] = (scale[..., 4:] & 15) | (low[..., 4:] & 15) << 4
    elif coding.scales == "iq4_xs":
        scale = scale + np.uint8(32)
        blocks[..., 4:8] = (scale[..., 0::2] & 15) | (scale[..., 1::2] & 15) << 4
        for i in range(4):
            blocks[..., 2:4] |= (scale[..., i::4] >> 4) << (2 * i)
