"""`map`: a differentiable function over many items, in processes, threads or both.

The idea is ParallelGradient.jl's (``dpmap``, ``dtmap``, ``dptmap``, and the scalar variants): what
a backward needs stays where the forward ran, and only gradients are sent to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from distributed import Client

from taskgrad.arguments import iterator, whole
from taskgrad.cluster.nested import current_worker
from taskgrad.graph.copies import Pulled
from taskgrad.graph.pytree import flatten
from taskgrad.mapping.local import map_local
from taskgrad.mapping.reducing import fold, mean, rounded
from taskgrad.mapping.remote import map_remote
from taskgrad.mapping.segments import Row
from taskgrad.mapping.threads import threads_here
from taskgrad.thunk import Lazy, Thunk, collect

_END = object()
# Containers whose iteration runs no code that could change an item.
_CONTAINERS = (list, tuple, range, dict, str, np.ndarray, torch.Tensor, torch.nn.Parameter)


def map(
    fn: Callable[..., Any],
    *iterables: Iterable[Any],
    over: Literal["processes", "threads", "both"] = "processes",
    chunksize: int | None = None,
    reduce: Literal["sum", "mean"] | None = None,
    eager_grad: bool | None = None,
    seed: int | None = None,
    client: Client | None = None,
) -> Any:
    """Call a function with each item, over workers or threads; the results can be differentiated.

    ``tg.map(fn, xs, ys)`` returns what ``[fn(x, y) for x, y in zip(xs, ys)]`` is, as much a part of
    torch's autograd: ``.backward()`` computes gradients of the items and of the tensors that `fn`
    closes over (parameters of modules, too). Over processes the graphs stay on the
    workers, the backward runs there, and each worker sends one gradient for each closed-over
    tensor, and its items' own.

    Parameters
    ----------
    fn
        Any function, method, partial or module.
    *iterables
        The items, pytrees; as many of each. Generators are read to their end first.
    over
        "processes": the client's workers, one item at a time on each. "threads": threads of this
        process, with no cluster. "both": the workers, and on each as many threads as it has.
        Inside a task (in a function that is mapped, or in a chain's layer) the worker that runs it
        does all of it: one item at a time, or with as many threads as it has.
    chunksize
        How many items make one task, or one piece of work of a thread. By default each worker or
        thread has one chunk, all of the same size; over both by the workers' threads.
    reduce
        "sum" or "mean" of the results, which are added up first where they are made. As for
        ``torch.sum``, bools and integers are added up as int64, half precision in float32, rounded
        once. The mean of bools and integers is a float.
    eager_grad
        Over processes: True to make gradients together with the results, in one round trip, which
        takes results that are 0-d or tuples led by a 0-d loss. By default where that pays.
    seed
        Item i draws its random numbers from ``tg.random_stream(seed, 0, i, "map")``, whatever the
        chunks. Seeded items run one at a time per process. Without `seed`, torch's global
        generator is used.
    client
        By default the current client; with none, a local cluster is started. Not used over threads.

    Returns
    -------
    list
        The results in the order of the items; with `reduce` one value of their structure.

    Raises
    ------
    ValueError
        The iterables have unequal lengths, or an argument makes no sense.
    TypeError
        `fn` cannot be called, cannot be sent to workers, or closes over what can only be used here.
    Exception
        What the first item that failed raised, as it is; a note says which item and where.
    LayerError
        It raised StopIteration, or what is no Exception, such as SystemExit: that is the cause.
    TapeError
        In a backward: a second one through the same result without ``retain_graph=True``.
    WorkerLostError
        A worker went away with what it kept.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> w = torch.tensor(3.0, requires_grad=True)
    >>> losses = tg.map(lambda x: (w * x) ** 2, [1.0, 2.0], over="threads")
    >>> sum(losses).backward()
    >>> w.grad
    tensor(30.)

    Notes
    -----
    The same idea as ParallelGradient.jl's ``dpmap``, ``dtmap`` and ``dptmap``.
    """
    _check(fn, over, reduce, eager_grad)
    chunksize = None if chunksize is None else whole("chunksize", chunksize, least=1)
    seed = None if seed is None else whole("seed", seed, least=0)
    rows = _rows(iterables)
    if any(isinstance(leaf, Thunk) for leaf in flatten(rows)[0]):
        rows = collect(rows)
    if not rows:
        if reduce is not None:
            raise ValueError(f"reduce={reduce!r} of a map over no items")
        return []
    if over == "threads" or current_worker() is not None:
        # In a task: the other workers may be waiting for this one.
        threads = 1 if over == "processes" else threads_here()
        results = map_local(
            fn, rows, threads=threads, chunksize=chunksize, reduce=reduce is not None, seed=seed
        )
    else:
        results = map_remote(
            fn,
            rows,
            threads=over == "both",
            chunksize=chunksize,
            reduce=reduce is not None,
            seed=seed,
            eager=eager_grad,
            eager_seed=1 / len(rows) if reduce == "mean" else 1.0,
            client=client,
        )
    if reduce is None:
        return results
    summed = fold(results)
    return mean(summed, len(rows)) if reduce == "mean" else rounded(summed)


def _check(fn: Any, over: Any, reduce: Any, eager_grad: Any) -> None:
    if isinstance(fn, Lazy):
        raise TypeError(
            "a GraphChain runs on workers of its own: tg.collect([chain(x) for x in xs]) runs it "
            "over many inputs, and a map takes chain.to_module()"
        )
    if not callable(fn):
        raise TypeError(f"a map takes a function or an nn.Module; got {type(fn).__name__}")
    for name, given, allowed in (
        ("over", over, ("processes", "threads", "both")),
        ("reduce", reduce, (None, "sum", "mean")),
        ("eager_grad", eager_grad, (None, True, False)),
    ):
        if not any(
            given is known or (isinstance(known, str) and given == known) for known in allowed
        ):
            raise ValueError(
                f"{name} is one of {', '.join([repr(a) for a in allowed])}; got {given!r}"
            )


def _rows(iterables: Sequence[Iterable[Any]]) -> list[Row]:
    """Zip the iterables: row n has the n-th item of each, the arguments of one call.

    Items keep the values that they had when they were pulled. Raises TypeError if one is not
    iterable or there is none, ValueError if one ends before another.
    """
    if not iterables:
        raise TypeError("a map takes a function and at least one iterable of items")
    iterators = [iterator("map", place, given) for place, given in enumerate(iterables)]
    columns = [_Uncopied() if type(given) in _CONTAINERS else Pulled() for given in iterables]
    count = 0
    while True:
        row = []
        for items, column in zip(iterators, columns, strict=True):
            row.append(next(items, _END))
            if row[-1] is not _END:
                column.add(row[-1])  # before the next one is pulled, which may refill it
        ended = [k for k, item in enumerate(row) if item is _END]
        if not ended:
            count += 1
        elif len(ended) == len(row):
            return list(zip(*(column.values() for column in columns), strict=True))
        else:
            longer = next(k for k, item in enumerate(row) if item is not _END)
            raise ValueError(
                f"the iterables of a map have unequal lengths: the one at position {ended[0]} "
                f"ended after {count} items, and the one at position {longer} has more"
            )


class _Uncopied(Pulled):
    """Items of a container, which need no copies."""

    def add(self, value: Any) -> None:
        self._values.append(value)
