"""What the generated loops are made of below Python: memory by address, bits, multiply-add.

Needs Numba; only generated code imports this. Addresses are whole numbers: a kernel that takes
nothing else is called in a third of a microsecond, and every array argument would add to that.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from taskgrad.kernels.codegen.nontemporal import PIECE
from taskgrad.kernels.codegen.tiled_transpose import LINE, ROWS, SIDE
from taskgrad.kernels.ir.dtypes import SIZES

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
# How each dtype lies in memory.
_STORED: dict[str, ir.Type] = {
    **{"bool": _I8, "uint8": _I8, "int8": _I8, "int16": _I16, "int32": _I32, "int64": _I64},
    **{"float16": _I16, "bfloat16": _I16, "float32": _F32, "float64": _F64},
}
_WIDTHS = {"float32": 32, "float64": 64}
_STREAMED = 256  # bits of a store past the caches
_NUMBA = {
    **{name: getattr(types, name) for name in ("uint8", "int8", "int16", "int32", "int64")},
    **{"bool": types.boolean, "float16": types.float32, "bfloat16": types.float32},
    **{"float32": types.float32, "float64": types.float64},
}


def _told_apart(builder: ir.IRBuilder, access: Any, side: str) -> None:
    """Tell LLVM that what a turn of the loop reads, writes and adds to ("sums") do not meet.

    Not even in place: there each element is read before it is written, and by nobody else.
    """
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "taskgrad")])
    scopes = {
        side: module.add_metadata([ir.MetaDataString(module, f"taskgrad {side}"), domain])
        for side in ("reads", "writes", "sums")
    }
    others = [scope for other, scope in scopes.items() if other != side]
    access.set_metadata("alias.scope", module.add_metadata([scopes[side]]))
    access.set_metadata("noalias", module.add_metadata(others))


def _pointer(builder: ir.IRBuilder, address: Any, index: Any, stored: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])


def _loader(name: str, apart: bool) -> Any:
    stored, number = _STORED[name], _NUMBA[name]

    @intrinsic
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], args[1], stored))
            if apart:
                _told_apart(builder, value, "reads")
            if name == "bool":
                return builder.icmp_unsigned("!=", value, ir.Constant(_I8, 0))
            if name == "bfloat16":
                wide = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
                return builder.bitcast(wide, _F32)
            if name == "float16":
                return builder.fpext(builder.bitcast(value, ir.HalfType()), _F32)
            return value

        return number(types.int64, types.int64), generate

    return load


def _storer(name: str, side: str | None) -> Any:
    stored, number = _STORED[name], _NUMBA[name]

    @intrinsic
    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            value = args[2]
            if name == "bool":
                value = builder.zext(value, _I8)
            elif name == "bfloat16":
                value = _rounded_to_bfloat16(builder, value)
            elif name == "float16":
                value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), _I16)
            access = builder.store(value, _pointer(builder, args[0], args[1], stored))
            if side is not None:
                _told_apart(builder, access, side)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, number), generate

    return store


def _grower(name: str) -> Any:
    stored, number = _STORED[name], _NUMBA[name]

    @intrinsic
    def grow(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        """Add to an element of scratch memory."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            place = _pointer(builder, args[0], args[1], stored)
            before = builder.load(place)
            access = builder.store(builder.fadd(before, args[2]), place)
            for touched in (before, access):
                _told_apart(builder, touched, "sums")
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, number), generate

    return grow


def _rounded_to_bfloat16(builder: ir.IRBuilder, value: Any) -> Any:
    """The upper half of a float32, to the nearest, ties to even; a NaN stays one."""

    def number(n: int) -> ir.Constant:
        return ir.Constant(_I32, n)

    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(
        builder.lshr(builder.select(is_nan, number(0x7FC00000), rounded), number(16)), _I16
    )


def _turner(name: str) -> Any:
    stored = _STORED[name]
    vector = ir.VectorType(stored, SIDE)

    @intrinsic
    def turn(typing_context: Any, source: Any, stride: Any, target: Any, width: Any) -> Any:
        """Transpose a block of 8 by 8; both strides are in bytes.

        In three rounds of swaps: halves of pairs of rows four apart, then quarters of those two
        apart, then single elements of neighbours.
        """

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            source, stride, target, width = args
            zero = ir.Constant(_I64, 0)

            def row(address: Any, step: Any, r: int) -> Any:
                at = builder.add(address, builder.mul(step, ir.Constant(_I64, r)))
                return _pointer(builder, at, zero, vector)

            size = int(stored.width if isinstance(stored, ir.IntType) else _WIDTHS[name]) // 8
            rows = [builder.load(row(source, stride, r), align=size) for r in range(SIDE)]
            for step in (4, 2, 1):
                for r in (r for r in range(SIDE) if not r & step):
                    a, b = rows[r], rows[r + step]
                    first = [j if not j & step else SIDE + j - step for j in range(SIDE)]
                    second = [j + step if not j & step else SIDE + j for j in range(SIDE)]
                    rows[r], rows[r + step] = (
                        builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, SIDE), places))
                        for places in (first, second)
                    )
            for r in range(SIDE):
                builder.store(rows[r], row(target, width, r), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    return turn


def _ask_for(builder: ir.IRBuilder, address: Any, to_write: bool) -> None:
    """Have the second cache fetch a line; an address where there is no memory does no harm."""
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    second_cache, data = ir.Constant(_I32, 2), ir.Constant(_I32, 1)
    at = builder.inttoptr(address, pointer)
    builder.call(prefetch, [at, ir.Constant(_I32, int(to_write)), second_cache, data])


def _asker(to_write: bool) -> Any:
    @intrinsic
    def ahead(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _ask_for(builder, args[0], to_write)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return ahead


ahead_read, ahead_write = _asker(to_write=False), _asker(to_write=True)


def _asker_for_column(name: str) -> Any:
    @intrinsic
    def ahead_column(typing_context: Any, address: Any) -> Any:
        """Ask for the lines of a tile's column, the first of which has this address."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            for start in range(0, ROWS * SIZES[name], LINE):
                at = builder.add(args[0], ir.Constant(_I64, start))
                _ask_for(builder, at, to_write=False)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return ahead_column


def _streamer(name: str) -> Any:
    stored = _STORED[name]
    width = int(stored.width if isinstance(stored, ir.IntType) else _WIDTHS[name])
    vector, size = ir.VectorType(stored, _STREAMED // width), _STREAMED // 8

    @intrinsic
    def stream(typing_context: Any, source: Any, target: Any) -> Any:
        """Move a piece of a result to memory, past the caches; there it is on a cache line."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            source, target = args
            past = builder.module.add_metadata([ir.Constant(_I32, 1)])
            parts = [ir.Constant(_I64, part) for part in range(PIECE * width // _STREAMED)]
            values = [
                builder.load(_pointer(builder, source, part, vector), align=size) for part in parts
            ]
            for part, value in zip(parts, values, strict=True):
                access = builder.store(value, _pointer(builder, target, part, vector), align=size)
                access.set_metadata("nontemporal", past)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return stream


@intrinsic
def fence(typing_context: Any) -> Any:
    """What this thread wrote before, past the caches too, others see before what it writes next."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


for _name in _STORED:
    globals()[f"ahead_column_{_name}"] = _asker_for_column(_name)
    globals()[f"turn_{_name}"] = _turner(_name)
    globals()[f"stream_{_name}"] = _streamer(_name)
    globals()[f"load_{_name}"] = _loader(_name, apart=True)
    globals()[f"store_{_name}"] = _storer(_name, "writes")
    # For scratch memory, which is read back.
    globals()[f"get_{_name}"] = _loader(_name, apart=False)
    globals()[f"put_{_name}"] = _storer(_name, None)

for _name in ("float32", "float64"):
    globals()[f"grow_{_name}"] = _grower(_name)
    globals()[f"keep_{_name}"] = _storer(_name, "sums")


@intrinsic
def take(typing_context: Any, address: Any, index: Any, count: Any) -> Any:
    """Add to a whole number that threads share; what it was before.

    What a thread wrote before, others see that find its number.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = _pointer(builder, args[0], args[1], _I64)
        return builder.atomic_rmw("add", place, args[2], "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def answer(typing_context: Any, function: Any) -> Any:
    """What the C function at this address gives, an `int`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [])
        found = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(found, _I64)

    return types.int64(types.int64), generate


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), generate


def _divider(remains: bool) -> Any:
    @intrinsic
    def divide(typing_context: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.srem(*args) if remains else builder.sdiv(*args)

        return types.int64(types.int64, types.int64), generate

    return divide


# Rounded towards 0. Division by 0, and of the smallest integer by -1, ends the process.
quotient, rest = _divider(remains=False), _divider(remains=True)


@intrinsic
def fmod(typing_context: Any, x: Any, y: Any) -> Any:
    """The remainder of ``x / y`` rounded towards 0; it has the sign of x."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.frem(*args)

    return x(x, x), generate


def _bits(source: Any, target: Any, stored: ir.Type) -> Any:
    @intrinsic
    def bits(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], stored)

        return target(source), generate

    return bits


bits_of_float32 = _bits(types.float32, types.int32, _I32)
bits_of_float64 = _bits(types.float64, types.int64, _I64)
float32_of_bits = _bits(types.int32, types.float32, _F32)
float64_of_bits = _bits(types.int64, types.float64, _F64)


def _rounder(name: str) -> Any:
    @intrinsic
    def rounded(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            kind = args[0].type
            function = builder.module.declare_intrinsic(f"llvm.{name}", [kind])
            return builder.call(function, args)

        return x(x), generate

    return rounded


floor, ceil, trunc, rint = (_rounder(name) for name in ("floor", "ceil", "trunc", "rint"))
