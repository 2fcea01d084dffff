"""Vector operations on the way from floats to codes: 16 lanes, each rounded once, as in NumPy."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ktlab.kernels.numba_jit import intrinsic
from ktlab.kernels.numba_vectors import FLOAT, I16, I32, constant, f32x16, u8x16

_WORDS = ir.VectorType(I32, 16)
_MAGIC = 1.5 * 2.0**23
"""Added and taken away again, it leaves a whole number: the nearest, ties to even."""


@intrinsic
def over(typing: Any, a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = constant(f32x16.llvm, 0.0)
        none = builder.fcmp_ordered("==", args[1], zero)
        return builder.select(none, zero, builder.fdiv(args[0], args[1]))

    return f32x16(a, b), codegen


@intrinsic
def where_less(typing: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
    """`then` where a < b, else `otherwise`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return f32x16(a, b, then, otherwise), codegen


@intrinsic
def magnitude(typing: Any, a: Any) -> Any:
    """|a|."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _magnitude(builder, args[0])

    return f32x16(a), codegen


def _magnitude(builder: Any, value: Any) -> Any:
    bits = builder.and_(builder.bitcast(value, _WORDS), constant(_WORDS, 0x7FFFFFFF))
    return builder.bitcast(bits, f32x16.llvm)


@intrinsic
def largest(typing: Any, most: Any, a: Any) -> Any:
    """The larger of `most`, which has no sign, and |a|; NaN is larger than everything."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        old, new = (builder.bitcast(v, _WORDS) for v in (args[0], _magnitude(builder, args[1])))
        found = builder.select(builder.icmp_unsigned("<", old, new), new, old)
        return builder.bitcast(found, f32x16.llvm)

    return f32x16(most, a), codegen


@intrinsic
def root(typing: Any, a: Any) -> Any:
    """Square root."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(f32x16.llvm, [f32x16.llvm])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.sqrt.v16f32")
        return builder.call(function, args)

    return f32x16(a), codegen


@intrinsic
def nearest_whole(typing: Any, a: Any) -> Any:
    """The nearest whole number, ties to even; |a| below 2^22."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        magic = constant(f32x16.llvm, _MAGIC)
        return builder.fsub(builder.fadd(args[0], magic), magic)

    return f32x16(a), codegen


@intrinsic
def truncated(typing: Any, a: Any) -> Any:
    """Without what is behind the point; |a| below 2^31."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(builder.fptosi(args[0], _WORDS), f32x16.llvm)

    return f32x16(a), codegen


@intrinsic
def signed_as(typing: Any, a: Any, sign: Any) -> Any:
    """a, which has no sign, with the sign of `sign`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        own = builder.and_(builder.bitcast(args[1], _WORDS), constant(_WORDS, 0x80000000))
        return builder.bitcast(builder.or_(builder.bitcast(args[0], _WORDS), own), f32x16.llvm)

    return f32x16(a, sign), codegen


@intrinsic
def to_bytes(typing: Any, a: Any) -> Any:
    """Whole numbers from -128 to 255 as bytes, modulo 256."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.trunc(builder.fptosi(args[0], _WORDS), u8x16.llvm)

    return u8x16(a), codegen


@intrinsic
def half_bits(typing: Any, value: Any) -> Any:
    """float32 -> uint16 with the bits of the nearest float16, ties to even; NaN becomes infinity.

    By integer steps: see `numba_bytes.half` for why."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = context.cast(builder, args[0], sig.args[0], types.float32)
        bits = builder.bitcast(value, I32)
        own = builder.and_(bits, constant(I32, 0x7FFFFFFF))
        # Below the smallest normal float16: adding 0.5 rounds to multiples of 2^-24.
        small = builder.fadd(builder.bitcast(own, FLOAT), constant(FLOAT, 0.5))
        small = builder.sub(builder.bitcast(small, I32), constant(I32, 0x3F000000))
        odd = builder.and_(builder.lshr(own, constant(I32, 13)), constant(I32, 1))
        rest = builder.add(builder.sub(own, constant(I32, 112 << 23)), constant(I32, 0xFFF))
        normal = builder.lshr(builder.add(rest, odd), constant(I32, 13))
        is_small = builder.icmp_unsigned("<", own, constant(I32, 113 << 23))
        is_large = builder.icmp_unsigned(">=", own, constant(I32, 0x47800000))
        found = builder.select(is_small, small, normal)
        found = builder.select(is_large, constant(I32, 0x7C00), found)
        sign = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 0x8000))
        return builder.trunc(builder.or_(found, sign), I16)

    return types.uint16(value), codegen


@intrinsic
def bit_word(typing: Any, vector: Any) -> Any:
    """32 bytes -> 32 bits, 1 where a byte is not 0, the first lowest: `bit_string` inverted."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        some = builder.icmp_unsigned("!=", args[0], constant(args[0].type, 0))
        return builder.bitcast(some, I32)

    return types.uint32(vector), codegen


@intrinsic
def eighths(typing: Any, vector: Any) -> Any:
    """16 codes of E4M3 -> floats, exact; 127 and 255 are NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        code = builder.zext(args[0], _WORDS)
        own = builder.and_(code, constant(_WORDS, 127))
        # As the bits of a float it is 2^120 too small, subnormal codes included.
        raw = builder.bitcast(builder.shl(own, constant(_WORDS, 20)), f32x16.llvm)
        value = builder.fmul(raw, constant(f32x16.llvm, 2.0**120))
        nothing = builder.icmp_unsigned("==", own, constant(_WORDS, 127))
        bits = builder.select(nothing, constant(_WORDS, 0x7FC00000), builder.bitcast(value, _WORDS))
        sign = builder.shl(builder.and_(code, constant(_WORDS, 128)), constant(_WORDS, 24))
        return builder.bitcast(builder.or_(bits, sign), f32x16.llvm)

    return f32x16(vector), codegen
