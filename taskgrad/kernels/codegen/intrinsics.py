"""LLVM intrinsics for generated code: memory access by address, prefetch, atomics, bits, fma.

Needs Numba. Addresses are int64: a call of a kernel whose only argument is one takes a third of a
microsecond, and every array argument would add to that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from taskgrad.kernels.codegen.access import CACHE_LINE
from taskgrad.kernels.codegen.nontemporal import PIECE
from taskgrad.kernels.codegen.tiled_transpose import ROWS, SIDE
from taskgrad.kernels.ir.dtypes import SIZES

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
# The LLVM type of each dtype in memory.
_STORED: dict[str, ir.Type] = {
    **{"bool": _I8, "uint8": _I8, "int8": _I8, "int16": _I16, "int32": _I32, "int64": _I64},
    **{"float16": _I16, "bfloat16": _I16, "float32": _F32, "float64": _F64},
}
_NONTEMPORAL = 32  # bytes of a non-temporal store
_NUMBA = {
    **{name: getattr(types, name) for name in ("uint8", "int8", "int16", "int32", "int64")},
    **{"bool": types.boolean, "float16": types.float32, "bfloat16": types.float32},
    **{"float32": types.float32, "float64": types.float64},
}


def _intrinsic(result: Any = None, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a Numba intrinsic of a function that emits LLVM IR, given a builder and the arguments.

    Without types, the result and all arguments have the first argument's type.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(typing_context: Any, *arguments: Any) -> Any:
            def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
                value = emit(builder, *args)
                return context.get_dummy_value() if result is types.void else value

            if result is None:
                return arguments[0](*arguments), generate
            return result(*parameters), generate

        return intrinsic(functools.update_wrapper(typed, emit))

    return decorate


def _set_alias_scope(builder: ir.IRBuilder, access: Any, side: str) -> None:
    """Tell LLVM that reads, writes and sums of one iteration do not alias.

    This holds for calls in place, too: each element is read before it is written, and only then.
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


def _load(name: str, scoped: bool) -> Any:
    stored, number = _STORED[name], _NUMBA[name]

    @_intrinsic(number, types.int64, types.int64)
    def load(builder: ir.IRBuilder, address: Any, index: Any) -> Any:
        value = builder.load(_pointer(builder, address, index, stored))
        if scoped:
            _set_alias_scope(builder, value, "reads")
        if name == "bool":
            return builder.icmp_unsigned("!=", value, ir.Constant(_I8, 0))
        if name == "bfloat16":
            wide = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
            return builder.bitcast(wide, _F32)
        if name == "float16":
            return builder.fpext(builder.bitcast(value, ir.HalfType()), _F32)
        return value

    return load


def _store(name: str, side: str | None) -> Any:
    stored, number = _STORED[name], _NUMBA[name]

    @_intrinsic(types.void, types.int64, types.int64, number)
    def store(builder: ir.IRBuilder, address: Any, index: Any, value: Any) -> None:
        if name == "bool":
            value = builder.zext(value, _I8)
        elif name == "bfloat16":
            value = _rounded_to_bfloat16(builder, value)
        elif name == "float16":
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), _I16)
        access = builder.store(value, _pointer(builder, address, index, stored))
        if side is not None:
            _set_alias_scope(builder, access, side)

    return store


def _add_to(name: str) -> Any:
    stored, number = _STORED[name], _NUMBA[name]

    @_intrinsic(types.void, types.int64, types.int64, number)
    def add_to(builder: ir.IRBuilder, address: Any, index: Any, value: Any) -> None:
        """Add to an element of scratch memory."""
        pointer = _pointer(builder, address, index, stored)
        before = builder.load(pointer)
        after = builder.store(builder.fadd(before, value), pointer)
        for access in (before, after):
            _set_alias_scope(builder, access, "sums")

    return add_to


def _rounded_to_bfloat16(builder: ir.IRBuilder, value: Any) -> Any:
    """The upper half of a float32, rounded to nearest, ties to even; NaN stays NaN."""

    def number(n: int) -> ir.Constant:
        return ir.Constant(_I32, n)

    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(
        builder.lshr(builder.select(is_nan, number(0x7FC00000), rounded), number(16)), _I16
    )


def _transpose(name: str) -> Any:
    vector = ir.VectorType(_STORED[name], SIDE)

    @_intrinsic(types.void, types.int64, types.int64, types.int64, types.int64)
    def transpose(builder: ir.IRBuilder, source: Any, stride: Any, target: Any, width: Any) -> None:
        """Transpose a block of 8 by 8 in registers; the strides of rows are in bytes.

        Three rounds of shuffles swap elements between rows that are 4, 2 and 1 apart.
        """

        def row(address: Any, step: Any, r: int) -> Any:
            at = builder.add(address, builder.mul(step, ir.Constant(_I64, r)))
            return _pointer(builder, at, ir.Constant(_I64, 0), vector)

        size = SIZES[name]
        rows = [builder.load(row(source, stride, r), align=size) for r in range(SIDE)]
        for step in (4, 2, 1):
            for r in (r for r in range(SIDE) if not r & step):
                a, b = rows[r], rows[r + step]
                first = [j if not j & step else SIDE + j - step for j in range(SIDE)]
                second = [j + step if not j & step else SIDE + j for j in range(SIDE)]
                rows[r], rows[r + step] = (
                    builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, SIDE), order))
                    for order in (first, second)
                )
        for r in range(SIDE):
            builder.store(rows[r], row(target, width, r), align=size)

    return transpose


def _prefetch_line(builder: ir.IRBuilder, address: Any, to_write: bool) -> None:
    """Prefetch a cache line into L2; an invalid address is ignored."""
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    locality, data = ir.Constant(_I32, 2), ir.Constant(_I32, 1)
    at = builder.inttoptr(address, pointer)
    builder.call(prefetch, [at, ir.Constant(_I32, int(to_write)), locality, data])


@_intrinsic(types.void, types.int64)
def prefetch_read(builder: ir.IRBuilder, address: Any) -> None:
    """Prefetch a line that will be read."""
    _prefetch_line(builder, address, to_write=False)


@_intrinsic(types.void, types.int64)
def prefetch_write(builder: ir.IRBuilder, address: Any) -> None:
    """Prefetch a line that will be written."""
    _prefetch_line(builder, address, to_write=True)


def _prefetch_column(name: str) -> Any:
    @_intrinsic(types.void, types.int64)
    def prefetch_column(builder: ir.IRBuilder, address: Any) -> None:
        """Prefetch the cache lines of a tile's column that begins at this address."""
        for start in range(0, ROWS * SIZES[name], CACHE_LINE):
            line = builder.add(address, ir.Constant(_I64, start))
            _prefetch_line(builder, line, to_write=False)

    return prefetch_column


def _stream(name: str) -> Any:
    vector = ir.VectorType(_STORED[name], _NONTEMPORAL // SIZES[name])

    @_intrinsic(types.void, types.int64, types.int64)
    def stream(builder: ir.IRBuilder, source: Any, target: Any) -> None:
        """Copy a piece of a row with non-temporal stores; the target is aligned to a cache line."""
        nontemporal = builder.module.add_metadata([ir.Constant(_I32, 1)])
        count = PIECE * SIZES[name] // _NONTEMPORAL
        sources, targets = (
            [_pointer(builder, address, ir.Constant(_I64, i), vector) for i in range(count)]
            for address in (source, target)
        )
        values = [builder.load(pointer, align=_NONTEMPORAL) for pointer in sources]
        for pointer, value in zip(targets, values, strict=True):
            access = builder.store(value, pointer, align=_NONTEMPORAL)
            access.set_metadata("nontemporal", nontemporal)

    return stream


@_intrinsic(types.void)
def fence(builder: ir.IRBuilder) -> None:
    """Order all earlier stores, non-temporal ones too, before later ones."""
    builder.fence("seq_cst")


for _name in _STORED:
    globals()[f"prefetch_column_{_name}"] = _prefetch_column(_name)
    globals()[f"transpose_{_name}"] = _transpose(_name)
    globals()[f"stream_{_name}"] = _stream(_name)
    globals()[f"load_{_name}"] = _load(_name, scoped=True)
    globals()[f"store_{_name}"] = _store(_name, "writes")
    # Without alias scopes, for memory that the kernel writes and reads back.
    globals()[f"get_{_name}"] = _load(_name, scoped=False)
    globals()[f"put_{_name}"] = _store(_name, None)

for _name in ("float32", "float64"):
    globals()[f"add_to_{_name}"] = _add_to(_name)
    globals()[f"put_sum_{_name}"] = _store(_name, "sums")


@_intrinsic(types.int64, types.int64, types.int64, types.int64)
def fetch_add(builder: ir.IRBuilder, address: Any, index: Any, count: Any) -> Any:
    """Atomically add to an int64 and return its previous value (acquire and release)."""
    return builder.atomic_rmw("add", _pointer(builder, address, index, _I64), count, "acq_rel")


@_intrinsic(types.int64, types.int64)
def call_int(builder: ir.IRBuilder, function: Any) -> Any:
    """Call the C function at this address; it takes nothing and returns an `int`."""
    pointer = builder.inttoptr(function, ir.FunctionType(_I32, []).as_pointer())
    return builder.sext(builder.call(pointer, []), _I64)


@_intrinsic()
def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once."""
    return builder.fma(a, b, c)


@_intrinsic(types.int64, types.int64, types.int64)
def sdiv(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    """Rounded towards 0; traps (SIGFPE) for a division by 0, and of the smallest integer by -1."""
    return builder.sdiv(x, y)


@_intrinsic(types.int64, types.int64, types.int64)
def srem(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The remainder of `sdiv`; traps likewise."""
    return builder.srem(x, y)


@_intrinsic()
def fmod(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The remainder of ``x / y``, with the sign of x."""
    return builder.frem(x, y)


def _bitcast(source: Any, target: Any, stored: ir.Type) -> Any:
    return _intrinsic(target, source)(lambda builder, value: builder.bitcast(value, stored))


bits_of_float32 = _bitcast(types.float32, types.int32, _I32)
bits_of_float64 = _bitcast(types.float64, types.int64, _I64)
float32_of_bits = _bitcast(types.int32, types.float32, _F32)
float64_of_bits = _bitcast(types.int64, types.float64, _F64)


def _round(name: str) -> Any:
    @_intrinsic()
    def rounded(builder: ir.IRBuilder, x: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic(f"llvm.{name}", [x.type]), [x])

    return rounded


floor, ceil, trunc, rint = (_round(name) for name in ("floor", "ceil", "trunc", "rint"))
