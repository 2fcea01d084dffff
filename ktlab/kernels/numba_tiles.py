"""The register tile: the inner loop of a matrix product on decoded weights, as a Numba intrinsic.

16 rows of weights, [column][row], times 8 or 4 tokens, [column][token]: a weight vector is loaded
once a column, each activation fills a vector, and the sums stay in registers for a whole chunk.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ktlab.kernels.numba_jit import intrinsic
from ktlab.kernels.numba_vectors import f32x16, splat_lanes

WIDE, NARROW = 8, 4
"""Tokens of the two tiles."""


def _tile(tokens: int) -> Any:
    @intrinsic
    def tile(typing: Any, w: Any, x: Any, sums: Any, columns: Any) -> Any:
        """sums (tokens, 16) += w (columns, 16) x (columns, tokens); w, x and sums are addresses."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            w, x, sums, columns = (
                context.cast(builder, arg, kind, types.intp)
                for arg, kind in zip(args, sig.args, strict=True)
            )

            def pointer(base: Any, index: Any, step: int, offset: int, value: ir.Type) -> Any:
                """To `value` at base + index * step + offset, in bytes."""
                scaled = builder.mul(index, ir.Constant(index.type, step))
                at = builder.add(builder.add(base, scaled), ir.Constant(index.type, offset))
                return builder.inttoptr(at, value.as_pointer())

            none = ir.Constant(columns.type, 0)
            places = [pointer(sums, none, 0, 64 * t, f32x16.llvm) for t in range(tokens)]
            kept = [cgutils.alloca_once(builder, f32x16.llvm) for _ in places]
            for place, own in zip(places, kept, strict=True):
                builder.store(builder.load(place, align=4), own)
            with cgutils.for_range(builder, columns) as loop:
                weight = builder.load(pointer(w, loop.index, 64, 0, f32x16.llvm), align=4)
                for t, own in enumerate(kept):
                    at = pointer(x, loop.index, 4 * tokens, 4 * t, ir.FloatType())
                    value = splat_lanes(builder, builder.load(at), 16)
                    product = builder.fmul(weight, value, flags=("contract",))
                    found = builder.fadd(product, builder.load(own), flags=("contract",))
                    builder.store(found, own)
            for place, own in zip(places, kept, strict=True):
                builder.store(builder.load(own), place, align=4)
            return context.get_dummy_value()

        return types.void(w, x, sums, columns), codegen

    return tile


wide_tile, narrow_tile = _tile(WIDE), _tile(NARROW)
