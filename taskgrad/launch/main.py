"""``if tg.main(__name__):`` runs one file under mpirun, on local processes, or in this process.

The idea is that of deepdish.parallel (https://github.com/uchicago-cs/deepdish): the call returns on
rank 0, which runs the program, and all other ranks serve as workers within it. It is built on
mpi4py and not on dask-mpi (2026.3), whose ``initialize`` gives rank 0 to the scheduler and the
script to rank 1: it needs three ranks to have one worker, waits in collective calls without a
deadline, and closes the cluster by opening a new client in an ``atexit`` handler, when Python
starts no more threads for it (dask-mpi issue 87). The ranks exchange a few messages over MPI, see
`taskgrad.launch.messages`.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Any

from dask.system import CPU_COUNT
from distributed import Client, Worker

from taskgrad.cluster.config import deadline
from taskgrad.cluster.exits import at_exit, not_at_exit
from taskgrad.cluster.local import local_cluster
from taskgrad.cluster.nested import current_worker
from taskgrad.cluster.session import current_session, in_order
from taskgrad.errors import TaskgradError
from taskgrad.launch import messages
from taskgrad.launch.coordinator import Coordinator
from taskgrad.launch.worker_rank import run_worker


def main(
    name: str, *, workers: int | None = None, threads: int = 1, interface: str | None = None
) -> bool:
    """True in the process that runs the program; all others become, or are, its workers.

    Put what the file does under ``if tg.main(__name__):``, and all that it defines before. Then

    - ``mpirun -n 8 python file.py`` (or ``srun``) opens a Dask cluster on rank 0, where the program
      runs; the other seven ranks become its workers, and never return from here,
    - ``python file.py`` starts worker processes on this machine,
    - either way the cluster's client is the current one, so that chains and maps use it
      (``distributed.get_client()`` returns it), and all processes end with the program:
      whether its end is reached, it raises, or it is interrupted. The exit status is the program's.

    Parameters
    ----------
    name
        ``__name__``. Where that is not ``"__main__"``, as the file is imported, the answer is False
        and nothing happens.
    workers
        How many worker processes are started without MPI; by default as many as the cores have
        room for. With 0 everything runs in this process, in a thread: prints come out here, and
        ``breakpoint()`` works. Under mpirun, its ``-n`` decides; with ``-n 1``, which leaves no
        rank to be a worker, all runs in this process, as with 0.
    threads
        How many tasks a worker runs at a time.
    interface
        The network between the ranks' hosts, such as ``"ib0"``, where the one that rank 0 reaches
        them by is not it. Only for MPI.

    Returns
    -------
    bool
        True in one process only: rank 0, or the one that was started. A second call there, as in a
        notebook, keeps the cluster if the arguments are the same and its client is still open. Else
        it opens another one in its place, or raises under MPI, where the ranks are what they are.

    Raises
    ------
    TaskgradError
        Ranks do not come to this call, or their workers not to rank 0, within
        ``taskgrad.start-deadline`` (2 min); the message says which. Or there is no mpi4py that fits
        the launcher.

    Examples
    --------
    >>> import taskgrad as tg
    >>> tg.main("a_module_that_is_imported")
    False
    """
    _check(name, workers, threads, interface)
    if name != "__main__":
        return False
    arguments = (workers, threads, interface)
    _program.run(arguments)
    return True


def rank() -> int:
    """The number of this process: 0 where the program runs, from 1 on its workers.

    In a rank of an MPI job it is MPI's rank, before `main` too. On other clusters it is, inside a
    task, one more than the worker's index (as in a chain's ``placement``). Where the task runs in
    the program's own process, and where there is no cluster, it is 0.

    Examples
    --------
    >>> import taskgrad as tg
    >>> tg.rank()
    0
    """
    if messages.launched():
        return messages.numbers()[0]
    worker = current_worker()
    if worker is None or _is_here(worker.address):
        return 0
    if worker not in _ranks:
        known = [info.address for info in in_order(_ask(worker))]
        _ranks[worker] = 1 + known.index(worker.address)
    return _ranks[worker]


def size() -> int:
    """How many processes there are in all: that of the program, and its workers.

    In a rank of an MPI job it is MPI's size; else 1 and the workers of the current cluster that are
    processes of their own, at this moment.

    Examples
    --------
    >>> import taskgrad as tg
    >>> tg.size() >= 1
    True
    """
    if messages.launched():
        return messages.numbers()[1]
    worker = current_worker()
    if worker is not None:
        addresses = list(_ask(worker))
    else:
        found = current_session()
        addresses = [] if found is None else [info.address for info in found.known()]
    return 1 + sum(not _is_here(address) for address in addresses)


_Arguments = tuple[int | None, int, str | None]


class _Program:
    """The cluster that `main` opened, in the process that runs the program."""

    def __init__(self) -> None:
        self._opened: Coordinator | Client | None = None
        self._opened_for: _Arguments | None = None
        self._pid = 0

    def run(self, arguments: _Arguments) -> None:
        """Open a cluster for these arguments, if none is open."""
        same = arguments == self._opened_for
        if isinstance(self._opened, Coordinator):
            if not same:
                raise TaskgradError(
                    f"tg.main was called with {self._opened_for} before (workers, threads, "
                    f"interface), now with {arguments}: the ranks are workers already"
                )
        elif not same or self._opened is None or self._opened.status != "running":
            self.close()
            self._start(*arguments)
            self._opened_for = arguments

    def _start(self, workers: int | None, threads: int, interface: str | None) -> None:
        here, ranks = messages.numbers() if messages.launched() else (0, 0)
        if here > 0:
            run_worker(threads, interface)
        self._pid = os.getpid()
        # Before anything can fail, as the other ranks wait for a message. Python runs this after it
        # has printed the traceback of a program that raised.
        at_exit(self.close)
        if ranks > 1:
            self._opened = coordinator = Coordinator()
            coordinator.start(interface)
        elif ranks == 1 or workers == 0:
            self._opened = local_cluster(1, threads, processes=False)
        else:
            self._opened = local_cluster(workers or max(1, CPU_COUNT // threads), threads)

    def close(self) -> None:
        """Close what is open. The second time, and in a forked child, nothing is."""
        opened, self._opened = self._opened, None
        if opened is not None and self._pid == os.getpid():
            not_at_exit(self.close)
            opened.close()


_program = _Program()


def _check(name: Any, workers: Any, threads: Any, interface: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"tg.main takes __name__, a string; got {name!r}")
    some = 0 if workers is None else workers
    for what, count, least in [("workers", some, 0), ("threads", threads, 1)]:
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{what} is a whole number from {least} on; got {count!r}")
    if interface is not None and not isinstance(interface, str):
        raise TypeError(f"interface is the name of a network interface; got {interface!r}")


def _is_here(address: str) -> bool:
    """True if a worker shares the program's process."""
    return address.startswith("inproc://")


def _ask(worker: Worker) -> dict[str, Any]:
    """Ask the scheduler, from a task's thread, what it knows of all workers; by address."""

    async def ask() -> Any:
        return await worker.scheduler.identity(n_workers=-1)

    asked = asyncio.run_coroutine_threadsafe(ask(), worker.loop.asyncio_loop)  # type: ignore[attr-defined]
    found: dict[str, Any] = asked.result(deadline("answer"))["workers"]
    return found


_ranks: weakref.WeakKeyDictionary[Worker, int] = weakref.WeakKeyDictionary()
