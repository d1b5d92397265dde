"""`imap` and `starmap`: a function over a stream of items, on all workers."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal

from distributed import Client

from taskgrad.arguments import flag, iterator
from taskgrad.cluster.nested import give_thread_back, refuse_deadlock
from taskgrad.cluster.session import session
from taskgrad.errors import TravelError
from taskgrad.graph.layers import kind_of
from taskgrad.graph.pack import pickle_or_explain
from taskgrad.graph.torch_settings import refuse_modes, settings_now
from taskgrad.streaming.batch_codec import pack_function
from taskgrad.streaming.stream import Stream
from taskgrad.streaming.window import Window
from taskgrad.thunk import Lazy

Chunksize = int | Literal["auto"]


def imap(
    fn: Callable[..., Any],
    *iterables: Iterable[Any],
    unordered: bool = False,
    chunksize: Chunksize = "auto",
    buffersize: int | None = None,
    progress: bool = False,
    client: Client | None = None,
) -> Generator[Any, None, None]:
    """Call a function with each item of a stream on the workers, and yield the results.

    A parallel ``map``: lazy on both sides. Items are pulled as results are yielded, so the input
    may be infinite; memory is bounded by the window between the two. Nothing is pulled before the
    first ``next()``.

    Parameters
    ----------
    fn
        A function of as many arguments as there are iterables: a lambda or a closure too. It is
        sent once to each worker. It should have no effects: the items of a worker that dies are run
        again elsewhere. Tensors come back without their autograd graph; `taskgrad.map` is the one
        that differentiates.
    *iterables
        Finite or not; as with ``zip`` and ``map`` the shortest ends the map. They are pulled in a
        thread of their own. An item may be anything that can be pickled, None too, and is what it
        was when it was pulled.
    unordered
        Yield results as they come. Else in the order of the items.
    chunksize
        How many items go to a worker at a time. "auto" starts with one and then aims at a tenth of
        a second a chunk (half a second in a long map) and at most 4 MiB, from measured times. The
        results of a chunk come together.
    buffersize
        How many items may have been pulled and not yielded, at most. By default 8 chunks for each
        thread of the workers.
    progress
        Show a bar (needs tqdm).
    client
        The cluster; by default the current client's, and if there is none, one is opened.

    Returns
    -------
    Generator
        Of results. When it is closed, fails, or is garbage (after ``break``), what has not run is
        cancelled, and the input is closed if it is a generator.

    Raises
    ------
    TypeError, ValueError
        At the call, for wrong arguments; `TravelError` if ``fn`` cannot be pickled.
    Exception
        What an item raised, with a note that names the item and the worker, after the results of
        the items before it. What the input raised, after the results of all its items.
    TravelError
        An item or a result cannot be pickled; the message or a note names the item.
    WorkerLostError
        Items were on so many workers that died (Dask's ``allowed-failures``), or there is no worker
        for ``taskgrad.worker-deadline``.
    TaskgradError
        The connection to the scheduler is gone.

    Examples
    --------
    >>> import itertools, taskgrad as tg
    >>> list(tg.imap(lambda x: 2 * x, range(5)))
    [0, 2, 4, 6, 8]
    >>> for y in tg.imap(pow, itertools.count(), itertools.repeat(2)):
    ...     if y > 50:
    ...         break
    >>> y
    64
    """
    if not iterables:
        raise TypeError("imap needs an iterable after the function: tg.imap(fn, items)")
    star = len(iterables) > 1
    return _map("imap", fn, iterables, star, unordered, chunksize, buffersize, progress, client)


def starmap(
    fn: Callable[..., Any],
    iterable: Iterable[Any],
    *,
    unordered: bool = False,
    chunksize: Chunksize = "auto",
    buffersize: int | None = None,
    progress: bool = False,
    client: Client | None = None,
) -> Generator[Any, None, None]:
    """`imap` for items that are tuples of arguments: yields ``fn(*item)`` for each.

    Parameters, results and errors are those of `imap`.

    Examples
    --------
    >>> import taskgrad as tg
    >>> list(tg.starmap(pow, [(2, 3), (3, 2)]))
    [8, 9]
    """
    given = (iterable,)
    return _map("starmap", fn, given, True, unordered, chunksize, buffersize, progress, client)


def _map(
    name: str,
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    star: bool,
    unordered: bool,
    chunksize: Chunksize,
    buffersize: int | None,
    progress: bool,
    client: Client | None,
) -> Generator[Any, None, None]:
    if isinstance(fn, Lazy):
        raise TypeError(f"{name} maps a function, and this {kind_of(fn)} runs on its own workers")
    if not callable(fn):
        raise TypeError(f"{name} maps a function; got {type(fn).__name__}")
    unordered, progress = flag("unordered", unordered), flag("progress", progress)
    inputs = [iterator(name, place, given) for place, given in enumerate(iterables)]
    auto = isinstance(chunksize, str) and chunksize == "auto"
    size = None if auto else _count(name, "chunksize", chunksize)
    if buffersize is not None:
        buffersize = _count(name, "buffersize", buffersize)
        if size is not None and size > buffersize:
            raise ValueError(
                f"{name}: a chunk of chunksize={size} items does not fit into "
                f"buffersize={buffersize}"
            )
    show = _bar(name) if progress else None
    packed = pickle_or_explain(
        lambda: pack_function(fn),
        f"{name}: the function {kind_of(fn)!r}",
        ". Take what cannot be pickled (locks, open files, generators) out, or make it inside",
        kind=TravelError,
    )
    hints = [operator.length_hint(one, -1) for one in iterables]
    length = min((hint for hint in hints if hint >= 0), default=None)
    refuse_modes(kind_of(fn))
    settings = settings_now()
    owner = session(client)

    def results() -> Generator[Any, None, None]:
        refuse_deadlock()
        give_thread_back()  # in a task: this thread will wait for other tasks, which may need it
        window = Window(
            threads=max(1, sum(worker.threads for worker in owner.known())),
            chunksize=size,
            buffersize=buffersize,
            length=length,
            unordered=unordered,
        )
        found = Stream(owner, fn, packed, inputs, window, star=star, settings=settings).results()
        if show is None:
            yield from found
            return
        with show(total=length, desc=kind_of(fn)) as bar, contextlib.closing(found):
            for value in found:
                bar.update()
                yield value

    return results()


def _count(name: str, what: str, given: Any) -> int:
    try:
        number = operator.index(given)
    except TypeError:
        number = 0
    if number < 1 or isinstance(given, bool):
        raise ValueError(f"{name}: {what} is a number of items, from 1 on; got {given!r}")
    return number


def _bar(name: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            f"{name} with progress=True needs tqdm: pip install tqdm, or taskgrad[progress]"
        ) from error
    return tqdm
