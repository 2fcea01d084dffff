"""Explicit vectors inside Numba functions: LLVM's own vector values, on any instruction set.

Numba leaves vectorising to LLVM, which gives up on most loops over packed bits; these intrinsics
say which values go together (16 floats, 32 or 64 bytes) and leave only the instruction set to
LLVM; where one names an instruction, it has a general form for other processors.

Memory is read and written at plain addresses (integers, in bytes): an array passed to an inlined
function costs two atomic reference counts, which is more than decoding 256 weights. Nothing is
checked, so callers must be sure of their addresses; byte order is little-endian, as in GGUF files.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model

from ktlab.kernels.numba_jit import intrinsic

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
FLOAT = ir.FloatType()


class Vector(types.Type):
    """`lanes` values of an LLVM type; integers carry no sign, operations do."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        self.lanes = lanes
        super().__init__(name=f"Vector({element} x {lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


f32x16 = Vector(FLOAT, 16)
u8x16, u8x32, u8x64 = (Vector(I8, lanes) for lanes in (16, 32, 64))
u16x16, u16x32 = (Vector(I16, lanes) for lanes in (16, 32))


def constant(vector: ir.Type, values: Sequence[float] | float) -> ir.Constant:
    """A constant of a scalar or vector type; one number fills all lanes."""
    if not isinstance(vector, ir.VectorType):
        return ir.Constant(vector, values)
    if isinstance(values, int | float):
        values = [values] * vector.count
    return ir.Constant(vector, [ir.Constant(vector.element, value) for value in values])


def shuffle(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat_lanes(builder: Any, scalar: Any, lanes: int) -> Any:
    start = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    start = builder.insert_element(start, scalar, ir.Constant(I32, 0))
    return shuffle(builder, start, start, [0] * lanes)


def pointer(context: Any, builder: Any, sig: Any, args: Any, value: ir.Type) -> Any:
    """Argument 0, an address, as a pointer to `value`."""
    address = context.cast(builder, args[0], sig.args[0], types.intp)
    return builder.inttoptr(address, value.as_pointer())


def _load(result: Any, value: ir.Type) -> Any:
    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        """The values at an address, whatever its alignment."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(pointer(context, builder, sig, args, value), align=1)

        return result(address), codegen

    return load


load_f32x16 = _load(f32x16, f32x16.llvm)
load_u8x16 = _load(u8x16, u8x16.llvm)
load_u8x32 = _load(u8x32, u8x32.llvm)
load_u8x64 = _load(u8x64, u8x64.llvm)
load_u16x16 = _load(u16x16, u16x16.llvm)
load_u16x32 = _load(u16x32, u16x32.llvm)
load_u8 = _load(types.uint8, I8)
load_u16 = _load(types.uint16, I16)
load_u32 = _load(types.uint32, I32)
load_u64 = _load(types.uint64, I64)
load_i64 = _load(types.int64, I64)
load_f32 = _load(types.float32, FLOAT)


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Write a vector or a number at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], pointer(context, builder, sig, args, args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address; no harm where there is none."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reading, soon, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        builder.call(function, [pointer(context, builder, sig, args, I8), reading, soon, data])
        return context.get_dummy_value()

    return types.void(address), codegen


# ---- float arithmetic ---------------------------------------------------------------------------


@intrinsic
def field(typing: Any, address: Any, place: Any) -> Any:
    """int64 number `place` of those at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        base = pointer(context, builder, sig, args, I64)
        place = context.cast(builder, args[1], sig.args[1], types.intp)
        return builder.load(builder.gep(base, [place]))

    return types.int64(address, place), codegen


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One float in all 16 lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return splat_lanes(builder, context.cast(builder, args[0], sig.args[0], types.float32), 16)

    return f32x16(value), codegen


def _arithmetic(name: str) -> Any:
    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        """Lane by lane, rounded each time, never contracted."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return f32x16(a, b), codegen

    return operation


add, minus, times = _arithmetic("fadd"), _arithmetic("fsub"), _arithmetic("fmul")


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        product = builder.fmul(args[0], args[1], flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return f32x16(a, b, c), codegen


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of 16 lanes, always in the same order: halves added to halves."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = args[0]
        lanes = sig.args[0].lanes
        while lanes > 1:
            lanes //= 2
            low = shuffle(builder, found, found, range(lanes))
            high = shuffle(builder, found, found, range(lanes, 2 * lanes))
            found = builder.fadd(low, high)
        return builder.extract_element(found, ir.Constant(I32, 0))

    return types.float32(vector), codegen
