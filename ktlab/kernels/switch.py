"""Few tokens or many: where a kernel changes from reading weights once to reusing them.

With few tokens of an expert, time is the bytes of its weights: each is read once and used at once.
With many, time is arithmetic: weights are decoded into tiles that all tokens use. The border is
kept as data with its reason, and can be measured (`measure_switch`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ktlab.kernels import native
from ktlab.kernels.request import BLOCKS, NUMBA_ISA, PACKED

AMD = "AuthenticAMD"
FAMILIES = {
    "float": ("f32", "f16", "bf16"),
    "long scales": ("int8_channel", "int4_group128"),
    "32 a scale": ("q8_0", "q4_0", "q5_0", "iq4_nl", "int4_group32"),
    "256 a block": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
}
"""Formats whose kernels do the same work for each weight."""


def family(format: str) -> str:
    """The family of a format that native kernels compute; KeyError otherwise."""
    return next(name for name, members in FAMILIES.items() if format in members)


PAIRS = {
    "avx2": "two instructions a product instead of three",
    "avx512_vnni": "additions are free on AMD",
}
"""Instruction sets that may scale many tokens' sums two by two, and why."""


WORDS = {"avx2": ("q8_0", "iq4_nl", "iq4_xs", "int8_channel")}
"""Formats with codes of 8 bits, which many tokens take in words of 16 bits where sums of two
products fit nothing smaller (csrc/words_avx2.inc.h)."""


def in_words(isa: str, formats: Sequence[str]) -> bool:
    """Whether many tokens take some of these matrices in words."""
    return any(format in WORDS.get(isa, ()) for format in formats)


def in_pairs(isa: str, formats: Sequence[str]) -> bool:
    """Whether one of `PAIRS` may scale many tokens' sums of some of these matrices (gate, up, down;
    or one) two by two: those with a scale for 16 or 32 weights. q8_0 keeps its activations' second
    term instead, in `down` only behind q8_0 (key_of in ktlab_ext's tasks.h); avx2 takes codes
    of 8 bits, as the iq4 formats' levels are, in words."""
    *before, last = formats
    wide = WORDS.get(isa, ("q8_0",))
    short = any(family(f) in ("32 a scale", "256 a block") and f not in wide for f in formats)
    return short or (isa not in WORDS and last == "q8_0" and any(f != "q8_0" for f in before))


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Up to `few` tokens of one expert take the path for few. Empty words match everything."""

    few: int
    reason: str
    isa: str = ""
    layout: str = ""
    family: str = ""
    vendor: str = ""
    """As cpuid names the processor's maker."""

    def matches(self, isa: str, layout: str, family: str, vendor: str) -> bool:
        mine = (self.isa, self.layout, self.family, self.vendor)
        return all(a in ("", b) for a, b in zip(mine, (isa, layout, family, vendor), strict=True))


_TILES = "below, avx512_vnni computes: a tile product takes 16 tokens whether they are there or not"
_VECTORS = "below, avx512_vnni computes: an instruction of it has twice the products"
_FUSED = "above, decoding once for all tokens pays"
THRESHOLDS = (
    *(
        Threshold(isa=f"amx_int8{suffix}", layout=layout, family=kind, few=few, reason=_TILES)
        for suffix in ("", "_emulated")
        for layout, kind, few in (
            (PACKED, "long scales", 6),
            ("", "long scales", 16),
            ("", "", 128),
        )
    ),
    *(
        Threshold(isa=isa, family=kind, few=few, reason=reason)
        for isa, reason in (
            ("amx_bf16", _TILES),
            ("amx_bf16_emulated", _TILES),
            ("avx512_bf16", _VECTORS),
        )
        for kind, few in (("float", 4), ("256 a block", 28), ("", 64))
    ),
    Threshold(isa=NUMBA_ISA, few=2, reason="above, weights are decoded once for all tokens"),
    *(
        Threshold(isa="avx512_vnni", vendor=AMD, layout=layout, family=kind, few=few, reason=_FUSED)
        for layout, borders in (
            (BLOCKS, (("long scales", 3), ("32 a scale", 3))),
            (PACKED, (("long scales", 6), ("", 12))),
        )
        for kind, few in borders
    ),
    Threshold(isa="avx2", layout=BLOCKS, family="32 a scale", few=3, reason=_FUSED),
    Threshold(isa="avx2", layout=PACKED, family="float", few=8, reason=_FUSED),
    Threshold(isa="avx2", few=4, reason=_FUSED),
    Threshold(layout=BLOCKS, few=6, reason=_FUSED),
    Threshold(layout=PACKED, family="long scales", few=1, reason=_FUSED),
    Threshold(layout=PACKED, few=5, reason=_FUSED),
)
"""The first that matches counts.

Where the two paths took the same time, medians of 5 on 2 threads of a Sapphire Rapids Xeon, one
matrix of 8192 x 7168 (`measure_switch`): avx512_vnni 4 to 8 tokens an expert, packed with long
scales at once; amx_bf16 on blocks 24 (q8_0) to 48 (q4_k, q5_0), packed 4 (q8_0) to 32, floats 0 to
4; amx_int8 4 to 12 with long scales, beyond 48 without. On a Xeon of the sixth generation, 8192 x
7168: amx_bf16 24 to 32 with 256 a block, 32 else (q8_0 14); amx_int8 with long scales packed 5 to
8, on blocks 16 to 20. q8_0 under amx_bf16 stays with the path for few up to 64 all the same: its
activations have 16 bits there.

On 2 cores of an AMD EPYC of the fourth generation, 4096 x 7168: avx512_vnni packed 6 tokens with
long scales, 12 to 24 else; on blocks 2 (q8_0) to 12 (q4_k, whose rows go 16 at a time). avx512_bf16
packed 4 with bf16; on integers it is faster than avx512_vnni at no number of tokens: it is for
those who want to lose 0.4 % instead of 0.9. On the fifth generation, packed q4_k and q6_k in whole
layers, 8 to 12: V3's 16 tokens an expert 25 ms (27.6 with 16), V2-Lite's 6 10.2 to 10.5. On the
third, avx2, 16384 x 7168: 4 to 5 in both layouts, as a pass takes four tokens; on blocks of q4_0 3,
of q5_0 2; floats packed 16 (bf16), 8 (f16) and 4 (f32)."""


def threshold(isa: str, layout: str, formats: Sequence[str]) -> Threshold:
    """The border for a kernel; of several matrices the first one's format decides."""
    kind = family(formats[0])
    return next(t for t in THRESHOLDS if t.matches(isa, layout, kind, native.cpu_vendor()))
