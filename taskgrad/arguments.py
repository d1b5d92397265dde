"""Checks of arguments that many functions have: numbers, booleans, iterables."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np


def whole(name: str, given: Any, least: int | None = None) -> int:
    """A whole number as an int: an int, a NumPy integer, or an integer tensor of one element.

    Raises TypeError if it is not a whole number, as booleans and floats such as 1.0 are not;
    ValueError if it is less than `least`.
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
    """A boolean of Python or NumPy as a bool; TypeError if it is not one, as 0 and 1 are not."""
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} is True or False; got {shown(given)}")
    return bool(given)


def iterator(name: str, place: int, given: Any) -> Iterator[Any]:
    """An iterator over the items given to a function `name` at this place; TypeError if none."""
    try:
        return iter(given)
    except TypeError:
        raise TypeError(
            f"{name}: argument {place + 1} after the function is a {type(given).__name__}, "
            "which is not iterable"
        ) from None


def shown(given: Any) -> str:
    """A value in short, with its type, for messages."""
    text = repr(given)
    kind = type(given).__name__
    return f"{text} ({kind})" if len(text) <= 60 and "\n" not in text else f"a {kind}"
