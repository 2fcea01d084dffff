"""Vector operations on codes and scales as they lie in memory, and their way to floats."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ktlab.kernels.codings import TABLE
from ktlab.kernels.numba_jit import intrinsic
from ktlab.kernels.numba_vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    constant,
    f32x16,
    shuffle,
    splat_lanes,
    u8x16,
    u8x32,
    u16x16,
)


def byte(context: Any, builder: Any, sig: Any, args: Any, place: int, lanes: int) -> Any:
    """Argument `place`, any integer, as a byte in all lanes."""
    value = context.cast(builder, args[place], sig.args[place], types.uint8)
    return splat_lanes(builder, value, lanes)


def _shift(
    context: Any, builder: Any, sig: Any, args: Any, vector: int, by: int, direction: str
) -> Any:
    """Bytes shifted in pairs: processors shift nothing narrower, and callers mask what crosses."""
    pairs = ir.VectorType(I16, sig.args[vector].lanes // 2)
    amount = context.cast(builder, args[by], sig.args[by], types.uint16)
    amount = splat_lanes(builder, amount, pairs.count)
    moved = getattr(builder, direction)(builder.bitcast(args[vector], pairs), amount)
    return builder.bitcast(moved, args[vector].type)


# ---- bytes: codes -------------------------------------------------------------------------------


@intrinsic
def bits(typing: Any, vector: Any, shift: Any, mask: Any) -> Any:
    """(byte >> shift) & mask, lane by lane; the mask must not reach beyond the byte's own bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        mask = byte(context, builder, sig, args, 2, sig.args[0].lanes)
        return builder.and_(_shift(context, builder, sig, args, 0, 1, "lshr"), mask)

    return vector(vector, shift, mask), codegen


@intrinsic
def with_high(typing: Any, low: Any, high: Any, shift: Any) -> Any:
    """low | high << shift, lane by lane; the shifted bits must fit their byte."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.or_(args[0], _shift(context, builder, sig, args, 1, 2, "shl"))

    return low(low, high, shift), codegen


@intrinsic
def minus_byte(typing: Any, vector: Any, zero: Any) -> Any:
    """byte - zero, lane by lane, modulo 256."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sub(args[0], byte(context, builder, sig, args, 1, sig.args[0].lanes))

    return vector(vector, zero), codegen


@intrinsic
def nibbles(typing: Any, vector: Any) -> Any:
    """16 bytes -> their 16 low nibbles, then their 16 high ones."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        low = builder.and_(args[0], constant(u8x16.llvm, 15))
        high = builder.lshr(args[0], constant(u8x16.llvm, 4))
        return shuffle(builder, low, high, range(32))

    return u8x32(vector), codegen


@intrinsic
def bit_string(typing: Any, word: Any) -> Any:
    """32 bits -> 32 bytes of 0 or 1, the lowest first."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        four = builder.bitcast(args[0], ir.VectorType(I8, 4))
        spread = shuffle(builder, four, four, [i // 8 for i in range(32)])
        own = builder.and_(spread, constant(u8x32.llvm, [1 << i % 8 for i in range(32)]))
        found = builder.icmp_unsigned("!=", own, constant(u8x32.llvm, 0))
        return builder.zext(found, u8x32.llvm)

    return u8x32(word), codegen


@intrinsic
def from_table(typing: Any, vector: Any) -> Any:
    """Codes 0..15 -> the values of `TABLE`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if "+ssse3" in context.codegen().magic_tuple()[2]:
            return _table_by_shuffle(builder, args[0])
        return _table_by_selection(builder, args[0])

    return vector(vector), codegen


def _table_by_shuffle(builder: Any, codes: Any) -> Any:
    """16 lookups in one x86 instruction; LLVM has no operation of its own for it."""
    kind = ir.FunctionType(u8x16.llvm, [u8x16.llvm, u8x16.llvm])
    pshufb = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
    table = constant(u8x16.llvm, [value & 255 for value in TABLE])
    parts = [
        builder.call(pshufb, [table, shuffle(builder, codes, codes, range(at, at + 16))])
        for at in range(0, codes.type.count, 16)
    ]
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        pairs = zip(parts[0::2], parts[1::2], strict=True)
        parts = [shuffle(builder, a, b, lanes) for a, b in pairs]
    return parts[0]


def _table_by_selection(builder: Any, codes: Any) -> Any:
    """Any processor: four layers of selection, one for each bit."""
    level = [constant(codes.type, value & 255) for value in TABLE]
    for bit in range(4):
        own = builder.and_(codes, constant(codes.type, 1 << bit))
        is_set = builder.icmp_unsigned("!=", own, constant(codes.type, 0))
        pairs = zip(level[1::2], level[0::2], strict=True)
        level = [builder.select(is_set, one, zero) for one, zero in pairs]
    return level[0]


@intrinsic
def pairs_of_bytes(typing: Any, word: Any) -> Any:
    """Eight bytes of a word -> 16, each twice."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        eight = builder.bitcast(args[0], ir.VectorType(I8, 8))
        return shuffle(builder, eight, eight, [i // 2 for i in range(16)])

    return u8x16(word), codegen


@intrinsic
def two_words(typing: Any, low: Any, high: Any) -> Any:
    """Eight bytes and eight bytes -> 16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (builder.bitcast(word, ir.VectorType(I8, 8)) for word in args)
        return shuffle(builder, a, b, range(16))

    return u8x16(low, high), codegen


# ---- to floats ----------------------------------------------------------------------------------


@intrinsic
def floats(typing: Any, vector: Any) -> Any:
    """16 signed bytes -> floats."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], f32x16.llvm)

    return f32x16(vector), codegen


@intrinsic
def column_floats(typing: Any, vector: Any, column: Any) -> Any:
    """Signed byte 4r + column of each r = 0..15 -> floats; column 0..3."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = ir.VectorType(I32, 16)
        column = context.cast(builder, args[1], sig.args[1], types.int32)
        left = builder.sub(ir.Constant(I32, 24), builder.mul(column, ir.Constant(I32, 8)))
        top = builder.shl(builder.bitcast(args[0], words), splat_lanes(builder, left, 16))
        return builder.sitofp(builder.ashr(top, constant(words, 24)), f32x16.llvm)

    return f32x16(vector, column), codegen


def _halves(builder: Any, value: Any) -> Any:
    """float16 bits -> float32, exact (NaN payloads aside), scalar or vector, by integer steps:
    LLVM's own conversion calls a missing function where the processor has no instruction."""
    wide: Any = I32
    single: Any = FLOAT
    if isinstance(value.type, ir.VectorType):
        wide = ir.VectorType(I32, value.type.count)
        single = ir.VectorType(FLOAT, value.type.count)
    value = builder.zext(value, wide)
    magnitude = builder.and_(value, constant(wide, 0x7FFF))
    shifted = builder.shl(magnitude, constant(wide, 13))
    normal = builder.add(shifted, constant(wide, 112 << 23))
    special = builder.or_(shifted, constant(wide, 0x7F800000))
    small = builder.fmul(builder.uitofp(magnitude, single), constant(single, 2.0**-24))
    is_special = builder.icmp_unsigned(">=", magnitude, constant(wide, 0x7C00))
    is_small = builder.icmp_unsigned("<", magnitude, constant(wide, 0x0400))
    found = builder.select(is_special, special, normal)
    found = builder.select(is_small, builder.bitcast(small, wide), found)
    sign = builder.shl(builder.and_(value, constant(wide, 0x8000)), constant(wide, 16))
    return builder.bitcast(builder.or_(found, sign), single)


@intrinsic
def half(typing: Any, word: Any) -> Any:
    """uint16 with float16 bits -> float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halves(builder, context.cast(builder, args[0], sig.args[0], types.uint16))

    return types.float32(word), codegen


@intrinsic
def halves(typing: Any, vector: Any) -> Any:
    """float16 bits -> floats."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halves(builder, args[0])

    return f32x16(vector), codegen


@intrinsic
def brain_float(typing: Any, word: Any) -> Any:
    """uint16 with bfloat16 bits -> float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = context.cast(builder, args[0], sig.args[0], types.uint32)
        return builder.bitcast(builder.shl(word, ir.Constant(I32, 16)), FLOAT)

    return types.float32(word), codegen


@intrinsic
def brain_floats(typing: Any, vector: Any) -> Any:
    """bfloat16 bits -> floats."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(I32, 16)
        words = builder.shl(builder.zext(args[0], wide), constant(wide, 16))
        return builder.bitcast(words, f32x16.llvm)

    return f32x16(vector), codegen


@intrinsic
def every_second(typing: Any, vector: Any, odd: Any) -> Any:
    """Of 32 values those at even places, or (odd != 0) at odd ones."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        even = shuffle(builder, args[0], args[0], range(0, 32, 2))
        other = shuffle(builder, args[0], args[0], range(1, 32, 2))
        wanted = context.cast(builder, args[1], sig.args[1], types.int32)
        is_odd = builder.icmp_unsigned("!=", wanted, ir.Constant(I32, 0))
        return builder.select(is_odd, other, even)

    return u16x16(vector, odd), codegen


@intrinsic
def strided_halves(typing: Any, address: Any, stride: Any, count: Any) -> Any:
    """`count` (1..8) float16, `stride` bytes apart -> 16 floats, each twice; the last one fills
    the lanes that are left."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, step, last = (
            context.cast(builder, arg, kind, types.intp)
            for arg, kind in zip(args, sig.args, strict=True)
        )
        last = builder.sub(last, ir.Constant(last.type, 1))
        words = ir.Constant(ir.VectorType(I16, 8), ir.Undefined)
        for lane in range(8):
            own = ir.Constant(last.type, lane)
            own = builder.select(builder.icmp_signed("<", own, last), own, last)
            at = builder.add(start, builder.mul(own, step))
            word = builder.load(builder.inttoptr(at, I16.as_pointer()), align=1)
            words = builder.insert_element(words, word, ir.Constant(I32, lane))
        eight = _halves(builder, words)
        return shuffle(builder, eight, eight, [i // 2 for i in range(16)])

    return f32x16(address, stride, count), codegen


@intrinsic
def turn_16x16(typing: Any, source: Any, stride: Any, target: Any) -> Any:
    """Transpose 16 x 16 floats: rows `stride` bytes apart at `source`, rows of 64 at `target`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, step, to = (
            context.cast(builder, arg, kind, types.intp)
            for arg, kind in zip(args, sig.args, strict=True)
        )

        def pointer(base: Any, offset: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), f32x16.llvm.as_pointer())

        rows = [
            builder.load(pointer(start, builder.mul(step, ir.Constant(step.type, i))), align=1)
            for i in range(16)
        ]
        width = 8
        while width:  # exchange off-diagonal squares of 8, 4, 2, 1
            low = [i if i % (2 * width) < width else i + 16 - width for i in range(16)]
            high = [i + width if i % (2 * width) < width else i + 16 for i in range(16)]
            for i in range(16):
                if i % (2 * width) < width:
                    a, b = rows[i], rows[i + width]
                    rows[i] = shuffle(builder, a, b, low)
                    rows[i + width] = shuffle(builder, a, b, high)
            width //= 2
        for i, row in enumerate(rows):
            builder.store(row, pointer(to, ir.Constant(to.type, 64 * i)), align=1)
        return context.get_dummy_value()

    return types.void(source, stride, target), codegen
