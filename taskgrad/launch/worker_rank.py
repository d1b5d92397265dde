"""Every MPI rank but rank 0: a Dask worker until rank 0 ends or is lost."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from distributed import Worker
from distributed.comm.addressing import get_address_host_port
from distributed.worker_memory import parse_memory_limit

from taskgrad.cluster.config import deadline
from taskgrad.launch import messages

logger = logging.getLogger("taskgrad")

EXIT = "exit"
"""Rank 0's last message to each rank, and each rank's answer."""

EXIT_GRACE_S = 15.0
"""How long ranks may take to exit once rank 0 ends."""

_CLOSE_S = 2.0  # that a closing worker waits for its tasks
_POLL_S = 2.0  # between two checks, by a rank whose worker has closed, that rank 0 is there


@dataclass(frozen=True)
class WorkerOptions:
    """Rank 0's first message: which cluster to join, and how."""

    scheduler: str
    host: str | None
    """Where workers listen; None: on the interface by which they reach the scheduler."""
    neighbours: int
    """How many ranks are workers on this host, whose memory they share."""


@dataclass(frozen=True)
class StartFailed:
    """A rank's message to rank 0: its worker could not start, and why."""

    why: str


class _RankWorker(Worker):
    """A worker whose `close` does not wait long for running tasks."""

    async def close(self, timeout: float = _CLOSE_S, **kwargs: Any) -> Any:  # type: ignore[override]
        # Lost connections are expected from here on.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        return await super().close(timeout=timeout, **kwargs)


def run_worker(threads: int, interface: str | None) -> NoReturn:
    """Join rank 0's cluster as a worker, then exit; does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all ranks; rank 0 decides
    messages.send(0, messages.host())
    # As Dask's nanny has it for worker processes, so that a worker gives the same bits.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    options = messages.receive(0, 2 * deadline("start"))
    if options is None:
        _lost("rank 0 has not said which cluster to join")
    if isinstance(options, WorkerOptions):
        try:
            asyncio.run(_work(options, threads, interface))
        except Exception as error:
            messages.send(0, StartFailed(f"{type(error).__name__}: {error}"))
        _wait_for_exit(options.scheduler)
    _exit()


def _no_failed_heartbeats(record: logging.LogRecord) -> bool:
    """Drops Dask's traceback of a heartbeat that finds no scheduler.

    Rank 0 may close while one is on its way, which is no error; and where rank 0 is lost this rank
    says so itself.
    """
    return "during heartbeat" not in record.getMessage()


async def _work(options: WorkerOptions, threads: int, interface: str | None) -> None:
    logging.getLogger("distributed.worker").addFilter(_no_failed_heartbeats)
    worker = await _RankWorker(
        options.scheduler,
        name=messages.numbers()[0],
        nthreads=threads,
        host=options.host,
        interface=interface,
        memory_limit=parse_memory_limit("auto", 1, options.neighbours, logger=logger) or 0,
        dashboard=False,
        silence_logs=logging.WARNING,
        death_timeout=deadline("start"),
    )
    await worker.finished()
    await _stop_tasks()


def _busy() -> list[threading.Thread]:
    """The threads of a closed worker in which tasks still run."""
    return [t for t in threading.enumerate() if "Dask-Default-Threads" in t.name]


async def _stop_tasks() -> None:
    """Raise SystemExit in tasks that still run, at their next Python instruction."""
    for thread in _busy():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
    end = time.monotonic() + _CLOSE_S
    while _busy() and time.monotonic() < end:
        await asyncio.sleep(0.01)


def _wait_for_exit(scheduler: str) -> None:
    """After the worker has closed: wait for `EXIT`, as long as the scheduler can be reached.

    Rank 0 may also have closed this worker alone.
    """
    while messages.receive(0, _POLL_S) != EXIT:
        try:
            socket.create_connection(get_address_host_port(scheduler), timeout=_POLL_S).close()
        except OSError:
            if messages.receive(0, 0) == EXIT:
                return
            _lost("its scheduler is gone")


def _lost(why: str) -> NoReturn:
    """End this process with an error: without rank 0 MPI cannot be finalized."""
    rank = messages.numbers()[0]
    print(f"taskgrad: rank {rank} ends, as rank 0 is lost: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _exit() -> NoReturn:
    messages.send(0, EXIT)
    messages.finalize(EXIT_GRACE_S)
    messages.watch(EXIT_GRACE_S)  # Python waits for threads that tasks have started
    if _busy():
        # Native code that does not return to Python. Finalizing Python while it runs would crash;
        # and it has to be C's exit, not _exit, as MPICH tells its launcher of this end only there.
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.PyDLL(None).exit(0)
    sys.exit(0)
