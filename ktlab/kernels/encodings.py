"""How compiled code encodes floats in each format that it can: one row a format.

What the rows mean is in `quantization.kquants` and in gguf's own encoders, whose bytes they give;
where decoders find them again is in `codings`.
"""

from typing import NamedTuple

AFFINE, SYMMETRIC, ROUNDED, FROM_EXTREME = range(4)
"""Searched scales and minima; searched scales; q8_0; q4_0 and q5_0."""
SCALES_6_BIT, SCALES_BYTES, SCALES_Q3_K, SCALES_Q2_K, NO_SCALES = range(5)


class Plane(NamedTuple):
    """Bits `shift`.. of all codes, `width` of them, `members` codes in a byte.

    Codes of a block lie as (.., members, run): a byte takes one of each member, the first lowest.
    """

    at: int
    width: int
    members: int
    run: int
    shift: int = 0


class Coded(NamedTuple):
    """How a format is encoded; what it means is in `quantization.kquants` and gguf."""

    kind: int
    size: int
    """Elements of a sub-block; of the block where it has none."""
    low: int
    high: int
    d_at: int
    planes: tuple[Plane, ...]
    zero: int = 0
    """Added to a code before it is stored."""
    scales: int = NO_SCALES
    scales_at: int = 0
    scale_limit: int = 1
    bit_word_at: int = -1
    """Where bit 4 of 32 codes lies, one after the other."""


ENCODED = {
    "q8_0": Coded(ROUNDED, 32, -127, 127, 0, (Plane(2, 8, 1, 32),)),
    "q5_0": Coded(FROM_EXTREME, 32, 0, 31, 0, (Plane(6, 4, 2, 16),), 16, bit_word_at=2),
    "q4_0": Coded(FROM_EXTREME, 32, 0, 15, 0, (Plane(2, 4, 2, 16),), 8),
    "q6_k": Coded(
        SYMMETRIC, 16, -32, 31, 208, (Plane(0, 4, 2, 64), Plane(128, 2, 4, 32, 4)), 32,
        SCALES_BYTES, 192, -128,
    ),
    "q5_k": Coded(
        AFFINE, 32, 0, 31, 0, (Plane(16, 1, 8, 32, 4), Plane(48, 4, 2, 32)), 0,
        SCALES_6_BIT, 4, 63,
    ),
    "q4_k": Coded(AFFINE, 32, 0, 15, 0, (Plane(16, 4, 2, 32),), 0, SCALES_6_BIT, 4, 63),
    "q3_k": Coded(
        SYMMETRIC, 16, -4, 3, 108, (Plane(0, 1, 8, 32, 2), Plane(32, 2, 4, 32)), 4,
        SCALES_Q3_K, 96, -32,
    ),
    "q2_k": Coded(AFFINE, 16, 0, 3, 80, (Plane(16, 2, 4, 32),), 0, SCALES_Q2_K, 0, 15),
}  # fmt: skip
