"""Who holds what of a sharded tensor: as text, and as a strip of boxes in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from taskgrad.display.graph import COLOURS
from taskgrad.worker_names import WorkerName

_MOST = 8  # parts that a repr names
_WIDTH = 480  # of the strip, in pixels
_STYLE = "height:2.2em;line-height:2.2em;text-align:center;color:#222;border:1px solid #666"


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
    addresses = list(dict.fromkeys(one.worker.address for one in held))
    colours = {a: COLOURS[i % len(COLOURS)] for i, a in enumerate(addresses)}
    total = max(1, sum(one.stop - one.start for one in held))
    boxes = []
    for one in held:
        width = _WIDTH if axis is None else _WIDTH * (one.stop - one.start) / total
        place = "all" if axis is None else f"{one.start}:{one.stop}"
        boxes.append(
            f'<div title="{escape(str(one.worker))}" style="{_STYLE};width:{width:.0f}px;'
            f'overflow:hidden;background:{colours[one.worker.address]}">'
            f"{escape(one.worker.short)}: {place}</div>"
        )
    way = "block" if axis is None else "flex"
    strip = f'<div style="display:{way};margin:0.4em 0">{"".join(boxes)}</div>'
    rows = "".join(
        f"<tr><td>{escape(str(one.worker))}</td>"
        f"<td>{'all' if axis is None else f'{one.start}:{one.stop}'}</td>"
        f"<td>{list(one.shape)}</td><td>{one.nbytes:,}</td></tr>"
        for one in held
    )
    along = "copies" if axis is None else f"axis {axis}"
    head = f"<tr><th>worker</th><th>{along}</th><th>shape</th><th>bytes</th></tr>"
    return f"<div><code>{escape(title)}</code>{strip}<table>{head}{rows}</table></div>"
