"""exp, log, tanh and the like without branches, so that LLVM can vectorise loops that call them.

Numba's `math.exp` in a loop is a library call for each element. The methods are the textbook ones:
argument reduction, a polynomial in fused multiply-adds, scaling by a power of two. All are within
2.5 units in the last place, and have the same bits in vector registers and in scalar ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class _Format(NamedTuple):
    """A floating point format, and the constants of its functions."""

    number: Any  # NumPy's type
    whole: Any  # its integer of the same size
    bits_of: Any  # reinterpret one as the other
    of_bits: Any
    mantissa: int  # bits
    bias: int  # of the exponent
    ln2: tuple[float, float]  # in two parts; multiples of the first by an exponent are exact
    limits: tuple[int, int]  # e**x is 0 below the first, infinite above the second
    terms: int  # Taylor terms of e**r beyond 1 + r, for 0.1 ulp where |r| <= ln(2)/2


_FLOAT32 = _Format(
    *(np.float32, np.int32, bits_of_float32, float32_of_bits, 23, 127),
    *((0.693145751953125, 1.42860682030941723212e-06), (-104, 89), 7),
)
_FLOAT64 = _Format(
    *(np.float64, np.int64, bits_of_float64, float64_of_bits, 52, 1023),
    *((6.93147180369123816490e-01, 1.90821492927058770002e-10), (-746, 710), 12),
)


def _polynomial(number: Any, coefficients: Sequence[float]) -> Callable[..., Any]:
    """A polynomial by Horner's rule in fused multiply-adds; the highest power's coefficient first.

    As generated source: Numba compiles one expression faster than nested functions.
    """
    constants = {f"c{k}": number(value) for k, value in enumerate(coefficients)}
    first, *others = constants
    text = first
    for name in others:
        text = f"fma({text}, x, {name})"
    return _inline(eval(f"lambda x: {text}", {"fma": fma, **constants}))


def _exponentials(f: _Format) -> dict[str, Callable[..., Any]]:
    number, whole, bits_of, of_bits = f.number, f.whole, f.bits_of, f.of_bits
    bias, shift = whole(f.bias), whole(f.mantissa)
    # Adding this rounds to an integer, which is then in the low bits.
    magic = number(1.5 * 2.0**f.mantissa)
    log2_e = number(1 / math.log(2))
    ln2_high, ln2_low = map(number, f.ln2)
    lowest, highest = map(number, f.limits)
    one, two, zero = number(1), number(2), number(0)
    # (e**r - 1 - r) / r**2
    tail = _polynomial(number, [1 / math.factorial(k) for k in range(f.terms + 1, 1, -1)])

    @_inline
    def power_of_two(k: Any) -> Any:
        return of_bits(whole(whole(k + bias) << shift))

    @_inline
    def reduced(x: Any) -> Any:
        """k and e**r - 1, where x = k ln 2 + r."""
        c = x if x > lowest else lowest  # for NaN, too
        c = c if c < highest else highest
        shifted = number(fma(c, log2_e, magic))
        n = number(shifted - magic)
        k = whole(bits_of(shifted) - bits_of(magic))
        r = fma(n, -ln2_low, fma(n, -ln2_high, c))
        return k, fma(number(r * r), tail(r), r)

    @_inline
    def exp(x: Any) -> Any:
        k, p = reduced(x)
        p = number(p + one)
        # Scale in two steps, since 2**k can be out of range where the result is not. The first
        # stays in range, so it is added to the exponent.
        a = whole(k >> whole(1))
        p = of_bits(whole(bits_of(p) + whole(a << shift)))
        y = number(p * power_of_two(whole(k - a)))
        return y if x == x else x

    @_inline
    def expm1(x: Any) -> Any:
        k, p = reduced(x)
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

    return {"exp": exp, "expm1": expm1, "tanh": tanh}


_LOG = (
    *(1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01),
    *(2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01),
    6.666666666666735130e-01,
)


def _logarithms(f: _Format) -> dict[str, Callable[..., Any]]:
    number, whole, bits_of, of_bits = f.number, f.whole, f.bits_of, f.of_bits
    shift, scaled_by = whole(f.mantissa), number(f.mantissa + 2)
    ln2_high, ln2_low = map(number, f.ln2)
    half, one, two, zero = number(0.5), number(1), number(2), number(0)
    infinity, not_a_number = number(math.inf), number(math.nan)
    smallest, scale_up = number(np.finfo(number).tiny), number(2.0 ** (f.mantissa + 2))
    root_half = whole(np.array(math.sqrt(0.5), number).view(whole).item())
    fraction = whole((1 << f.mantissa) - 1)
    polynomial = _polynomial(number, _LOG)

    @_inline
    def log(x: Any) -> Any:
        small = x < smallest
        m = number(x * scale_up) if small else x
        # The exponent for which the mantissa is between sqrt(1/2) and sqrt(2).
        bits = whole(bits_of(m) - root_half)
        n = number(whole(bits >> shift))
        n = number(n - scaled_by) if small else n
        m = of_bits(whole(whole(bits & fraction) + root_half))
        f = number(m - one)
        s = number(f / number(two + f))
        z = number(s * s)
        p = number(polynomial(z) * z)
        h = number(number(half * f) * f)
        y = fma(s, number(h + p), number(n * ln2_low))
        y = number(number(n * ln2_high) - number(number(h - y) - f))
        y = y if x < infinity else x  # infinity and NaN
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

    return {"log": log, "log1p": log1p}


for _format in (_FLOAT32, _FLOAT64):
    for _name, _function in {**_exponentials(_format), **_logarithms(_format)}.items():
        globals()[f"{_name}_{_format.number.__name__}"] = _function

exp_float32: Any = globals()["exp_float32"]
_f = np.float32
_A0, _A1, _A2, _A3 = _f(-1.72853470e-5), _f(3.83197126e-4), _f(-3.88396438e-3), _f(2.42546219e-2)
_A4, _A5, _A6 = _f(-1.06777877e-1), _f(-6.34846687e-1), _f(-1.28717512e-1)
_B = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_near = _polynomial(_f, _B)
_NEAR, _ONE = _f(0.927734375), _f(1)


@_inline
def erf_float32(a: Any) -> Any:
    """The error function, by a polynomial near zero and by log(1 - erf) further out."""
    t, s = abs(a), np.float32(a * a)
    r, u = fma(_A0, t, _A1), fma(_A2, t, _A3)
    r = fma(r, s, u)
    r = fma(r, t, _A4)
    r = fma(r, t, _A5)
    r = fma(r, t, _A6)
    r = fma(r, t, -t)
    far = np.float32(math.copysign(np.float32(_ONE - exp_float32(r)), a))
    near = fma(_near(s), a, a)
    far = far if t > _NEAR else near
    return far if a == a else a
