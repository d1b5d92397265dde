"""Streaming maps: taskgrad.imap against multiprocessing, joblib and mpi4py.futures.

Two worker processes each. The function computes for a fixed time and returns its item, a numpy
array: 1 KB or 1 MB in, the same out. (It makes hashes, as many as took so long before. An empty
loop of Python is up to 15 % faster in one process than in the next, by its memory addresses.)
taskgrad chooses its chunks itself. Each rival has the best of a few chunk sizes, found first, for
each kind of item; one that takes more than twice as long as the best then is left out. The others
take turns with taskgrad; the ratio is to the rival with the lowest median.

``Pool.imap`` and mpi4py's ``MPIPoolExecutor.map`` with ``chunksize``, joblib's ``Parallel`` with
``return_as="generator"`` and ``batch_size``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks._report import Report, arguments

WORKERS = 2
ROUNDS = 3
SECONDS = {"10us": 10e-6, "100us": 100e-6, "1ms": 1e-3, "10ms": 10e-3}
SIZES = {"1kb": 1_000, "1mb": 1_000_000}
COUNTS = {
    **{"10us_1kb": 150_000, "100us_1kb": 60_000, "1ms_1kb": 12_000, "10ms_1kb": 1_200},
    **{"10us_1mb": 500, "100us_1mb": 500, "1ms_1mb": 1_000, "10ms_1mb": 600},
}
CHUNK_SECONDS = (0.005, 0.02, 0.08)
MOST_BYTES = 16 << 20  # of a chunk
BLOCK = bytes(256)
DISTINCT = {
    "1kb": 4_096,
    "1mb": 32,
}  # items; as many at most in a chunk, so that none is pickled once for two

Map = Callable[[Callable[[Any], Any], Iterable[Any], Any], Iterator[Any]]


def work(loops: int, item: Any) -> Any:
    """Compute for a while, and return the item."""
    for _ in range(loops):
        hashlib.sha256(BLOCK)
    return item


def loops_for(seconds: float) -> int:
    """How many turns of `work` take so long here."""
    count = 2_000
    best = min(_timed(functools.partial(work, count, None)) for _ in range(50))
    return max(1, round(count * seconds / best))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def items(size: str, count: int) -> Iterator[np.ndarray]:
    """So many arrays, each another object than those near it."""
    return itertools.islice(itertools.cycle(_arrays(size)), count)


@functools.cache
def _arrays(size: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random(SIZES[size] // 4, np.float32) for _ in range(DISTINCT[size])]


def measure(run: Map, case: str, loops: int, count: int, chunksize: Any) -> float:
    """Seconds for a whole map."""
    size = case.partition("_")[2]
    fn = functools.partial(work, loops)
    _arrays(size)
    return _timed(lambda: deque(run(fn, items(size, count), chunksize), maxlen=0))


class Pool:
    """multiprocessing."""

    def __init__(self) -> None:
        self._pool = multiprocessing.get_context("spawn").Pool(WORKERS)

    def measure(self, case: str, loops: int, count: int, chunksize: Any) -> float:
        """Seconds for a whole map."""
        return measure(self._pool.imap, case, loops, count, chunksize)

    def close(self) -> None:
        """End its processes."""
        self._pool.terminate()
        self._pool.join()


class Joblib:
    """joblib with its own process pool, loky."""

    def measure(self, case: str, loops: int, count: int, chunksize: Any) -> float:
        """Seconds for a whole map."""
        return measure(self._map, case, loops, count, chunksize)

    def _map(self, fn: Any, given: Iterable[Any], chunksize: Any) -> Iterator[Any]:
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=WORKERS, return_as="generator", batch_size=chunksize)
        found: Iterator[Any] = parallel(delayed(fn)(item) for item in given)
        return found

    def close(self) -> None:
        """End its processes."""
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)


class Mpi:
    """mpi4py.futures, in processes of its own under mpiexec; paused while others are measured."""

    def __init__(self) -> None:
        # That of this environment, as mpi4py is.
        mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
        command = [mpiexec, "-n", str(WORKERS + 1), sys.executable, "-m", "mpi4py.futures"]
        self._process = subprocess.Popen(
            [*command, "-m", "benchmarks.maps", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask("10us_1kb", 1, 1, 1)  # all of them are there
        self._ranks = [
            child
            for child in psutil.Process(self._process.pid).children(recursive=True)
            if "mpi4py.futures" in child.cmdline()
        ]
        self._pause()

    def measure(self, *request: Any) -> float:
        """Seconds for a whole map."""
        for rank in self._ranks:
            rank.resume()
        try:
            return self._ask(*request)
        finally:
            self._pause()

    def _pause(self) -> None:
        """They look for work all the time, and would take that time from the others."""
        for rank in self._ranks:
            rank.suspend()

    def _ask(self, *request: Any) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("mpiexec ended before its time")
        return float(line)

    def close(self) -> None:
        """End its processes."""
        assert self._process.stdin is not None
        for rank in self._ranks:
            rank.resume()
        self._process.stdin.close()
        self._process.wait(60)


def serve() -> None:
    """The master of mpi4py.futures: measures what is requested on its standard input."""
    from mpi4py.futures import MPIPoolExecutor

    with MPIPoolExecutor(WORKERS) as executor:

        def run(fn: Any, given: Iterable[Any], chunksize: Any) -> Iterator[Any]:
            return executor.map(fn, given, chunksize=chunksize)

        for line in sys.stdin:
            print(measure(run, *json.loads(line)), flush=True)


class Ours:
    """taskgrad on a local cluster."""

    def __init__(self) -> None:
        import taskgrad as tg

        self._tg = tg
        self._client = tg.local_cluster(n_workers=WORKERS, dashboard_address=":0")

    def measure(self, case: str, loops: int, count: int, chunksize: Any) -> float:
        """Seconds for a whole map; the chunk size is not given."""
        return measure(self._map, case, loops, count, chunksize)

    def _map(self, fn: Any, given: Iterable[Any], chunksize: Any) -> Iterator[Any]:
        return self._tg.imap(fn, given, client=self._client)

    def close(self) -> None:
        """End its processes."""
        self._client.close()


def sizes(case: str) -> list[int]:
    """Chunk sizes worth a try."""
    seconds, _, size = case.partition("_")
    most = min(DISTINCT[size], MOST_BYTES // SIZES[size])
    by_time = {round(s / SECONDS[seconds]) for s in CHUNK_SECONDS}
    return sorted({min(max(1, n), most) for n in by_time | ({1} if size == "1mb" else set())})


def main() -> None:
    """Measure, print, write."""
    options = arguments("maps", __doc__)
    report = Report("maps")
    rivals = {"pool": Pool(), "joblib": Joblib(), "mpi4py": Mpi()}
    ours = Ours()
    try:
        for case in COUNTS:
            _measure(report, case, ours, rivals)
    finally:
        for one in (ours, *rivals.values()):
            one.close()
    report.finish(options.json)


def _measure(report: Report, case: str, ours: Ours, rivals: dict[str, Any]) -> None:
    count, loops = COUNTS[case], loops_for(SECONDS[case.partition("_")[0]])
    best: dict[str, tuple[float, Any]] = {}
    for name, rival in rivals.items():
        tried = [*sizes(case), *(["auto"] if name == "joblib" else [])]
        rival.measure(case, loops, count // 40, tried[0])  # to warm up
        best[name] = min(
            ((rival.measure(case, loops, count // 20, n), n) for n in tried), key=_first
        )
    limit = 2 * min(best.values(), key=_first)[0]
    close = [name for name, (seconds, _) in best.items() if seconds <= limit]
    ours.measure(case, loops, count // 20, "auto")
    took: dict[str, list[float]] = {name: [] for name in ("taskgrad", *close)}
    for _ in range(ROUNDS):
        took["taskgrad"].append(ours.measure(case, loops, count, "auto") / count)
        for name in close:
            took[name].append(rivals[name].measure(case, loops, count, best[name][1]) / count)
    for name, each in took.items():
        chunk = "" if name == "taskgrad" else f"_{best[name][1]}"
        report.figure(f"{case}_{name}{chunk}", each)
    fastest = min(close, key=lambda name: statistics.median(took[name]))
    report.ratio(f"imap_{case}_vs_best", took["taskgrad"], took[fastest])


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        main()
