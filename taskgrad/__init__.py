"""taskgrad: lazy torch models over Dask workers, differentiated where they ran."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgrad.chain import GraphChain
    from taskgrad.cluster.local import local_cluster
    from taskgrad.errors import (
        ClusterMismatchError,
        CotangentError,
        DerivativeError,
        LayerError,
        PlacementError,
        TapeError,
        TaskgradError,
        TravelError,
        WorkerLostError,
    )
    from taskgrad.graph.parallel import Parallel
    from taskgrad.kernels.function import fuse, vectorize
    from taskgrad.kernels.module import Elementwise
    from taskgrad.pullbacks import vjp
    from taskgrad.thunk import Thunk, collect, spawn
    from taskgrad.train.optimizer import Optimizer

__version__ = version("taskgrad")

_HOMES = {
    "GraphChain": "chain",
    "local_cluster": "cluster.local",
    "ClusterMismatchError": "errors",
    "CotangentError": "errors",
    "DerivativeError": "errors",
    "LayerError": "errors",
    "PlacementError": "errors",
    "TapeError": "errors",
    "TaskgradError": "errors",
    "TravelError": "errors",
    "WorkerLostError": "errors",
    "Parallel": "graph.parallel",
    "Elementwise": "kernels.module",
    "fuse": "kernels.function",
    "vectorize": "kernels.function",
    "Thunk": "thunk",
    "collect": "thunk",
    "spawn": "thunk",
    "Optimizer": "train.optimizer",
    "vjp": "pullbacks",
}

__all__ = [
    "ClusterMismatchError",
    "CotangentError",
    "DerivativeError",
    "Elementwise",
    "GraphChain",
    "LayerError",
    "Optimizer",
    "Parallel",
    "PlacementError",
    "TapeError",
    "TaskgradError",
    "Thunk",
    "TravelError",
    "WorkerLostError",
    "collect",
    "fuse",
    "local_cluster",
    "spawn",
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
