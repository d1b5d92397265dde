"""A parallel map: one function, one rank for each index of an axis, as JAX's pmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from distributed import Client

from taskgrad import autograd
from taskgrad.cluster.config import deadline
from taskgrad.cluster.nested import current_worker
from taskgrad.cluster.session import Session, session
from taskgrad.errors import TaskgradError
from taskgrad.executors.kept_leaves import kept_leaves_of
from taskgrad.executors.rank_calls import run_ranks
from taskgrad.executors.registry import executor_of
from taskgrad.graph.calls import Call, ProcessGroup, Rank
from taskgrad.graph.layers import kind_of
from taskgrad.graph.mesh import Mesh
from taskgrad.graph.nodes import new_key
from taskgrad.graph.parts import KeptCall
from taskgrad.spmd.axes import stays
from taskgrad.spmd.calls import as_there, rank_calls
from taskgrad.spmd.joining import together
from taskgrad.spmd.levels import Level, check_names, level
from taskgrad.spmd.nested import run_inside
from taskgrad.spmd.splitting import Split
from taskgrad.spmd.staying import staying_outputs
from taskgrad.thunk import Lazy
from taskgrad.worker.communicator import running
from taskgrad.worker_names import WorkerName


def pmap(
    fn: Callable[..., Any],
    axis_name: Hashable = None,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    static_broadcasted_argnums: int | Sequence[int] = (),
    axis_size: int | None = None,
    gather: bool = True,
    client: Client | None = None,
) -> Callable[..., Any]:
    """Map a function over an axis, with one rank for each index: JAX's ``pmap``.

    Each call splits the arguments along their mapped axes, runs ``fn`` once for each index, and
    stacks the results. These runs are the *ranks*: spread over the workers, neighbours together, as
    evenly as can be. Inside, they exchange values by the axis's name: `psum`, `pmean`, `pmax`,
    `pmin`, `all_gather`, `psum_scatter`, `all_to_all`, `ppermute`, `pshuffle`, `pswapaxes`,
    `pbroadcast`; `axis_index` says which rank one is. A rank that waits for others lets them run,
    so there may be any number of ranks on any number of workers, and results do not depend on it.

    Maps nest: ``pmap(pmap(f, "j"), "i")`` has a rank for each pair of indices, on all workers. A
    pmap that is called elsewhere in a rank runs its ranks on that rank's worker. Collectives take
    one axis name or a tuple of them.

    A call runs at once and returns tensors. They are part of the driver's autograd graph: their
    backward runs on the workers, through the collectives too, and computes gradients of the
    arguments and of what ``fn`` closes over (tensors, modules), summed over the ranks. ``fn`` runs
    once.

    Parameters
    ----------
    fn
        A function of pytrees. Also a module.
    axis_name
        What collectives call the axis.
    in_axes
        The axis of each tensor that is mapped; with None, which modules and numbers require, all
        ranks get the whole value. An int or None for all, or a tuple with an entry for each
        positional argument: an int, None, or a tree of them that is a prefix of the argument.
        Keyword arguments are mapped over axis 0.
    out_axes
        Where the axis is in the results, an int or None, or a tree of them. With None a result has
        to be the same on all ranks, and is that of rank 0. With a `Sharded` in place of an int or
        None it stays on the workers, as a `ShardedTensor`; `pmap` then carries no gradients.
    static_broadcasted_argnums
        Positions of arguments that all ranks get whole, whatever they are: as None in ``in_axes``.
    axis_size
        The length of the axis. It has to be given only where no argument is mapped.
    gather
        If False all results stay on the workers, each as a ``Sharded`` of its entry in `out_axes`.
    client
        By default the current one.

    Returns
    -------
    callable
        Takes what ``fn`` takes, with the mapped axes.

    Raises
    ------
    ValueError
        Two nested maps have one axis name. On a call: the axes do not fit.
    LayerError
        On a call: ``fn`` raised; names the first rank that did, and its worker.
    CollectiveError
        The ranks called different collectives, or waited for one longer than
        ``taskgrad.collective-deadline``.
    WorkerLostError
        A rank's worker went away.
    TaskgradError
        On a call: a result is to stay, and in grad mode an argument takes a gradient.

    Notes
    -----
    Random numbers: each rank draws from a stream of its own, started from a number that each call
    takes from torch's default generator on the driver. So ``torch.manual_seed`` there fixes them.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> f = tg.pmap(lambda x: tg.psum(w @ x, "i"), axis_name="i")
    >>> y = f(torch.eye(2))
    >>> y
    tensor([3., 3.], grad_fn=<StackBackward0>)
    >>> y[0].backward()
    >>> w.grad
    tensor([1., 1.])
    """
    if isinstance(fn, Lazy):
        raise TypeError("pmap takes a function or a module; a GraphChain has workers of its own")
    if not callable(fn):
        raise TypeError(f"pmap takes a function or a module; got {type(fn).__name__}")
    levels = [level(axis_name, in_axes, out_axes, axis_size, static_broadcasted_argnums, gather)]
    if isinstance(fn, Mapped):
        levels += fn.levels
        client, fn = client or fn.client, fn.fn
    check_names([known.axis_name for known in levels])
    if len(levels) > 1 and any(stays(known.out_axes) for known in levels):
        raise NotImplementedError(
            "results of nested maps do not stay on the workers: leave out Sharded and gather=False"
        )
    return Mapped(fn, levels, client)


class Mapped:
    """A function that `pmap` has mapped, over one axis or, nested, over several."""

    def __init__(
        self, fn: Callable[..., Any], levels: Sequence[Level], client: Client | None
    ) -> None:
        if hasattr(fn, "__name__"):
            functools.update_wrapper(self, fn)
        self.fn = fn
        self.levels = tuple(levels)
        self.client = client

    def __reduce__(self) -> Any:
        return Mapped, (self.fn, self.levels, None)  # the client is this process's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        title = kind_of(self.fn).strip("<>")
        what = f"pmap of {title!r}"
        rank = running()
        if rank is None:
            _refuse_inside(title)
        split = Split(what, self.levels, args, kwargs)
        mesh = Mesh(tuple([known.axis_name for known in self.levels]), split.sizes)
        keeps = any(stays(known.out_axes) for known in self.levels)
        if rank is not None and keeps:
            raise NotImplementedError(
                f"{what} inside a function that tg.pmap runs: its results go to that function, and "
                "do not stay on workers. Leave out Sharded and gather=False"
            )
        if rank is not None:
            values = run_inside(rank, self.fn, title, mesh, split)
        elif keeps:
            owner = session(self.client)
            calls = self._calls(title, mesh, split, owner, KeptCall)
            return staying_outputs(what, self.levels[0].out_axes, calls, owner)
        else:
            values = self._run(title, mesh, split)
        outputs = [(as_there(leaves, flags), structure) for leaves, structure, flags in values]
        return together(what, self.levels, split.sizes, outputs)

    def _run(self, title: str, mesh: Mesh, split: Split) -> list[Any]:
        """Run the ranks on the workers; what each has returned, as `rank_calls` says."""
        owner = session(self.client)
        calls = self._calls(title, mesh, split, owner, Call)
        values = run_ranks(owner, calls)
        # Attached to what takes no gradient a result would keep the tapes for nothing.
        if torch.is_grad_enabled() and any(any(flags) for _, _, flags in values):
            values = autograd.attach(calls, values, executor_of(owner))
        return values

    def _calls(
        self, title: str, mesh: Mesh, split: Split, owner: Session, kind: type[Call]
    ) -> list[Call]:
        """The calls of the ranks, on their workers."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        workers = _places(mesh.size, owner)
        seconds = deadline("collective")
        group = ProcessGroup(title, mesh, workers, seed, seconds, owner.client.id)
        keys = [new_key("forward", str(Rank(group, i))) for i in range(mesh.size)]
        parts = split.at(workers, owner)
        addresses = [worker.address for worker in workers]
        leaf = functools.partial(kept_leaves_of(owner).leaf, executor_of(owner), addresses)
        return rank_calls(self.fn, split, group, 0, keys, keys, parts, kind, leaf)


def _refuse_inside(title: str) -> None:
    if current_worker() is not None:
        raise TaskgradError(
            f"pmap of {title!r} is called inside a task, such as a chain's layer or a function "
            "given to tg.spawn: call it on the driver"
        )


def _places(size: int, owner: Session) -> tuple[WorkerName, ...]:
    """Each rank's worker: neighbours share one, as evenly as can be."""
    workers = owner.workers_since_change(size)[:size]
    places = [workers[rank * len(workers) // size] for rank in range(size)]
    return tuple([WorkerName(w.address, w.name) for w in places])
