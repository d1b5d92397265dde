"""Give values to tensors that came to a worker without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taskgrad.errors import CheckpointError, LayerError
from taskgrad.formats.conversions import Conversion, Source
from taskgrad.formats.weights import Stored, opened
from taskgrad.graph.class_init import InitCall
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

    def call(method: Callable[..., Any], name: str, stream: str, *arguments: Any) -> None:
        what = f"{method.__name__}() of {name!r}"
        with (
            layer_errors(what, name, worker, catch=BaseException),
            random_stream(seed, _MAKING, _MAKING, stream),
        ):
            method(*arguments)

    for inner, name, adapters in plan.resets:
        part = layer.get_submodule(inner)
        for adapter, how in adapters:
            reset: Any = part.reset_lora_parameters
            call(reset, name, f"{name} {adapter}", adapter, how)
        if not adapters:
            own = reset_of(part)
            assert own is not None
            call(own, name, name)
    roots = [root.unpack() for root in plan.roots]
    for init in plan.calls:
        module = _with_tensors(layer, init)
        if init.root is None:
            own = reset_of(module)
            assert own is not None
            call(own, init.stream, init.stream)
        else:
            with torch.no_grad():
                call(roots[init.root]._init_weights, init.stream, init.stream, module)
    _read(named_tensors(layer), plan, worker)
    tensors = named_tensors(layer)
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


def _with_tensors(layer: nn.Module, init: InitCall) -> nn.Module:
    """The module that an initialization is called for, with those tensors of the layer it sets."""
    module: nn.Module = init.module.unpack()
    owner, part = layer.get_submodule(init.owner), module.get_submodule(init.path)
    for name in init.tensors:
        for table, ours in ((part._parameters, owner._parameters), (part._buffers, owner._buffers)):
            if name in ours:
                table[name] = ours[name]  # type: ignore[assignment]
    return module


def _read(tensors: dict[str, torch.Tensor], plan: InitPlan, worker: WorkerName) -> None:
    """Read values from files into tensors."""
    if not plan.reads:
        return
    by_file: dict[str, list[str]] = {}
    for name, source in plan.reads.items():
        first = source if isinstance(source, Stored) else source.conversion.sources[0][2]
        by_file.setdefault(first.file, []).append(name)
    with ExitStack() as stack, torch.no_grad():
        handles: dict[str, Any] = {}
        made: dict[Conversion, dict[str, torch.Tensor]] = {}

        def read(stored: Stored) -> torch.Tensor:
            if stored.file not in handles:
                if not Path(stored.file).is_file():
                    raise CheckpointError(
                        f"worker {worker} does not see {stored.file}: weights lie on a filesystem "
                        "that the driver and all workers share"
                    )
                handles[stored.file] = stack.enter_context(opened(stored.file))
            return stored.read(handles[stored.file])

        def value_of(source: Source) -> torch.Tensor:
            if isinstance(source, Stored):
                return read(source)
            if source.conversion not in made:
                made.clear()  # its tensors follow one another
                made[source.conversion] = source.conversion.run(read)
            return made[source.conversion][source.name]

        for names in by_file.values():
            for name in names:
                value = value_of(plan.reads[name])
                for other in plan.equal.get(name, ()):
                    if not torch.equal(value, value_of(other)):
                        raise CheckpointError(
                            f"{name!r} is tied to another parameter of the model, and the files "
                            "have other values for that. Make the model without tying them "
                            "(config.tie_word_embeddings=False in transformers)"
                        )
                tensors[name].copy_(value)
