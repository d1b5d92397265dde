"""taskgrad: lazy torch models over Dask workers, differentiated where they ran."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgrad.chain import GraphChain
    from taskgrad.cluster.local import local_cluster
    from taskgrad.errors import (
        CheckpointError,
        ClusterMismatchError,
        CollectiveError,
        CotangentError,
        DerivativeError,
        LayerError,
        MemoryLimitError,
        PlacementError,
        TapeError,
        TaskgradError,
        TravelError,
        WorkerLostError,
    )
    from taskgrad.graph.parallel import Parallel
    from taskgrad.graph.weights import load_state_dict
    from taskgrad.kernels.function import fuse, vectorize
    from taskgrad.kernels.module import Elementwise
    from taskgrad.maps.differentiable.mapping import map
    from taskgrad.maps.mpi.front import main, rank, size
    from taskgrad.maps.streaming.imap import imap, starmap
    from taskgrad.pullbacks import vjp
    from taskgrad.spmd.collectives import (
        all_gather,
        all_to_all,
        axis_index,
        axis_size,
        pmax,
        pmean,
        pmin,
        ppermute,
        psum,
        psum_scatter,
    )
    from taskgrad.spmd.pmap import pmap
    from taskgrad.thunk import Thunk, collect, spawn
    from taskgrad.train.callbacks import Callback
    from taskgrad.train.optimizer import Optimizer
    from taskgrad.train.trainer import Trainer
    from taskgrad.worker.randomness import random_stream

__version__ = version("taskgrad")

_HOMES = {
    "GraphChain": "chain",
    "local_cluster": "cluster.local",
    "CheckpointError": "errors",
    "ClusterMismatchError": "errors",
    "CollectiveError": "errors",
    "CotangentError": "errors",
    "DerivativeError": "errors",
    "LayerError": "errors",
    "MemoryLimitError": "errors",
    "PlacementError": "errors",
    "TapeError": "errors",
    "TaskgradError": "errors",
    "TravelError": "errors",
    "WorkerLostError": "errors",
    "Parallel": "graph.parallel",
    "load_state_dict": "graph.weights",
    "Elementwise": "kernels.module",
    "fuse": "kernels.function",
    "vectorize": "kernels.function",
    "map": "maps.differentiable.mapping",
    "imap": "maps.streaming.imap",
    "starmap": "maps.streaming.imap",
    "main": "maps.mpi.front",
    "rank": "maps.mpi.front",
    "size": "maps.mpi.front",
    "all_gather": "spmd.collectives",
    "all_to_all": "spmd.collectives",
    "axis_index": "spmd.collectives",
    "axis_size": "spmd.collectives",
    "pmax": "spmd.collectives",
    "pmean": "spmd.collectives",
    "pmin": "spmd.collectives",
    "ppermute": "spmd.collectives",
    "psum": "spmd.collectives",
    "psum_scatter": "spmd.collectives",
    "pmap": "spmd.pmap",
    "Thunk": "thunk",
    "collect": "thunk",
    "spawn": "thunk",
    "Callback": "train.callbacks",
    "Optimizer": "train.optimizer",
    "Trainer": "train.trainer",
    "random_stream": "worker.randomness",
    "vjp": "pullbacks",
}

__all__ = [
    "Callback",
    "CheckpointError",
    "ClusterMismatchError",
    "CollectiveError",
    "CotangentError",
    "DerivativeError",
    "Elementwise",
    "GraphChain",
    "LayerError",
    "MemoryLimitError",
    "Optimizer",
    "Parallel",
    "PlacementError",
    "TapeError",
    "TaskgradError",
    "Thunk",
    "Trainer",
    "TravelError",
    "WorkerLostError",
    "all_gather",
    "all_to_all",
    "axis_index",
    "axis_size",
    "collect",
    "fuse",
    "imap",
    "load_state_dict",
    "local_cluster",
    "main",
    "map",
    "pmap",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "psum",
    "psum_scatter",
    "random_stream",
    "rank",
    "size",
    "spawn",
    "starmap",
    "vectorize",
    "vjp",
]


# Names load on first use: `import dask` itself imports this package for its `dask.sizeof`
# entry point, when neither dask nor torch may be imported from here.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskgrad' has no attribute {name!r}")
    value = getattr(import_module(f"taskgrad.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
