"""exp, log, tanh and their like without branches, so that LLVM computes sixteen at a time.

Numba's own `math.exp` in a loop is a call for each element. The methods are the textbook ones:
reduce the argument, a polynomial in fused multiply-adds, put the exponent back. All are within 2.5
units in the last place, and the same in a vector and alone: nothing is the compiler's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from taskgrad.kernels.codegen.intrinsics import (
    bits_of_float32,
    bits_of_float64,
    float32_of_bits,
    float64_of_bits,
    fma,
)

_inline = njit(forceinline=True, error_model="numpy")


def _make(number: Any, whole: Any) -> dict[str, Callable[..., Any]]:
    """The functions for float32 or float64."""
    single = number is np.float32
    mantissa = 23 if single else 52
    bias = whole(127 if single else 1023)
    bits_of = bits_of_float32 if single else bits_of_float64
    of_bits = float32_of_bits if single else float64_of_bits
    # Adding this rounds to a whole number, which is then in the low bits.
    magic = number(1.5 * 2.0**mantissa)
    log2_e = number(1 / math.log(2))
    # ln 2 in two parts, the first short enough that a multiple of it is exact.
    ln2_high = number(0.693145751953125 if single else 6.93147180369123816490e-01)
    ln2_low = number(1.42860682030941723212e-06 if single else 1.90821492927058770002e-10)
    lowest, highest = number(-104 if single else -746), number(89 if single else 710)
    shift = whole(mantissa)
    half, one, two, zero = number(0.5), number(1), number(2), number(0)
    # 1/2!, 1/3!, ...: on |r| <= ln(2)/2 the rest is below a tenth of the last place.
    e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13 = (
        number(1 / math.factorial(k)) for k in range(2, 14)
    )
    infinity, not_a_number = number(math.inf), number(math.nan)

    if single:

        @_inline
        def tail(r: Any) -> Any:
            """(e**r - 1 - r) / r**2."""
            p = fma(e8, r, e7)
            p = fma(p, r, e6)
            p = fma(p, r, e5)
            p = fma(p, r, e4)
            p = fma(p, r, e3)
            return fma(p, r, e2)

    else:

        @_inline
        def tail(r: Any) -> Any:
            """(e**r - 1 - r) / r**2."""
            p = fma(e13, r, e12)
            p = fma(p, r, e11)
            p = fma(p, r, e10)
            p = fma(p, r, e9)
            p = fma(p, r, e8)
            p = fma(p, r, e7)
            p = fma(p, r, e6)
            p = fma(p, r, e5)
            p = fma(p, r, e4)
            p = fma(p, r, e3)
            return fma(p, r, e2)

    @_inline
    def power_of_two(k: Any) -> Any:
        return of_bits(whole(whole(k + bias) << shift))

    @_inline
    def exp(x: Any) -> Any:
        c = x if x > lowest else lowest  # also where x is not a number
        c = c if c < highest else highest
        shifted = number(fma(c, log2_e, magic))
        n = number(shifted - magic)
        k = whole(bits_of(shifted) - bits_of(magic))
        r = fma(n, -ln2_high, c)
        r = fma(n, -ln2_low, r)
        p = fma(number(r * r), tail(r), r)
        p = number(p + one)
        # In two steps, since the power itself can be out of range where the result is not; the
        # first cannot leave the range, and is added to the exponent.
        a = whole(k >> whole(1))
        p = of_bits(whole(bits_of(p) + whole(a << shift)))
        y = number(p * power_of_two(whole(k - a)))
        return y if x == x else x

    @_inline
    def expm1(x: Any) -> Any:
        c = x if x > lowest else lowest
        c = c if c < highest else highest
        shifted = number(fma(c, log2_e, magic))
        n = number(shifted - magic)
        k = whole(bits_of(shifted) - bits_of(magic))
        r = fma(n, -ln2_high, c)
        r = fma(n, -ln2_low, r)
        p = fma(number(r * r), tail(r), r)
        # 2**k e**r - 1 = 2**k p + (2**k - 1), of which the second is exact where it matters.
        a = whole(k >> whole(1))
        first, second = power_of_two(a), power_of_two(whole(k - a))
        scale = number(first * second)
        near = fma(scale, p, number(scale - one))
        far = number(number(number(p + one) * first) * second)
        y = near if k < bias else number(far - one)
        y = y if x != zero else x  # keeps the sign of zero
        return y if x == x else x

    @_inline
    def tanh(x: Any) -> Any:
        size = abs(x)
        t = expm1(number(-two * size))
        y = number(-t / number(t + two))
        y = y if size > zero else size
        return number(math.copysign(y, x)) if x == x else x

    smallest = number(np.finfo(number).tiny)
    scale_up = number(2.0 ** (25 if single else 54))
    scaled_by = number(25 if single else 54)
    root_half = whole(np.array(math.sqrt(0.5), number).view(whole).item())
    fraction = whole((1 << mantissa) - 1)
    l1 = number(6.666666666666735130e-01)
    l2 = number(3.999999999940941908e-01)
    l3 = number(2.857142874366239149e-01)
    l4 = number(2.222219843214978396e-01)
    l5 = number(1.818357216161805012e-01)
    l6 = number(1.531383769920937332e-01)
    l7 = number(1.479819860511658591e-01)

    @_inline
    def log(x: Any) -> Any:
        small = x < smallest
        m = number(x * scale_up) if small else x
        # The exponent such that the mantissa is from sqrt(1/2) to sqrt(2).
        bits = whole(bits_of(m) - root_half)
        n = number(whole(bits >> shift))
        n = number(n - scaled_by) if small else n
        m = of_bits(whole(whole(bits & fraction) + root_half))
        f = number(m - one)
        s = number(f / number(two + f))
        z = number(s * s)
        p = fma(l7, z, l6)
        p = fma(p, z, l5)
        p = fma(p, z, l4)
        p = fma(p, z, l3)
        p = fma(p, z, l2)
        p = fma(p, z, l1)
        p = number(p * z)
        h = number(number(half * f) * f)
        y = fma(s, number(h + p), number(n * ln2_low))
        y = number(number(n * ln2_high) - number(number(h - y) - f))
        y = y if x < infinity else x  # infinity and not a number
        y = y if x > zero else -infinity
        return y if x >= zero else not_a_number

    @_inline
    def log1p(x: Any) -> Any:
        u = number(one + x)
        lost = number(x - number(u - one))
        y = number(log(u) + number(lost / u))
        y = y if u < infinity else log(u)
        y = y if u > zero else log(u)
        return y if u != one else x

    return {"exp": exp, "expm1": expm1, "tanh": tanh, "log": log, "log1p": log1p}


for _number, _whole in ((np.float32, np.int32), (np.float64, np.int64)):
    for _name, _function in _make(_number, _whole).items():
        globals()[f"{_name}_{_number.__name__}"] = _function

exp_float32: Any = globals()["exp_float32"]
_f = np.float32
_A0, _A1, _A2 = _f(-1.72853470e-5), _f(3.83197126e-4), _f(-3.88396438e-3)
_A3, _A4, _A5, _A6 = _f(2.42546219e-2), _f(-1.06777877e-1), _f(-6.34846687e-1), _f(-1.28717512e-1)
_B0, _B1, _B2 = _f(-5.96761703e-4), _f(4.99119423e-3), _f(-2.67681349e-2)
_B3, _B4, _B5 = _f(1.12819925e-1), _f(-3.76125336e-1), _f(1.28379166e-1)
_NEAR, _ONE = _f(0.927734375), _f(1)


@_inline
def erf_float32(a: Any) -> Any:
    """The error function, by one polynomial near zero and the logarithm of 1 - erf further out."""
    t, s = abs(a), np.float32(a * a)
    r, u = fma(_A0, t, _A1), fma(_A2, t, _A3)
    r = fma(r, s, u)
    r = fma(r, t, _A4)
    r = fma(r, t, _A5)
    r = fma(r, t, _A6)
    r = fma(r, t, -t)
    far = np.float32(math.copysign(np.float32(_ONE - exp_float32(r)), a))
    p = fma(_B0, s, _B1)
    p = fma(p, s, _B2)
    p = fma(p, s, _B3)
    p = fma(p, s, _B4)
    p = fma(p, s, _B5)
    near = fma(p, a, a)
    far = far if t > _NEAR else near
    return far if a == a else a
