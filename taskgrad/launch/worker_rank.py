"""What every rank but rank 0 does: it is a Dask worker until rank 0 is done, or gone."""

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

LEAVE = "leave"
"""Rank 0's last message to each rank, and each rank's answer."""

PATIENCE = 15.0
"""Seconds that ranks may take to leave once rank 0 is done."""

_CLOSE = 2.0  # s that a closing worker waits for its tasks
_LOOK = 2.0  # s between two looks of a rank without a worker whether rank 0 is still there


@dataclass(frozen=True)
class Work:
    """Rank 0's first message: which cluster to join, and how."""

    scheduler: str
    host: str | None
    """Where workers listen; None leaves it to their way to the scheduler."""
    neighbours: int
    """How many ranks are workers on this host; they share its memory."""


@dataclass(frozen=True)
class Failed:
    """A rank's message to rank 0: its worker could not start, and why."""

    why: str


class _RankWorker(Worker):
    """A worker that closes soon, whatever its tasks are doing: rank 0 wants no more of them."""

    async def close(self, timeout: float = _CLOSE, **kwargs: Any) -> Any:  # type: ignore[override]
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what else it says is meant
        return await super().close(timeout=timeout, **kwargs)


def follow(threads: int, interface: str | None) -> NoReturn:
    """Be a worker of rank 0's cluster, then leave; does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all ranks; rank 0 decides
    messages.send(0, messages.host())
    # As Dask's nanny has it for worker processes, so that a worker gives the same bits.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    order = messages.receive(0, 2 * deadline("start"))
    if order is None:
        _lost("rank 0 has not said what to do")
    if isinstance(order, Work):
        try:
            asyncio.run(_work(order, threads, interface))
        except Exception as error:
            messages.send(0, Failed(f"{type(error).__name__}: {error}"))
        _wait_for_the_end(order.scheduler)
    _leave()


def _no_failed_heartbeats(record: logging.LogRecord) -> bool:
    """Drops Dask's traceback of a heartbeat that finds no scheduler.

    Rank 0 may close while one is on its way, which is no error; and where rank 0 is lost this rank
    says so itself.
    """
    return "during heartbeat" not in record.getMessage()


async def _work(order: Work, threads: int, interface: str | None) -> None:
    logging.getLogger("distributed.worker").addFilter(_no_failed_heartbeats)
    worker = await _RankWorker(
        order.scheduler,
        name=messages.numbers()[0],
        nthreads=threads,
        host=order.host,
        interface=interface,
        memory_limit=parse_memory_limit("auto", 1, order.neighbours, logger=logger) or 0,
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
    """Have tasks that nobody waits for raise SystemExit, at their next step in Python."""
    for thread in _busy():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
    end = time.monotonic() + _CLOSE
    while _busy() and time.monotonic() < end:
        await asyncio.sleep(0.01)


def _wait_for_the_end(scheduler: str) -> None:
    """The worker has closed. Rank 0 said why before, unless it is gone, or closed only this one."""
    while messages.receive(0, _LOOK) != LEAVE:
        try:
            socket.create_connection(get_address_host_port(scheduler), timeout=_LOOK).close()
        except OSError:
            if messages.receive(0, 0) == LEAVE:
                return
            _lost("its scheduler is gone")


def _lost(why: str) -> NoReturn:
    """Nobody will end this rank in order, and MPI cannot be left without rank 0."""
    rank = messages.numbers()[0]
    print(f"taskgrad: rank {rank} ends, as rank 0 is lost: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _leave() -> NoReturn:
    messages.send(0, LEAVE)
    messages.finalize(PATIENCE)
    messages.watch(PATIENCE)  # Python waits for threads that tasks have started
    if _busy():
        # Native code that does not return to Python. To tear down Python beside it ends in a crash;
        # and it has to be C's exit, not _exit, as MPICH tells its launcher of this end only there.
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.PyDLL(None).exit(0)
    sys.exit(0)
