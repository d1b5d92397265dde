"""Parts of sharded tensors: values that stay in a worker's store, and calls that make and use them.

A part is kept under the key of the call that made it, for as long as the driver has its `KeptPart`.
A call that reads one has no edge to that one in Dask's graph: else the scheduler would keep every
step of a loop, to run it again, for as long as the newest result is there. So what makes a part has
to have run before anything that reads it is submitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskgrad.graph.calls import Call
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.torch_settings import refuse_modes, settings_now

Cut = tuple[int | slice | None, ...]
"""An index of a tensor: what of a part is read."""


@dataclass(frozen=True)
class StoredPart:
    """What of a worker's store an input of a call is: a value under `key`, and what of that."""

    key: str
    position: int = 0
    cut: Cut = ()


class KeptPart(Node):
    """A part that a worker keeps; while this exists on the driver it does."""

    __slots__ = ()


class PartView(Node):
    """A part, or what `cut` leaves of it, as an input of a call on the same worker.

    `source` made it: the node is kept, so that the part is there when the call runs.
    """

    __slots__ = ("source", "stored")

    def __init__(self, source: Node, position: int = 0, cut: Cut = ()) -> None:
        super().__init__(new_key("part"), source.worker)
        self.source = source
        self.stored = StoredPart(source.key, position, cut)


class KeptCall(Call):
    """A call whose output stays: its value on the driver is the output's description."""

    __slots__ = ()


class PartCall(Node):
    """A function of `taskgrad.worker` on one worker, of the values of `inputs`.

    It is called with the store and these values; `arguments` are its keyword arguments as plain
    data. If its result `stays`, a tensor, it is a part, and this node's value its shape and dtype.
    """

    __slots__ = ("arguments", "function", "stays")

    def __init__(
        self,
        function: Callable[..., Any],
        worker: str,
        inputs: Sequence[Node],
        arguments: Mapping[str, Any],
        *,
        stays: bool,
        title: str,
    ) -> None:
        refuse_modes(title)
        # The default device is none of these tensors'.
        settings = settings_now().without_device()
        super().__init__(new_key(title), worker, inputs, settings=settings)
        self.function = function
        self.arguments = dict(arguments)
        self.stays = stays
