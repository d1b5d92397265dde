"""Running real scripts under the environment's own mpirun, and finding what is left of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

# Not the one that PATH finds: it may be another MPI's than the one that mpi4py loads.
MPIRUN = Path(sys.executable).with_name("mpirun")
_MARK = "TASKGRAD_TEST_JOB"


class Job:
    """One script in processes of its own."""

    def __init__(
        self,
        script: Path,
        ranks: int | None,
        *args: str,
        options: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self._id = uuid.uuid4().hex
        launcher = [] if ranks is None else [str(MPIRUN), *options, "-n", str(ranks)]
        self.process = subprocess.Popen(
            [*launcher, sys.executable, str(script), *args],
            env={**environment(), **(env or {}), _MARK: self._id},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, seconds: float = 200) -> tuple[int, str, str]:
        """Its exit status, and what it wrote to stdout and stderr."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.kill()
        return self.process.returncode, out, err

    def wait_for(self, line: str) -> None:
        """Return once the script has printed this line."""
        assert self.process.stdout is not None
        for found in self.process.stdout:
            if found.strip() == line:
                return
        raise AssertionError(self.finish())

    def alive(self) -> list[psutil.Process]:
        """All processes of this job, its children's children and the launcher's."""
        return [p for p in psutil.process_iter() if self._is_ours(p)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get(_MARK) == self._id
            return ours and process.status() != psutil.STATUS_ZOMBIE
        return False

    def rank(self, rank: int) -> psutil.Process:
        """The Python process of a rank."""
        [found] = [p for p in self.alive() if p.environ().get("PMI_RANK") == str(rank)]
        return found

    def gone_within(self, seconds: float) -> bool:
        """Whether no process of it is left, at last after so long."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """End what is left of it."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def job(script: Path, ranks: int | None, options: tuple[str, ...] = ()) -> Iterator[Job]:
    """A job that is over with the block."""
    started = Job(script, ranks, options=options)
    try:
        yield started
    finally:
        started.kill()
        started.process.communicate()


def run(
    script: Path, ranks: int | None, *args: str, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a script to its end, on so many ranks, or without MPI."""
    return Job(script, ranks, *args, env=env).finish()


def environment() -> dict[str, str]:
    """Ours, with the package that is tested, and without what a launcher of ours may have set."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "SLURM_"))}
    return {**kept, "PYTHONPATH": path}
