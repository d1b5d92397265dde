"""The options of a `pmap`, checked: one level for each mapped axis."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from taskgrad.arguments import flag, shown, whole
from taskgrad.spmd.axes import check, check_out, is_axis, staying


@dataclass(frozen=True)
class Level:
    """One mapped axis: its name, its length if that was given, and the axes of the values.

    `static` are the positions of arguments that all ranks get whole.
    """

    axis_name: Hashable
    in_axes: Any
    out_axes: Any
    axis_size: int | None
    static: tuple[int, ...]


def level(
    axis_name: Hashable,
    in_axes: Any,
    out_axes: Any,
    axis_size: int | None,
    static: Any,
    gather: bool,
) -> Level:
    """One level, from `pmap`'s arguments; raises as that does."""
    if isinstance(axis_name, tuple | list):
        raise TypeError(
            f"pmap maps one axis; got the axis names {axis_name!r}. For several, map several "
            "times: tg.pmap(tg.pmap(f, 'j'), 'i')"
        )
    if not isinstance(axis_name, Hashable):
        raise TypeError(f"axis_name can be hashed, as a string can; got {shown(axis_name)}")
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if in_axes is not None and not isinstance(in_axes, tuple) and not is_axis(in_axes):
        raise TypeError(f"in_axes is an int, None or a tuple of an entry each; got {in_axes!r}")
    check(in_axes, "in_axes")
    check_out(out_axes)
    if not flag("gather", gather):
        out_axes = staying(out_axes)
    if axis_size is not None:
        axis_size = whole("axis_size", axis_size, least=1)
    return Level(axis_name, in_axes, out_axes, axis_size, _positions(static))


def check_names(names: Sequence[Hashable]) -> None:
    """Raise ValueError if two mapped axes have one name."""
    named = [name for name in names if name is not None]
    for name in named:
        if named.count(name) > 1:
            raise ValueError(
                f"two maps, one inside the other, have the axis name {name!r}: give each its own"
            )


def _positions(static: Any) -> tuple[int, ...]:
    given = static if isinstance(static, Iterable) else (static,)
    found = [whole("static_broadcasted_argnums", i) for i in given]
    if any(i < 0 for i in found):
        raise ValueError(f"static_broadcasted_argnums are positions from 0 on; got {shown(static)}")
    return tuple(found)
