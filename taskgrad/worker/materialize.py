"""Give values to tensors that came to a worker without."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from taskgrad.errors import CheckpointError, LayerError
from taskgrad.formats.weights import opened
from taskgrad.graph.deferred_init import InitPlan, named_tensors, reset_of
from taskgrad.worker.failures import layer_errors
from taskgrad.worker.randomness import random_stream
from taskgrad.worker_names import WorkerName

# Where a trainer's streams have the numbers of step and microbatch.
_MAKING = -1


def make_values(layer: nn.Module, plan: InitPlan, seed: int, worker: WorkerName) -> None:
    """Let modules set their values, each from a stream fixed by the seed and its name; read files.

    Raises LayerError if a module raised, or left some of its values unset; CheckpointError if a
    file cannot be read, or is damaged.
    """
    for inner, name in plan.resets:
        reset = reset_of(layer.get_submodule(inner))
        assert reset is not None
        what = f"reset_parameters() of {name!r}"
        with (
            layer_errors(what, name, worker, catch=BaseException),
            random_stream(seed, _MAKING, _MAKING, name),
        ):
            reset()
    tensors = named_tensors(layer)
    by_file: dict[str, list[str]] = {}
    for name, stored in plan.reads.items():
        by_file.setdefault(stored.file, []).append(name)
    with torch.no_grad():
        for file, names in by_file.items():
            if not Path(file).is_file():
                raise CheckpointError(
                    f"worker {worker} does not see {file}: weights lie on a filesystem that the "
                    "driver and all workers share"
                )
            with opened(file) as handle:
                for name in names:
                    tensors[name].copy_(plan.reads[name].read(handle))
    for name in plan.unsent:
        tensor = tensors[name].detach()
        if name not in plan.reads and tensor.is_floating_point() and tensor.isnan().any():
            raise LayerError(
                f"reset_parameters() on worker {worker} left {name!r} without values: it was made "
                "on the meta device, and what __init__ does to it there is lost. Set all of it in "
                "reset_parameters()",
                name,
                worker.address,
                None,
            )
