"""Where each number format keeps its codes and scales: in blocks, as files have them, and packed.

One row a format; Numba's kernels, the packer and the size computations all read this table.
Groups are 32 columns, chunks are 8 groups (256 columns). Block layouts: ggml src/ggml-common.h;
`int8_channel`, `int4_group*` and the packed layout: ktlab_ext/csrc/ktl.h and packed.h.
"""

from collections.abc import Callable
from dataclasses import dataclass

GROUP, CHUNK, PANEL = 32, 256, 16
ALIGN = 64

Place = Callable[[int], tuple[int, int]]
"""Group 0..7 of a chunk -> (byte offset from the chunk's first block, right shift in bits)."""


@dataclass(frozen=True, kw_only=True)
class Coding:
    """An integer format: value = scale * (code - zero) [- minimum], or scale * table[code]."""

    block: int
    """Columns that share a block; 1: a row holds any number of columns (`int8_channel`)."""
    block_bytes: int
    base_bits: int
    codes: Place
    zero: int
    high_bits: int = 0
    high: Place | None = None
    halves: bool = False
    """A group is 16 bytes: columns 0..15 in the low nibbles, 16..31 in the high ones."""
    high_string: bool = False
    """A group's high bits are 32 bits in column order."""
    table: bool = False
    """Codes index `TABLE`."""
    scales: str
    """What multiplies a code: "d" (float16 a block), "row", or the k-quant that packs them."""
    sub: int = GROUP
    """Columns that share a scale: 16, 32, 128; for "row" all of them."""
    scale_bytes: bool = False
    """Packed: one byte of scale for each `sub` columns, beside d."""
    min_bytes: bool = False
    d_offset: int = 0
    dmin_offset: int = -1
    """-1: the format has no minima."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of 256 columns of one row in blocks."""
        return CHUNK // self.block * self.block_bytes

    @property
    def xor(self) -> int:
        """8-bit codes are signed in blocks, unsigned when packed."""
        return 0x80 if self.base_bits == 8 else 0

    @property
    def packed_zero(self) -> int:
        return 128 if self.base_bits == 8 else self.zero


TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of iq4_nl and iq4_xs (ggml src/ggml-common.h, kvalues_iq4nl)."""

FLOATS = {"f32": 4, "f16": 2, "bf16": 2}
"""Bytes of a value."""


def _of_32(block_bytes: int, offset: int) -> Place:
    """One block a group."""
    return lambda group: (block_bytes * group + offset, 0)


def _quarters(offset: int) -> Place:
    """2 bits: four groups share 32 bytes."""
    return lambda group: (offset + 32 * (group // 4), 2 * (group % 4))


def _mask(offset: int) -> Place:
    """1 bit: all eight groups share 32 bytes."""
    return lambda group: (offset, group)


def _nibbles_of_64(offset: int) -> Place:
    """4 bits: two groups share 32 bytes."""
    return lambda group: (offset + 32 * (group // 2), 4 * (group % 2))


def _nibbles_of_128(offset: int, block_bytes: int) -> Place:
    """4 bits: groups i and i + 2 of four share 32 bytes."""

    def place(group: int) -> tuple[int, int]:
        block, inside = divmod(group, 4)
        return offset + block_bytes * block + 32 * (inside % 2), 4 * (inside // 2)

    return place


CODINGS: dict[str, Coding] = {
    "q8_0": Coding(
        block=32, block_bytes=34, base_bits=8, codes=_of_32(34, 2), zero=0, scales="d"
    ),
    "q4_0": Coding(
        block=32, block_bytes=18, base_bits=4, codes=_of_32(18, 2), halves=True, zero=8, scales="d"
    ),
    "q5_0": Coding(
        block=32, block_bytes=22, base_bits=4, codes=_of_32(22, 6), halves=True, zero=16,
        high_bits=1, high=_of_32(22, 2), high_string=True, scales="d",
    ),
    "q2_k": Coding(
        block=256, block_bytes=84, base_bits=2, codes=_quarters(16), zero=0, scales="q2_k",
        sub=16, scale_bytes=True, d_offset=80, dmin_offset=82,
    ),
    "q3_k": Coding(
        block=256, block_bytes=110, base_bits=2, codes=_quarters(32), zero=4, high_bits=1,
        high=_mask(0), scales="q3_k", sub=16, scale_bytes=True, d_offset=108,
    ),
    "q4_k": Coding(
        block=256, block_bytes=144, base_bits=4, codes=_nibbles_of_64(16), zero=0, scales="q4_k",
        scale_bytes=True, min_bytes=True, dmin_offset=2,
    ),
    "q5_k": Coding(
        block=256, block_bytes=176, base_bits=4, codes=_nibbles_of_64(48), zero=0, high_bits=1,
        high=_mask(16), scales="q4_k", scale_bytes=True, min_bytes=True, dmin_offset=2,
    ),
    "q6_k": Coding(
        block=256, block_bytes=210, base_bits=4, codes=_nibbles_of_128(0, 64), zero=32,
        high_bits=2, high=_quarters(128), scales="q6_k", sub=16, scale_bytes=True, d_offset=208,
    ),
    "iq4_nl": Coding(
        block=32, block_bytes=18, base_bits=4, codes=_of_32(18, 2), halves=True, zero=0,
        table=True, scales="d",
    ),
    "iq4_xs": Coding(
        block=256, block_bytes=136, base_bits=4, codes=_of_32(16, 8), halves=True, zero=0,
        table=True, scales="iq4_xs", scale_bytes=True,
    ),
    "int8_channel": Coding(
        block=1, block_bytes=1, base_bits=8, codes=_of_32(32, 0), zero=0, scales="row"
    ),
    "int4_group32": Coding(
        block=32, block_bytes=18, base_bits=4, codes=_of_32(18, 2), halves=True, zero=8, scales="d"
    ),
    "int4_group128": Coding(
        block=128, block_bytes=66, base_bits=4, codes=_nibbles_of_128(2, 66), zero=8, scales="d",
        sub=128,
    ),
}  # fmt: skip

FORMATS = frozenset(CODINGS) | frozenset(FLOATS)
"""Every format that the expert kernels compute."""


def block_size(format: str) -> int:
    """Columns that a row's length must be a multiple of."""
    return CODINGS[format].block if format in CODINGS else 1


def row_head(format: str) -> int:
    """Bytes before the codes of a row in blocks: the float32 scale of `int8_channel`."""
    return 4 if format in CODINGS and CODINGS[format].scales == "row" else 0


def row_bytes(format: str, cols: int) -> int:
    """Bytes of one row in blocks."""
    if format in FLOATS:
        return FLOATS[format] * cols
    coding = CODINGS[format]
    return row_head(format) + cols // coding.block * coding.block_bytes


def d_count(coding: Coding, groups: int) -> int:
    """float16 scales of each row in a packed chunk of `groups` groups."""
    if coding.scales == "row":
        return 0
    if coding.block == CHUNK:
        return 1
    return -(-groups * GROUP // coding.block)


@dataclass(frozen=True, kw_only=True)
class PackedChunk:
    """Byte offsets inside a packed chunk of `groups` groups, and its size."""

    codes: int
    high: int
    """Offset of the high plane inside a group; also the bytes of its base plane."""
    group_bytes: int
    scale: int
    min: int
    d: int
    dmin: int
    bytes: int


def packed_chunk(format: str, groups: int) -> PackedChunk:
    """The parts of a chunk of an integer format, in the order of packed.h."""
    coding = CODINGS[format]
    high = ALIGN * coding.base_bits
    group_bytes = high + ALIGN * coding.high_bits
    subs = groups * GROUP // coding.sub if coding.scale_bytes else 0
    scale = groups * group_bytes
    minimum = scale + subs * PANEL
    d = minimum + (subs * PANEL if coding.min_bytes else 0)
    dmin = d + d_count(coding, groups) * PANEL * 2
    end = dmin + (PANEL * 2 if coding.dmin_offset >= 0 else 0)
    return PackedChunk(
        codes=0,
        high=high,
        group_bytes=group_bytes,
        scale=scale,
        min=minimum,
        d=d,
        dmin=dmin,
        bytes=-(-end // ALIGN) * ALIGN,
    )


def panel_head(format: str) -> int:
    """Bytes before the chunks of a panel: `int8_channel`'s 16 scales."""
    return PANEL * row_head(format)


def panel_bytes(format: str, cols: int) -> int:
    """Bytes of 16 rows, packed."""
    groups = -(-cols // GROUP)
    if format in FLOATS:
        return groups * GROUP * PANEL * FLOATS[format]
    whole, rest = divmod(groups, CHUNK // GROUP)
    chunks = whole * packed_chunk(format, CHUNK // GROUP).bytes
    if rest:
        chunks += packed_chunk(format, rest).bytes
    return panel_head(format) + chunks


def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of one packed matrix, a multiple of 64."""
    return -(-rows // PANEL) * panel_bytes(format, cols)
