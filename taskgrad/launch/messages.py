"""Messages between the ranks of an MPI job, to start a Dask cluster and to end it.

MPI carries which ranks there are and on which host, the scheduler's address, and the order to exit.
All else goes over Dask's connections. Every wait has a deadline; so there are no collective calls,
and ``recv`` is only called once a message is there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from taskgrad.cluster.config import deadline
from taskgrad.errors import TaskgradError

_TAG = 0x7467
_POLL_S = 0.01

# Environment variables in which launchers pass a process its rank, and the number of ranks.
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID")
_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched() -> bool:
    """True if a launcher (mpirun, mpiexec, srun) started this process as one of a job's.

    A rank's own children inherit these variables; those of multiprocessing, and so Dask's worker
    processes, can be told from ranks.
    """
    if multiprocessing.parent_process() is not None:
        return False
    return any(name in os.environ for name in _RANK_VARIABLES) or _promised() > 1


def _promised() -> int:
    """The number of processes by the launcher's variables; 1 where there are none."""
    found = [os.environ.get(name, "") for name in _SIZE_VARIABLES]
    return max([1, *(int(count) for count in found if count.isdigit())])


@functools.cache
def world() -> Any:
    """MPI's communicator of all ranks; the first call starts MPI.

    Raises TaskgradError if there is no mpi4py, or it works with another MPI than the one that
    started this process.
    """
    try:
        comm = _mpi_starts_when_every_rank_has_called_tg_main(deadline("start"))
    except (ImportError, RuntimeError) as error:
        raise TaskgradError(
            "this process was started by mpirun, mpiexec or srun, but mpi4py cannot be used: "
            f"{error}. Install it with pip install 'taskgrad[mpi]', and an MPI if the machine has "
            "none (pip install mpich)"
        ) from error
    if comm.Get_size() < _promised():
        raise TaskgradError(
            f"{_promised()} processes were started, but MPI knows of {comm.Get_size()}: mpirun "
            f"(or srun) belongs to another MPI than {_library()}, which mpi4py uses here. "
            f"Use that one's mpirun, or build mpi4py for yours (pip install --no-binary mpi4py "
            "mpi4py)"
        )
    return comm


def _mpi_starts_when_every_rank_has_called_tg_main(seconds: float) -> Any:
    """Start MPI. Its own start waits for all ranks, for ever, and holds Python's lock meanwhile.

    So only the watch in C can end a process there. It prints the stack and nothing else: the name
    of this function says what was waited for. Ranks that print none are the ones that are missing.
    """
    with watched(seconds):
        from mpi4py import MPI
    return MPI.COMM_WORLD


@functools.cache
def numbers() -> tuple[int, int]:
    """This rank, and how many there are; still known after MPI was finalized."""
    return world().Get_rank(), world().Get_size()


def _library() -> str:
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().split()[:3])


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """End this process, with its stack on stderr, if the block takes longer, whatever holds it."""
    watch(seconds)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def watch(seconds: float) -> None:
    """End this process, with its stack on stderr, if it still runs after so long."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


_sent: list[Any] = []  # MPI reads a message until it has been sent


def send(rank: int, message: Any) -> None:
    """Send a short message to a rank; returns at once."""
    _sent.append(world().isend(message, dest=rank, tag=_TAG))


def receive(rank: int, seconds: float) -> Any:
    """The next message of a rank; None if none has come after so long."""
    comm, end = world(), time.monotonic() + seconds
    while not comm.iprobe(source=rank, tag=_TAG):
        if time.monotonic() >= end:
            return None
        time.sleep(_POLL_S)
    return comm.recv(source=rank, tag=_TAG)


def receive_each(ranks: Collection[int], seconds: float) -> dict[int, Any]:
    """The next message of each of these ranks; without those of which none has come in time."""
    end = time.monotonic() + seconds
    found = {rank: receive(rank, max(0.0, end - time.monotonic())) for rank in ranks}
    return {rank: message for rank, message in found.items() if message is not None}


def host() -> str:
    """The name of this rank's host, the same for all ranks there."""
    from mpi4py import MPI

    return str(MPI.Get_processor_name())


def abort() -> None:
    """End all ranks, now and with an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    world().Abort(1)


def finalize(seconds: float) -> None:
    """Finalize MPI, which waits for all ranks; if that takes longer, this process ends."""
    from mpi4py import MPI

    with watched(seconds):
        MPI.Finalize()
