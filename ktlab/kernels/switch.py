"""Few tokens or many: where a kernel changes from reading weights once to reusing them.

With few tokens of an expert, time is the bytes of its weights: each is read once and used at once.
With many, time is arithmetic: weights are decoded into tiles that all tokens use. The border is
kept as data with its reason, and can be measured (`measure_switch`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ktlab.kernels.request import BLOCKS, NUMBA_ISA, PACKED

FAMILIES = {
    "float": ("f32", "f16", "bf16"),
    "8 bits": ("q8_0", "int8_channel"),
    "32 a scale": ("q4_0", "q5_0", "iq4_nl", "int4_group32", "int4_group128"),
    "256 a block": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
}
"""Formats whose kernels do the same work for each weight."""


def family(format: str) -> str:
    """The family of a format that native kernels compute; KeyError otherwise."""
    return next(name for name, members in FAMILIES.items() if format in members)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Up to `few` tokens of one expert take the path for few. Empty words match everything."""

    few: int
    reason: str
    isa: str = ""
    layout: str = ""
    family: str = ""

    def matches(self, isa: str, layout: str, family: str) -> bool:
        return all(
            mine in ("", theirs)
            for mine, theirs in ((self.isa, isa), (self.layout, layout), (self.family, family))
        )


_TILES = "a tile product takes 16 rows of activations whether they are there or not"
THRESHOLDS = (
    *(
        Threshold(isa=isa, few=8, reason=f"below, avx512_vnni computes: {_TILES}")
        for isa in ("amx_int8", "amx_bf16", "amx_int8_emulated", "amx_bf16_emulated")
    ),
    Threshold(isa=NUMBA_ISA, few=2, reason="above, weights are decoded once for all tokens"),
    Threshold(layout=BLOCKS, few=4, reason="above, decoding a block once for all tokens pays"),
    Threshold(layout=PACKED, few=4, reason="above, a panel is reused from the cache"),
)
"""The first that matches counts."""


def threshold(isa: str, layout: str, formats: Sequence[str]) -> Threshold:
    """The border for a kernel; of several matrices the first one's format decides."""
    kind = family(formats[0])
    return next(t for t in THRESHOLDS if t.matches(isa, layout, kind))
