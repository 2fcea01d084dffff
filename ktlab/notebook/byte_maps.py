"""Where every weight's bits lie: in a row's blocks, and in a packed panel; from the coding table.

The drawings of notebook 06 are made from these maps, and tests hold them against the packer.
Letters: R rows of a panel (16), C columns of a chunk (256).
"""

from dataclasses import dataclass
from dataclasses import field as made

from ktlab.kernels import codings
from ktlab.kernels.codings import ALIGN, CHUNK, CODINGS, GROUP, PANEL, Coding

SUPER_BLOCK_SCALES = {"q2_k": (0, 16), "q3_k": (96, 108), "q4_k": (4, 16), "q6_k": (192, 208),
                      "iq4_xs": (2, 8)}  # fmt: skip
"""[start, end) of a k-quant block's bytes that hold the scales of its sub-blocks."""


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Part of one weight's code: `count` bits of a byte, from bit `shift` on."""

    row: int
    column: int
    shift: int
    count: int
    to: int = 0
    """The bit of the code at which they go in: high planes hold the upper bits."""


@dataclass(kw_only=True)
class Byte:
    """One byte of a drawing."""

    field: str
    """"codes", "high", "scales", "mins", "d", "dmin", "padding"."""
    holds: list[Bits] = made(default_factory=list)
    sub: int = -1
    """Which sub-block a scale or minimum belongs to; -1: all, or packed with others."""
    row: int = -1
    """Row of a panel that a scale belongs to."""


def drawable(format: str) -> bool:
    """Whether blocks and panels of a format can be drawn: integer codes in blocks."""
    return format in CODINGS and CODINGS[format].scales != "row"


def block_map(format: str) -> list[Byte]:
    """The bytes of 256 columns of one row in blocks, in the order of memory."""
    coding = CODINGS[format]
    found = [Byte(field=_block_field(coding, at)) for at in range(coding.chunk_bytes)]
    for group in range(CHUNK // GROUP):
        for i in range(GROUP):
            column = GROUP * group + i
            at, shift = coding.codes(group)
            if coding.halves:
                at, shift = at + i % 16, 4 * (i // 16)
            else:
                at += i
            found[at].field = "codes"
            bits = Bits(row=0, column=column, shift=shift, count=coding.base_bits)
            found[at].holds.append(bits)
            if coding.high is None:
                continue
            at, shift = coding.high(group)
            at, shift = (at + i // 8, i % 8) if coding.high_string else (at + i, shift)
            found[at].field = "high"
            found[at].holds.append(
                Bits(row=0, column=column, shift=shift, count=coding.high_bits,
                     to=coding.base_bits)
            )  # fmt: skip
    return found


def _block_field(coding: Coding, at: int) -> str:
    inside = at % coding.block_bytes
    if 0 <= inside - coding.d_offset < 2:
        return "d"
    if coding.dmin_offset >= 0 and 0 <= inside - coding.dmin_offset < 2:
        return "dmin"
    start, end = SUPER_BLOCK_SCALES.get(coding.scales, (0, 0))
    return "scales" if start <= inside < end else "padding"


def panel_map(format: str) -> list[Byte]:
    """The bytes of a chunk of a packed panel: 16 rows of 256 columns."""
    coding, groups = CODINGS[format], CHUNK // GROUP
    chunk = codings.packed_chunk(format, groups)
    found = [Byte(field="padding") for _ in range(chunk.bytes)]
    for group in range(groups):
        start = group * chunk.group_bytes
        planes = [("codes", start, coding.base_bits, 0)]
        if coding.high_bits:
            planes.append(("high", start + chunk.high, coding.high_bits, coding.base_bits))
        for name, plane, bits, to in planes:
            for vector in range(8):
                at = plane + ALIGN * (vector * bits // 8)
                for inside in range(ALIGN):
                    row, column = inside // 4, GROUP * group + 4 * vector + inside % 4
                    found[at + inside].field = name
                    found[at + inside].holds.append(
                        Bits(row=row, column=column, shift=vector * bits % 8, count=bits, to=to)
                    )
    _mark(found, "scales", chunk.scale, chunk.min, 1)
    _mark(found, "mins", chunk.min, chunk.d, 1)
    _mark(found, "d", chunk.d, chunk.dmin, 2)
    if coding.dmin_offset >= 0:
        _mark(found, "dmin", chunk.dmin, chunk.dmin + 2 * PANEL, 2)
    return found


def _mark(found: list[Byte], name: str, start: int, end: int, size: int) -> None:
    """[sub][16 rows] of `size` bytes each."""
    for at in range(start, end):
        sub, inside = divmod((at - start) // size, PANEL)
        found[at] = Byte(field=name, sub=sub, row=inside)
