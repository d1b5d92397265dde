"""Scheduler: the colours of our tasks on the dashboard, a hue for each layer.

By itself Dask takes a colour from a hash of the task's name, so that a layer's forward and its
backward have nothing in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from taskgrad.cluster import internals

# Light, middle and dark of each hue. Dask's own are red for transfers, orange for disks, black for
# errors.
_HUES = (
    ("#9ecae1", "#4292c6", "#084594"),  # blue
    ("#a1d99b", "#41ab5d", "#005a32"),  # green
    ("#cbc9e2", "#9e9ac8", "#54278f"),  # purple
    ("#dfc27d", "#bf812d", "#6b4108"),  # brown
    ("#9edae5", "#17becf", "#0b5f68"),  # cyan
    ("#d4b9da", "#df65b0", "#8e0152"),  # pink
    ("#dbdb8d", "#bcbd22", "#636300"),  # olive
    ("#d0d0d0", "#969696", "#404040"),  # grey
)
_SHADES = {"forward": 0, "weights": 1, "backward": 2}


def layer_colours() -> Callable[[str], str | None]:
    """A function from a task's name to its colour; None for one that is not of a layer.

    Hues are given out in the order in which layers are first seen, and then again.

    Examples
    --------
    >>> colour = layer_colours()
    >>> colour("forward:0"), colour("backward:0"), colour("forward:1"), colour("update:0")
    ('#9ecae1', '#084594', '#a1d99b', None)
    """
    hues: dict[str, int] = {}

    def colour(name: str) -> str | None:
        action, _, layer = str(name).partition(":")
        if not layer or action not in _SHADES:
            return None
        return _HUES[hues.setdefault(layer, len(hues)) % len(_HUES)][_SHADES[action]]

    return colour


@functools.cache
def apply() -> None:
    """Use these colours on the dashboards of this process."""
    internals.wrap_colours(layer_colours())
