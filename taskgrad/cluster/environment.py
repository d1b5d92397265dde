"""Driver: check once that client, scheduler and workers run the same versions.

Different versions are an error. Different numbers of torch threads are not: machines differ, and a
laptop may drive a cluster. But sums are then split into other parts and have other bits. So a
warning lists the numbers where workers differ among themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from distributed import Client

from taskgrad.cluster import client_calls, tasks
from taskgrad.errors import ClusterMismatchError
from taskgrad.worker_names import WorkerName

logger = logging.getLogger("taskgrad")

_PACKAGES = ("taskgrad", "torch", "dask", "distributed", "python")


def check(client: Client, named: Callable[[str], WorkerName]) -> dict[str, int]:
    """Compare versions; returns the number of torch threads on each worker.

    `named` has the worker of an address, as it is printed.

    The scheduler's threads do not matter: it runs no torch. ClusterMismatchError, which lists what
    and where, if versions differ or taskgrad cannot be imported somewhere.
    """

    async def scheduler() -> Any:
        try:
            return await client.run_on_scheduler(tasks.torch_threads)
        except OSError:
            raise
        except Exception as error:
            return error

    async def questions() -> tuple[Any, Any, dict[str, Any]]:
        versions: Any = client.get_versions(packages=["taskgrad", "torch"])
        workers = client.run(tasks.torch_threads, on_error="return")
        return await asyncio.gather(versions, scheduler(), workers)

    versions, on_scheduler, threads = client_calls.call_with_deadline(
        client, questions, "which versions they run"
    )
    answers = {"scheduler": on_scheduler, **{f"worker {named(a)}": v for a, v in threads.items()}}
    problems = _different_versions(versions, named)
    for place, found in answers.items():  # taskgrad, or what it needs, is missing or broken there
        if isinstance(found, BaseException):
            problems.append(f"  taskgrad cannot be imported by {place}: {found}")
    if problems:
        raise ClusterMismatchError(
            "client, scheduler and workers must run the same versions; they differ in:\n"
            + "\n".join(problems)
            + "\nInstall the same packages everywhere (the same image, or the same environment) "
            "and restart what differs"
        )
    return threads


def _different_versions(versions: Any, named: Callable[[str], WorkerName]) -> list[str]:
    here = {**versions["client"]["packages"], "taskgrad": version("taskgrad")}
    places = {"scheduler": versions["scheduler"]}
    places |= {f"worker {named(address)}": v for address, v in versions["workers"].items()}
    problems = []
    for package in _PACKAGES:
        ours = _comparable(package, here.get(package))
        for place, found in places.items():
            theirs = _comparable(package, found["packages"].get(package))
            if theirs != ours:
                problems.append(f"  {package}: client {ours}, {place} {theirs or 'has none'}")
    return problems


def _comparable(package: str, version: str | None) -> str | None:
    """The part of a version that must agree: torch's release, Python's minor version."""
    if version is None:
        return None
    if package == "torch":
        return version.partition("+")[0]
    if package == "python":
        return ".".join(version.split(".")[:2])
    return version


class Threads:
    """The number of torch threads on each worker seen so far."""

    def __init__(self, named: Callable[[str], WorkerName]) -> None:
        self._named = named
        self._counts: dict[str, int] = {}
        self._warned = False

    def add(self, counts: Mapping[str, int]) -> None:
        """Add workers; warn once if their numbers differ."""
        self._counts |= counts
        if len(set(self._counts.values())) > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "torch uses different numbers of threads on the workers, so a call gives other "
                "bits on one than on another:\n%s\nTo have the same bits everywhere, start all "
                "workers with the same OMP_NUM_THREADS and MKL_NUM_THREADS",
                self._table(),
            )

    def _table(self) -> str:
        rows = [f"  client: {torch.get_num_threads()}"]
        for count in sorted(set(self._counts.values())):
            who = ", ".join(
                str(self._named(a)) for a, theirs in self._counts.items() if theirs == count
            )
            rows.append(f"  {who}: {count}")
        return "\n".join(rows)
