"""Driver: start a cluster on this machine."""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from dask.utils import parse_bytes
from distributed import Client, LocalCluster, Nanny, Worker

from taskgrad.arguments import whole
from taskgrad.cluster import internals
from taskgrad.cluster.exits import close_at_exit
from taskgrad.errors import TaskgradError

logger = logging.getLogger("taskgrad")

_DASHBOARD = 8787
_LAST_PORT = 65535
_LEAST_MEMORY = 128 << 20

# The exit status of a worker process whose script has no guard. It prints nothing if its parent,
# whose process id is in the environment variable, raises the error.
_UNGUARDED_STATUS = 86
_STARTED_BY = "TASKGRAD_STARTED_BY"

_GUARD_NEEDED = (
    'this script has to begin its work under `if __name__ == "__main__":` (or under '
    "`if tg.main(__name__):`). Each process that is started imports the script first, and without "
    "that line it would do the same work again, and start processes of its own"
)


def local_cluster(
    n_workers: int | None = 2, threads_per_worker: int | None = 1, **kwargs: Any
) -> Client:
    """Start worker processes on this machine and connect to them.

    A script has to call this under ``if __name__ == "__main__":``, because it starts processes.

    Parameters
    ----------
    n_workers, threads_per_worker
        One thread a worker by default: a shard runs one task at a time. With None as many as the
        cores have room for.
    **kwargs
        Passed on to ``distributed.LocalCluster`` (``dashboard_address``, ``memory_limit``, ...).
        The dashboard is at port 8787 if that is free, else at another one.

    Returns
    -------
    distributed.Client
        Closing it closes the cluster; so does the end of the program. It becomes Dask's default
        client.

    Raises
    ------
    TypeError, ValueError
        An argument makes no sense.
    TaskgradError
        The worker processes did not start: the script has no ``if __name__ == "__main__":``, a port
        is in use.

    Examples
    --------
    >>> import taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> client.close()
    """
    if n_workers is not None:
        n_workers = whole("n_workers", n_workers, least=0)
    if threads_per_worker is not None:
        threads_per_worker = whole("threads_per_worker", threads_per_worker, least=1)
    options = {"processes": True, **kwargs}
    _check_names(options)
    _check_values(options)
    refuse_in_starting_process()
    if "dashboard_address" not in options and not _is_free(_DASHBOARD):
        options["dashboard_address"] = ":0"
    ended: list[int] = []
    if options["processes"] and options.get("worker_class") is None:
        options["worker_class"] = internals.nanny_that_records(ended)
        _hide_missing_script()
    os.environ[_STARTED_BY] = str(os.getpid())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", internals.PORT_WARNING)
            # With no address, a Client starts a LocalCluster of its own and closes it with itself.
            client = Client(n_workers=n_workers, threads_per_worker=threads_per_worker, **options)
    except Exception as error:
        why = _why(error, ended)
        if why is None:
            raise
        raise TaskgradError(why) from None  # Dask's own error is only a timeout
    close_at_exit(client)
    _note_port(client, options.get("dashboard_address"))
    return client


def refuse_in_starting_process() -> None:
    """Raise if this process is a child that is importing the main script while it starts."""
    process = multiprocessing.current_process()
    if not getattr(process, "_inheriting", False):
        return
    if process.name.startswith("Dask Worker process"):
        # Exit before it becomes a worker. Every process would print an exception and its traceback.
        known = os.environ.get(_STARTED_BY) == str(os.getppid())
        sys.exit(_UNGUARDED_STATUS if known else f"taskgrad: {_GUARD_NEEDED}")
    raise TaskgradError(_GUARD_NEEDED)


def _why(error: BaseException, ended: list[int]) -> str | None:
    """The reason why workers did not start, or None if unknown."""
    if _UNGUARDED_STATUS in ended:
        return _GUARD_NEEDED
    if ended:
        status = ended[0]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return (
            f"a worker process {how} before it became a worker; what it printed is above. It first "
            'imports the script, except for the code under `if __name__ == "__main__":`'
        )
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.EADDRINUSE, errno.EACCES):
            return (
                f"the scheduler cannot have its port ({cause.strerror}). Give another "
                "scheduler_port, or 0 for one that is free"
            )
        if isinstance(cause, socket.gaierror) or (
            isinstance(cause, OSError) and cause.errno == errno.EADDRNOTAVAIL
        ):
            return (
                "the scheduler cannot listen where it was told to: its host or dashboard_address "
                f"is not an address of this machine ({cause.strerror})"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_names(options: dict[str, Any]) -> None:
    """Raise TypeError for an unknown argument, on which each worker process would fail."""
    if options.get("worker_class") is not None:
        return  # it may have other arguments
    known: set[str] = set()
    for taker in (Client, LocalCluster, Nanny, Worker):
        known |= inspect.signature(taker).parameters.keys()
    known -= {"address", "kwargs", "worker_kwargs"}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"local_cluster has no argument {unknown[0]!r}, nor have LocalCluster, Nanny and "
            "Worker of distributed, to which it passes on those that it does not know"
        )


def _check_values(options: dict[str, Any]) -> None:
    """Raise for values with which worker processes would be killed and restarted without end."""
    port = options.get("scheduler_port")
    if isinstance(port, int) and not 0 <= port <= _LAST_PORT:
        raise ValueError(f"scheduler_port is a number from 0 to {_LAST_PORT}; got {port}")
    limit = options.get("memory_limit")
    if isinstance(limit, str) and limit != "auto":
        limit = parse_bytes(limit)
    if not isinstance(limit, int) or limit == 0:  # without one, or a fraction of the machine's
        return
    if options["processes"] and limit < _LEAST_MEMORY:
        raise ValueError(
            f"memory_limit is {options['memory_limit']!r} for each worker, which needs more than "
            f"{_LEAST_MEMORY >> 20} MiB for torch alone: it would be killed before it did anything"
            ". Give more, or None for no limit"
        )


def _is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return False
    return True


def _note_port(client: Client, wanted: Any) -> None:
    """Say where the dashboard is if the user chose another port for it, which was taken."""
    port = str(wanted or "").rpartition(":")[2]
    if not port.isdigit() or not int(port):
        return
    link = client.dashboard_link
    if link and f":{port}/" not in link:
        logger.warning("port %s is taken, so the dashboard is at %s.", port, link)


def _hide_missing_script() -> None:
    """Remove `__main__`'s file name if it is <stdin>, which worker processes cannot import."""
    main = sys.modules.get("__main__")
    if getattr(main, "__file__", None) == "<stdin>":
        del main.__file__  # type: ignore[union-attr]
