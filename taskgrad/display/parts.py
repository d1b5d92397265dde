"""Who holds what of a sharded tensor: as text, and as a strip of boxes in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from taskgrad.display.graph import COLOURS
from taskgrad.worker_names import WorkerName

_MOST = 8  # parts that a repr names
_WIDTH, _HEIGHT = 480, 28  # of the strip, in pixels


class Held(NamedTuple):
    """What a worker holds: its place along the axis, if there is one, its shape and its bytes."""

    worker: WorkerName
    start: int
    stop: int
    shape: tuple[int, ...]
    nbytes: int


def in_words(of: str, axis: int | None, held: Sequence[Held]) -> str:
    """One line: ``ShardedTensor(float32[4, 3], axis 0: 0:2 on a, 2:4 on b)``."""
    if axis is None:
        places = ", ".join(one.worker.short for one in held[:_MOST])
        shown = f"a copy on {places}"
    else:
        places = ", ".join(f"{p.start}:{p.stop} on {p.worker.short}" for p in held[:_MOST])
        shown = f"axis {axis}: {places}"
    more = len(held) - _MOST
    return f"ShardedTensor({of}, {shown}{f', and {more} more' if more > 0 else ''})"


def drawn(title: str, axis: int | None, held: Sequence[Held]) -> str:
    """HTML: a heading, a box for each part with the colour of its worker, and a table.

    Boxes are as long as their parts along the axis; copies of the whole are one below the other.
    """
    rows = "".join(
        f"<tr><td>{escape(str(one.worker))}</td><td>{_place(one, axis)}</td>"
        f"<td>{list(one.shape)}</td><td>{one.nbytes:,}</td></tr>"
        for one in held
    )
    along = "copy" if axis is None else f"axis {axis}"
    head = f"<tr><th>worker</th><th>{along}</th><th>shape</th><th>bytes</th></tr>"
    strip = _strip(axis, held)
    return f"<div><code>{escape(title)}</code><br>{strip}<table>{head}{rows}</table></div>"


def _place(one: Held, axis: int | None) -> str:
    return "all" if axis is None else f"{one.start}:{one.stop}"


def _strip(axis: int | None, held: Sequence[Held]) -> str:
    """The boxes, as SVG."""
    addresses = list(dict.fromkeys(one.worker.address for one in held))
    colours = {a: COLOURS[i % len(COLOURS)] for i, a in enumerate(addresses)}
    total = max(1, sum(one.stop - one.start for one in held))
    boxes, left, top = [], 0.0, 0
    for one in held:
        width = _WIDTH if axis is None else _WIDTH * (one.stop - one.start) / total
        name = escape(one.worker.short)
        boxes.append(
            f'<g><title>{escape(str(one.worker))}</title><rect x="{left:.0f}" y="{top}" '
            f'width="{width:.0f}" height="{_HEIGHT}" fill="{colours[one.worker.address]}" '
            f'stroke="#666666"/><text x="{left + width / 2:.0f}" y="{top + _HEIGHT / 2}" '
            'text-anchor="middle" dominant-baseline="central" font-size="12" '
            f'font-family="sans-serif">{name}: {_place(one, axis)}</text></g>'
        )
        if axis is None:
            top += _HEIGHT
        else:
            left += width
    high = max(top, _HEIGHT)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 2}" height="{high + 2}" '
        f'viewBox="-1 -1 {_WIDTH + 2} {high + 2}">{"".join(boxes)}</svg>'
    )
