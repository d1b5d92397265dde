"""torch's arithmetic where Numba's differs: integers, floor division, shifts, powers.

Nothing here traps, whatever the operands, since both branches of a conditional are computed. The
loop itself detects integer division by 0 (`ScalarCode.zero_division`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import int64, njit

from taskgrad.kernels.codegen import intrinsics as m

_inline = njit(forceinline=True, error_model="numpy")
_LOWEST = -(2**63)
_BELOW, _BEYOND, _ZERO = np.float32(-(2.0**63)), np.float32(2.0**63), np.float32(0)


@_inline
def divisor(y: Any) -> Any:
    """A divisor that does not trap: 1 in place of 0 and -1."""
    return y if (y != 0) & (y != -1) else 1


@_inline
def floordiv_int(x: Any, y: Any) -> Any:
    """The quotient rounded down; the smallest integer divided by -1 is itself."""
    x, y = int64(x), int64(y)
    d = divisor(y)
    q = m.sdiv(x, d)
    r = x - q * d
    q = q - 1 if (r != 0) & ((r < 0) != (d < 0)) else q
    return -q if y == -1 else q


@_inline
def mod_int(x: Any, y: Any) -> Any:
    """The remainder with the divisor's sign."""
    d = divisor(int64(y))
    r = m.srem(int64(x), d)
    return r + d if (r != 0) & ((r < 0) != (d < 0)) else r


@_inline
def fmod_int(x: Any, y: Any) -> Any:
    """The remainder with the dividend's sign."""
    return m.srem(int64(x), divisor(int64(y)))


@_inline
def lshift(x: Any, y: Any, bits: Any) -> Any:
    """0 if the distance is negative or not below the type's width."""
    fits = (y >= 0) & (y < bits)
    shifted = int64(x) << (int64(y) if fits else int64(0))
    return shifted if fits else int64(0)


@_inline
def rshift(x: Any, y: Any, last: Any) -> Any:
    """A distance that is negative or not below `last` counts as `last`: only the sign is left."""
    return int64(x) >> (int64(y) if (y >= 0) & (y < last) else int64(last))


@_inline
def pow_int(x: Any, y: Any) -> Any:
    """Integer power, which wraps around; a fraction, from a negative exponent, is truncated."""
    base, n = int64(x), int64(y)
    if n < 0:
        odd = -1 if n & 1 else 1
        return 1 if base == 1 else odd if base == -1 else 0
    result = int64(1)
    while n > 0:
        result = result * base if n & 1 else result
        base = base * base
        n >>= 1
    return result


@_inline
def to_int64(x: Any) -> Any:
    """Rounded towards 0; the smallest integer for NaN and out of range."""
    fits = (x >= _BELOW) & (x < _BEYOND)
    return int64(x if fits else _ZERO) if fits else int64(_LOWEST)


@_inline
def maximum(x: Any, y: Any) -> Any:
    """NaN if one of them is."""
    return x if (x >= y) | (x != x) else y


@_inline
def minimum(x: Any, y: Any) -> Any:
    """NaN if one of them is."""
    return x if (x <= y) | (x != x) else y


def _make(number: Any) -> dict[str, Callable[..., Any]]:
    """Floor division and its remainder, of float32 or float64."""
    zero, half, one = number(0), number(0.5), number(1)

    @_inline
    def mod(x: Any, y: Any) -> Any:
        r = m.fmod(x, y)
        return number(r + y) if (r != zero) & ((y < zero) != (r < zero)) else r

    @_inline
    def floordiv(x: Any, y: Any) -> Any:
        r = m.fmod(x, y)
        q = number(number(x - r) / y)
        q = number(q - one) if (r != zero) & ((y < zero) != (r < zero)) else q
        whole = m.floor(q)
        whole = number(whole + one) if number(q - whole) > half else whole
        ratio = number(x / y)
        whole = whole if q != zero else number(math.copysign(zero, ratio))
        return ratio if y == zero else whole

    return {"mod": mod, "floordiv": floordiv}


for _number in (np.float32, np.float64):
    for _name, _function in _make(_number).items():
        globals()[f"{_name}_{_number.__name__}"] = _function
