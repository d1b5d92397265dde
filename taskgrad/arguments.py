"""What arguments have in common: whole numbers, and yes or no."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def whole(name: str, given: Any, least: int | None = None) -> int:
    """A whole number of any type: an int, one of numpy's, a tensor of one.

    Raises
    ------
    TypeError
        It is none; neither are booleans, nor 1.0.
    ValueError
        It is less than `least`.
    """
    try:
        if isinstance(given, bool | np.bool_) or str(getattr(given, "dtype", "")) == "torch.bool":
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} is a whole number; got {shown(given)}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is at least {least}; got {number}")
    return number


def flag(name: str, given: Any) -> bool:
    """True or False, of Python or numpy.

    Raises
    ------
    TypeError
        It is something else, though it may count as one of them.
    """
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} is True or False; got {shown(given)}")
    return bool(given)


def shown(given: Any) -> str:
    """A value as messages show it: short, with its type."""
    text = repr(given)
    kind = type(given).__name__
    return f"{text} ({kind})" if len(text) <= 60 and "\n" not in text else f"a {kind}"
