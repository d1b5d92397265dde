"""A map inside a rank of another: its ranks are threads of that rank's task.

Each is a rank like any other, with the axes around it too: of collectives over those the ranks of
all tasks take part. For the autograd graph of the rank around them they are one function. Its
backward runs a thread for each again, in which their collectives meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from taskgrad.autograd import Recording, record
from taskgrad.graph.calls import Call, ProcessGroup
from taskgrad.graph.cotangents import Gradient, add
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.mesh import Mesh
from taskgrad.graph.pytree import Structure, cotangents, flatten
from taskgrad.graph.torch_settings import refuse_modes
from taskgrad.spmd.calls import rank_calls
from taskgrad.spmd.levels import check_names
from taskgrad.spmd.splitting import Split
from taskgrad.worker.backward import Backward
from taskgrad.worker.communicator import Communicator
from taskgrad.worker.forward import Forward
from taskgrad.worker.mailbox import GroupAborted
from taskgrad.worker.rank_threads import RankJob, join_all, run_together
from taskgrad.worker.store import Store, buffers_key
from taskgrad.worker_names import WorkerName


def run_inside(
    outer: Communicator, fn: Callable[..., Any], title: str, inner: Mesh, split: Split
) -> list[Any]:
    """Run the ranks of a map over the axes `inner`; what each has returned, as `rank_calls` says.

    Its tensors are part of the autograd graph of the rank `outer`. Raises ValueError if an axis
    around it has a name of one of its own; TaskgradError inside a transform of ``torch.func``,
    which does not reach threads; GroupAborted if a rank fails.
    """
    what = f"pmap of {title!r}"
    refuse_modes(what, process=False)
    around = outer.rank.group
    mesh = around.mesh.inside(inner)
    check_names(mesh.names)
    workers = tuple([worker for worker in around.workers for _ in range(inner.size)])
    seed = int(torch.randint(2**62, (), device="cpu"))
    group = ProcessGroup(title, mesh, workers, seed, around.deadline, around.client)
    keys = outer.inner_keys(what, inner.size)
    first = outer.index * inner.size
    own = slice(first, first + inner.size)
    calls = rank_calls(fn, split, group, first, keys[own], keys, split.parts)
    leaves = {leaf: leaf.value for call in calls for leaf in call.inputs if isinstance(leaf, Leaf)}
    inside = _Inside(outer, what, workers[first], calls)
    values = inside.forward()
    inside.write_buffers()
    inputs = {leaf: value for leaf, value in leaves.items() if leaf.needs_grad}
    if torch.is_grad_enabled() and (inputs or inside.has_collectives()):
        inside.attach(values, inputs)
    return values


class _Inside(Recording):
    """The ranks of one map inside a rank. Their tapes are in a store of its own."""

    _inputs: list[Leaf]
    _structures: list[Structure]
    _attached: list[list[int]]  # for each rank the leaves that have a gradient

    def __init__(
        self, outer: Communicator, what: str, worker: WorkerName, calls: Sequence[Call]
    ) -> None:
        self._outer = outer
        self._what = what
        self._calls = calls
        self._store = Store(worker, "")
        self._store.mailboxes = outer.mailboxes

    def forward(self) -> list[Any]:
        """Run them; what each has returned, detached."""
        grad = torch.is_grad_enabled()  # a rank of another task may want a tape of this one
        jobs = [
            _Job(call, Forward(call.spec, grad, bool(call.spec.buffers)), _sent(call))
            for call in self._calls
        ]
        return _run_all(jobs, self._store, self._outer)

    def write_buffers(self) -> None:
        """Write buffers that a module has changed, those of the first rank, into that module."""
        call = self._calls[0]
        if call.spec.buffers:
            values = self._store.pop(buffers_key(call.key))
            for slot, value in zip(call.spec.buffers, values, strict=True):
                leaf = call.inputs[slot]
                if value is not None and isinstance(leaf, Leaf):
                    leaf.write(value)

    def has_collectives(self) -> bool:
        """True if a collective of a rank was recorded for a backward."""
        tapes = [self._store.tape(call.key, keep=True) for call in self._calls]
        found = [tape.communicator for tape in tapes]
        return any(comm is not None and comm.token is not comm.start for comm in found)

    def attach(self, values: list[Any], inputs: dict[Leaf, torch.Tensor]) -> None:
        """Make the tensors of these values functions of the inputs."""
        self._inputs = list(inputs)
        self._structures = [flatten(value)[1] for value in values]
        self._attached = [[i for i, flag in enumerate(flags) if flag] for _, _, flags in values]
        at = [(value[0], i) for value, of in zip(values, self._attached, strict=True) for i in of]
        comm = self._outer
        outputs = [comm.token.detach().clone(), *(leaves[i] for leaves, i in at)]
        comm.token, *found = record(self, outputs, [comm.token, *inputs.values()])
        for (leaves, i), value in zip(at, found, strict=True):
            leaves[i] = value

    def backward(self, grads: Sequence[Gradient], retain: bool) -> list[Gradient]:
        """Gradients of the token and the inputs, summed over the ranks in their order."""
        rest = iter(grads[1:])
        keys = self._outer.inner_keys(f"the backward of {self._what}", len(self._calls))
        first = self._outer.index * len(self._calls)
        jobs, wanted = [], []
        for at, call in enumerate(self._calls):
            structure = self._structures[at]
            given: list[Any] = [None] * structure.count
            for i in self._attached[at]:
                given[i] = next(rest)
            slots = tuple([i for i, leaf in enumerate(call.inputs) if leaf.needs_grad])
            back = Backward(
                key=keys[first + at],
                token=call.key,
                title=call.title,
                sources=(0,),
                wanted=slots,
                retain=retain,
                peers=tuple(keys),
            )
            wanted.append(slots)
            jobs.append(_Job(call, back, [cotangents(given, structure)]))
        found: dict[Any, Gradient] = {}
        results = _run_all(jobs, self._store, self._outer)
        for call, slots, result in zip(self._calls, wanted, results, strict=True):
            parts = (result,) if len(slots) == 1 else result
            for slot, part in zip(slots, parts, strict=True):
                leaf = call.inputs[slot]
                found[leaf] = add(found.get(leaf), part)
        return [torch.zeros_like(self._outer.start), *(found.get(leaf) for leaf in self._inputs)]


@dataclass(frozen=True)
class _Job:
    """What one thread does: an action of one rank, with its values."""

    call: Call
    action: Forward | Backward
    values: list[Any]


def _sent(call: Call) -> list[Any]:
    return [leaf.sent() for leaf in call.inputs if isinstance(leaf, Leaf)]


def _run_all(jobs: Sequence[_Job], store: Store, outer: Communicator) -> list[Any]:
    """Run each job in a thread; their results. Raises GroupAborted if one fails."""
    together = []
    for job in jobs:
        assert job.call.settings is not None
        together.append(RankJob(partial(job.action.run, store, *job.values), job.call.settings))
    outer.keep_no_thread()  # other tasks may run in it meanwhile
    results, error = run_together(together, store.worker, join_all)
    if error is not None:
        raise GroupAborted(error)
    return results
