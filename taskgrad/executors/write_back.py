"""Buffers that modules changed (batch norm's), written into those modules on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from taskgrad.errors import TaskgradError
from taskgrad.graph.calls import Call
from taskgrad.graph.leaves import Leaf


def write_back(changed: Iterable[tuple[Call, Sequence[torch.Tensor | None] | None]]) -> None:
    """For each call the new values of its buffers, None where one did not change, or for none.

    TaskgradError if a module ran twice.
    """
    written: dict[int, tuple[Leaf, torch.Tensor]] = {}
    for call, values in changed:
        for slot, value in zip(call.spec.buffers, values or (), strict=True):
            leaf = call.inputs[slot]
            if value is None or not isinstance(leaf, Leaf):
                continue
            if id(leaf.value) in written:
                raise TaskgradError(
                    f"module {call.title!r} ran twice in one graph and changed its buffers "
                    "each time: tg.spawn runs each call from the buffers on the driver. Put the "
                    "module in a tg.GraphChain, where its state lives on the worker"
                )
            written[id(leaf.value)] = leaf, value
    for leaf, value in written.values():
        leaf.write(value)
