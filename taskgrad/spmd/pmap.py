"""A parallel map: one function, one rank a worker, as JAX's pmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from distributed import Client

from taskgrad import autograd
from taskgrad.arguments import shown
from taskgrad.cluster.config import deadline
from taskgrad.cluster.nested import current_worker
from taskgrad.cluster.session import Session, session
from taskgrad.errors import TaskgradError
from taskgrad.executors.rank_calls import run_ranks
from taskgrad.executors.registry import executor_of
from taskgrad.graph.calls import Call, ProcessGroup, Rank
from taskgrad.graph.functions import pack_function, template
from taskgrad.graph.layers import kind_of
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.mesh import Mesh
from taskgrad.graph.nodes import new_key
from taskgrad.graph.pytree import Slot, Structure, describe, flatten
from taskgrad.spmd.axes import Axis, check, is_axis, join, mapped_size, spread
from taskgrad.thunk import Lazy, Thunk
from taskgrad.worker.communicator import running
from taskgrad.worker_names import WorkerName


def pmap(
    fn: Callable[..., Any],
    axis_name: Hashable = None,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    client: Client | None = None,
) -> Callable[..., Any]:
    """Map a function over an axis, with one worker for each index: JAX's ``pmap``.

    Each call splits the arguments along their mapped axes, runs ``fn`` once for each index, all at
    the same time, each *rank* on a worker of its own, and stacks the results. Inside, the ranks
    exchange values by the axis's name: `psum`, `pmean`, `pmax`, `pmin`, `all_gather`, `ppermute`,
    `all_to_all`, `psum_scatter`; `axis_index` says which rank one is.

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
        to be the same on all ranks, and is that of rank 0.
    client
        By default the current one.

    Returns
    -------
    callable
        Takes what ``fn`` takes, with the mapped axes.

    Raises
    ------
    ValueError
        On a call: the axes do not fit, or are longer than there are workers.
    LayerError
        On a call: ``fn`` raised; names the first rank that did, and its worker.
    CollectiveError
        The ranks called different collectives, or waited for one longer than
        ``taskgrad.collective-deadline``.
    WorkerLostError
        A rank's worker went away.

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
    if isinstance(axis_name, tuple | list):
        raise NotImplementedError(f"pmap maps one axis; got the axis names {axis_name!r}")
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if in_axes is not None and not isinstance(in_axes, tuple) and not is_axis(in_axes):
        raise TypeError(f"in_axes is an int, None or a tuple of an entry each; got {in_axes!r}")
    check(in_axes, "in_axes")
    check(out_axes, "out_axes")
    if not isinstance(axis_name, Hashable):
        raise TypeError(f"axis_name can be hashed, as a string can; got {shown(axis_name)}")
    title = kind_of(fn).strip("<>")

    def mapped(*args: Any, **kwargs: Any) -> Any:
        _refuse_inside(title)
        split = _split(title, args, kwargs, in_axes)
        owner = session(client)
        calls = _calls(fn, title, axis_name, split, _places(title, split.size, owner))
        values = run_ranks(owner, calls)
        # Attached to what takes no gradient a result would keep the tapes for nothing.
        if torch.is_grad_enabled() and any(any(flags) for _, _, flags in values):
            values = autograd.attach(calls, values, executor_of(owner))
        outputs = [(_as_there(leaves, flags), structure) for leaves, structure, flags in values]
        return _together(f"pmap of {title!r}", outputs, out_axes)

    return functools.wraps(fn)(mapped) if hasattr(fn, "__name__") else mapped


class _Split:
    """Arguments: what each rank gets as `parts`; what all get is among the `leaves`."""

    def __init__(self, leaves: list[Any], structure: Structure, axes: list[Axis], what: str):
        self.size = mapped_size(leaves, axes, what)
        mapped = {i: axis for i, axis in enumerate(axes) if axis is not None}
        slots = {i: Slot(position) for position, i in enumerate(mapped)}
        self.leaves = [slots.get(i, leaf) for i, leaf in enumerate(leaves)]
        self.structure = structure
        # Split on the driver, by torch, whose autograd also joins the gradients.
        split = [leaves[i].unbind(axis) for i, axis in mapped.items()]
        self.parts = list(zip(*split, strict=True))


class _Program:
    """The function, with what is the same on all ranks put in: what is sent to them.

    It returns the leaves and the structure of the function's result, and for each leaf whether a
    gradient can flow into it.
    """

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], structure: Structure) -> None:
        self._fn = fn
        self._leaves = leaves
        self._structure = structure

    def __call__(self, *parts: Any) -> Any:
        args, kwargs = self._structure.build(
            [parts[leaf.index] if type(leaf) is Slot else leaf for leaf in self._leaves]
        )
        leaves, structure = flatten(self._fn(*args, **kwargs))
        return leaves, structure, [isinstance(x, torch.Tensor) and x.requires_grad for x in leaves]


def _as_there(leaves: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """The leaves of a rank's output; those without a gradient on its worker are detached."""
    return [
        leaf if flag or not isinstance(leaf, torch.Tensor) else leaf.detach()
        for leaf, flag in zip(leaves, flags, strict=True)
    ]


def _refuse_inside(title: str) -> None:
    if running() is not None:
        raise NotImplementedError(
            f"pmap of {title!r} inside a function that tg.pmap runs: maps are not nested. Map one "
            "axis, and use torch.vmap for the other"
        )
    if current_worker() is not None:
        raise TaskgradError(
            f"pmap of {title!r} is called inside a task, such as a chain's layer or a function "
            "given to tg.spawn: call it on the driver"
        )


def _split(title: str, args: Any, kwargs: Any, in_axes: Any) -> _Split:
    what = f"pmap of {title!r}"
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise ValueError(
            f"{what}: in_axes has {len(in_axes)} entries for {len(args)} positional arguments"
        )
    leaves, structure = flatten((args, kwargs))
    if any(isinstance(leaf, Thunk) for leaf in leaves):
        raise TypeError(f"{what} runs at once and takes tensors: tg.collect its thunks first")
    axes = spread(in_axes, args, "in_axes") + [0] * len(flatten(kwargs)[0])
    return _Split(leaves, structure, axes, what)


def _places(title: str, size: int, owner: Session) -> tuple[WorkerName, ...]:
    workers = owner.workers()
    if size > len(workers):
        raise ValueError(
            f"pmap of {title!r} over an axis of length {size} requires {size} workers, but only "
            f"{len(workers)} are there. Start more, or put torch.vmap inside for a part of the axis"
        )
    return tuple(WorkerName(w.address, w.name) for w in workers[:size])


def _calls(
    fn: Callable[..., Any],
    title: str,
    axis_name: Hashable,
    split: _Split,
    workers: tuple[WorkerName, ...],
) -> list[Call]:
    """One call a rank, each pinned to its worker."""
    program = _Program(fn, split.leaves, split.structure)
    packed = pack_function(program, title, what=f"{title!r}, or an argument of it,")
    shared = [Leaf(t, name=name, owner=m) for t, name, m, _ in packed.closed_over]
    # Buffers that a module writes are returned by rank 0, as with torch's DDP.
    buffers = tuple([i for i, found in enumerate(packed.closed_over) if found.is_buffer])
    seed = int(torch.randint(2**62, (), device="cpu"))
    group = ProcessGroup(
        title, Mesh((axis_name,), (len(workers),)), workers, seed, deadline("collective")
    )
    ranks = [Rank(group, index) for index in range(len(workers))]
    keys = tuple([new_key("forward", str(rank)) for rank in ranks])
    calls = []
    for rank, key, parts in zip(ranks, keys, split.parts, strict=True):
        slots = tuple([Slot(len(shared) + i) for i in range(len(parts))])
        calls.append(
            Call(
                title=str(rank),
                steps=((0, str(rank), kind_of(fn)),),
                inputs=[*shared, *map(Leaf, parts)],
                template=template((slots, {})),
                function=packed.data,
                tensor_slots=tuple(range(len(shared))),
                buffers=() if rank.index else buffers,
                worker=workers[rank.index].address,
                key=key,
                rank=rank,
                peers=keys,
            )
        )
    return calls


def _together(what: str, trees: Sequence[tuple[list[Any], Structure]], out_axes: Any) -> Any:
    """The ranks' outputs as one."""
    structure = trees[0][1]
    first = structure.build(trees[0][0])
    for rank, (leaves, other) in enumerate(trees):
        if other != structure:
            raise ValueError(
                f"{what}: the ranks' outputs differ in structure: rank 0 gave "
                f"{describe(first)}, rank {rank} gave {describe(other.build(leaves))}"
            )
        if other.skeletons != structure.skeletons:
            raise ValueError(
                f"{what}: the ranks' outputs hold objects ({describe(first)}) that differ between "
                f"rank 0 and rank {rank} in more than their tensors. Return the tensors themselves"
            )
    axes = spread(out_axes, first, "out_axes")
    columns = zip(*(leaves for leaves, _ in trees), strict=True)
    return structure.build([join(c, a, what) for c, a in zip(columns, axes, strict=True)])
