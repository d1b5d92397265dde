"""Run the steps of a stage of a model's graph, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from taskgrad.errors import LayerError
from taskgrad.graph.calls import CallSpec
from taskgrad.graph.functions import Template
from taskgrad.graph.layer_graph import Expected
from taskgrad.graph.pytree import flatten, map_leaves
from taskgrad.graph.segments import Segment, SegmentStep
from taskgrad.graph.torch_settings import thread_settings
from taskgrad.remote_errors import shorten
from taskgrad.worker.activation_checkpoint import recomputed
from taskgrad.worker.failures import forward_error
from taskgrad.worker.mailbox import GroupAborted
from taskgrad.worker.randomness import may_draw, random_stream
from taskgrad.worker.settings import in_thread
from taskgrad.worker.shard import ResidentShard
from taskgrad.worker.sync_norm import synchronized
from taskgrad.worker_names import WorkerName

Values = dict[int, Any]


class SegmentRun:
    """One run of the segment of a call, whose inputs are taken out of `fed`.

    No value is kept for longer than a step needs it, but by autograd.
    """

    def __init__(
        self, call: CallSpec, worker: WorkerName, shard: ResidentShard, fed: list[Any]
    ) -> None:
        self._call = call
        self._worker = worker
        self._shard = shard
        self._segment = Segment.of(call.segment)
        self._values: Values = {}
        for slot, value in enumerate(self._segment.inputs):
            self._values[value], fed[slot] = fed[slot], None

    @property
    def count(self) -> int:
        """The number of its steps."""
        return len(self._segment.steps)

    def output(self, recompute: Sequence[tuple[int, int]]) -> Any:
        """Run all steps; those in a range of `recompute` run once more in the backward."""
        segment, values = self._segment, self._values
        ranges = dict(recompute)
        at = 0
        while at < self.count:
            stop = ranges.get(at)
            if stop is None:
                self._step(at, values)
                stop = at + 1
            else:
                self._again(at, stop, values)
            for number in (v for drops in segment.drops[at:stop] for v in drops):
                values.pop(number, None)
            at = stop
        return segment.result(values)

    def _again(self, start: int, stop: int, values: Values) -> None:
        """Run a range of steps, of which only the inputs are kept for the backward."""
        takes, gives = self._segment.takes(start, stop), self._segment.gives(start, stop)

        def run(*given: Any) -> tuple[Any, ...]:
            own = dict(zip(takes, given, strict=True))
            for i in range(start, stop):
                self._step(i, own)
                for number in self._segment.drops[i]:
                    own.pop(number, None)
            return tuple([own[v] for v in gives])

        layers = self._shard.stage(self._call.steps[start:stop]).layers
        found = recomputed(run, layers, *[values[v] for v in takes])
        values.update(zip(gives, found, strict=True))

    def _step(self, number: int, values: Values) -> None:
        """Run one step, and add the values that it gives."""
        step = self._segment.steps[number]
        index, name, kind = self._call.steps[number]
        if isinstance(step.target, str):
            [(_, value)] = step.results
            values[value] = _tensor(self._shard.layers[index], step.target)
            return
        args, kwargs = Template.of(step.template).fill(values)
        fn = self._shard.layers[index] if step.target is None else step.function
        if step.target is not None and self._shard.device.type != "cpu":
            args, kwargs = map_leaves(self._device_here, (args, kwargs))
        try:
            with self._settings(step), self._stream(fn, name), synchronized(fn, name, number):
                result = fn(*args, **kwargs)
            leaves = [result] if type(result) is torch.Tensor else flatten(result)[0]
            written = flatten((args, kwargs))[0] if step.arguments_written else []
        except GroupAborted:
            raise
        except BaseException as error:
            raise forward_error(
                error, self._worker, name, kind, (args, kwargs), self._call.draw
            ) from error
        if step.expected is not None:
            self._check(step.expected, leaves, name, kind)
        for position, value in step.results:
            values[value] = leaves[position]
        for position, value in step.arguments_written:
            values[value] = written[position]

    def _device_here(self, leaf: Any) -> Any:
        """The shard's device in place of the one that the driver's model was on.

        A forward says ``mask.to(x.device)``, and was followed where that was the CPU.
        """
        is_drivers = isinstance(leaf, torch.device) and leaf.type in ("cpu", "meta")
        return self._shard.device if is_drivers else leaf

    def _settings(self, step: SegmentStep) -> AbstractContextManager[None]:
        if not step.settings:
            return nullcontext()
        return in_thread(replace(thread_settings(), **step.settings), self._worker)

    def _stream(self, fn: Any, name: str) -> AbstractContextManager[None]:
        draw = self._call.draw
        return random_stream(*draw, name) if draw is not None and may_draw(fn) else nullcontext()

    def _check(self, expected: Expected, leaves: list[Any], name: str, kind: str) -> None:
        """Raise LayerError unless a result is like the one that the model was captured with."""
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in leaves]
        others = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        if shapes == list(expected.shapes) and _same(others, expected.others):
            return
        pairs = zip(expected.shapes, expected.others, strict=True)
        raise LayerError(
            f"layer {name!r} ({kind}) on worker {self._worker} gave "
            f"{', '.join(map(_shown, leaves))}, and "
            f"{', '.join(_shown(x) if s is None else str(list(s)) for s, x in pairs)} when the "
            "model's forward was followed: what the forward made of that would be wrong. Name the "
            "part of the model that uses it in keep_together=, so that it runs whole on its worker",
            name,
            self._worker.address,
            None,
        )


def _tensor(layer: nn.Module, name: str) -> Any:
    """A parameter or buffer by its name in a layer: itself, so that its gradient is its own."""
    inner, _, name = name.rpartition(".")
    return getattr(layer.get_submodule(inner), name)


def _shown(leaf: Any) -> str:
    return str(list(leaf.shape)) if isinstance(leaf, torch.Tensor) else shorten(repr(leaf))


def _same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """True if these are equal, one by one; objects that are compared by identity if they are alike.

    They are of one type then.
    """
    if len(found) != len(expected):
        return False
    for ours, theirs in zip(found, expected, strict=True):
        kind: Any = type(ours)
        try:
            equal = bool(ours == theirs)
        except Exception:
            equal = False
        by_identity = "__eq__" not in {n for c in kind.__mro__[:-1] for n in vars(c)}
        if not equal and not (by_identity and kind is type(theirs)):
            return False
    return True
