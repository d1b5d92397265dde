"""Make a shard's optimizer and learning-rate scheduler, and check what they train."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from taskgrad.graph.pytree import describe
from taskgrad.worker_names import WorkerName

Groups = Sequence[tuple[Sequence[str], Mapping[str, Any]]]

_SHOWN = 8


def make_optimizer(
    factory: Callable[..., Any],
    parameters: Mapping[str, nn.Parameter],
    groups: Groups,
    worker: WorkerName,
) -> torch.optim.Optimizer:
    """An optimizer over these parameters, in groups: names, and the options of each.

    Raises TypeError if the factory does not return an optimizer; ValueError if the optimizer is
    over other tensors than these parameters, or leaves some of them out.
    """
    given: list[Any] = [
        {"params": [parameters[name] for name in names], **options} for names, options in groups
    ]
    if len(groups) == 1 and not groups[0][1]:
        [given] = [group["params"] for group in given]
    made = factory(given)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a function that makes one from parameters; on worker {worker} it "
            f"gave {_kind(made)}"
        )
    names = {id(parameters[name]): name for members, _ in groups for name in members}
    found = [p for group in made.param_groups for p in group["params"]]
    others = [p for p in found if id(p) not in names]
    if others:
        raise ValueError(
            f"the optimizer that was made on worker {worker} is over {len(others)} tensors that "
            f"are not the model's parameters there ({describe(others[0])}, for one), and would "
            "train those. Make it of the parameters that the function is given, and not of copies "
            "or of what it closes over: lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    missing = [names[i] for i in names.keys() - {id(p) for p in found}]
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise ValueError(
            f"the optimizer that was made on worker {worker} leaves out {len(missing)} of the "
            f"{len(names)} parameters that it was given ({shown}), and would not "
            "train those. Freeze what is not to be trained (requires_grad_(False)) before the "
            "chain is made"
        )
    return made


def make_scheduler(
    factory: Callable[..., Any], optimizer: torch.optim.Optimizer, monitor: str, worker: WorkerName
) -> Any:
    """A learning-rate scheduler of this optimizer.

    Raises TypeError if the factory does not return a scheduler, or one whose ``step`` cannot be
    called; ValueError if the scheduler is of another optimizer.
    """
    made = factory(optimizer)
    steps = not isinstance(made, type | torch.optim.Optimizer)
    if not steps or not callable(getattr(made, "step", None)):
        raise TypeError(
            "lr_scheduler is a function that makes a scheduler from an optimizer; on worker "
            f"{worker} it gave {_kind(made)}"
        )
    for part in _parts(made):
        for held in [part.optimizer] if hasattr(part, "optimizer") else vars(part).values():
            if isinstance(held, torch.optim.Optimizer) and held is not optimizer:
                raise ValueError(
                    f"the lr_scheduler that was made on worker {worker}, a {type(part).__name__}, "
                    "is of another optimizer than the one that it was given, and would not change "
                    "that one's learning rates. Make it of the optimizer that the function is "
                    "given: lambda optimizer: StepLR(optimizer, step_size=10)"
                )
        if part is not made and needs_metric(part, monitor) and not needs_metric(made, monitor):
            raise TypeError(
                f"lr_scheduler gave a {type(made).__name__} with a {type(part).__name__} in it, "
                "whose step() needs a metric that the outer one does not pass on: return a "
                f"{type(part).__name__} alone"
            )
    return made


def needs_metric(scheduler: Any, monitor: str) -> bool:
    """True if its ``step`` needs the value of a metric, as that of ``ReduceLROnPlateau`` does.

    Raises TypeError if it needs more arguments, or if it takes larger values for better ones, and
    `monitor`, the name of the metric, is a loss.
    """
    kinds = inspect.Parameter
    needed = [
        p
        for p in inspect.signature(scheduler.step).parameters.values()
        if p.default is kinds.empty and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    name = type(scheduler).__name__
    if len(needed) > 1 or any(p.kind is kinds.KEYWORD_ONLY for p in needed):
        raise TypeError(
            f"lr_scheduler gave a {name} whose step() needs {', '.join(p.name for p in needed)}; "
            "it is called without arguments, or with one metric"
        )
    if not needed and not isinstance(scheduler, ReduceLROnPlateau):
        return False
    if getattr(scheduler, "mode", None) == "max" and monitor in ("loss", "val_loss"):
        raise TypeError(
            f'lr_scheduler gave a {name} with mode="max"; it is given {monitor!r}, '
            'of which smaller values are better: use mode="min", or name another result of an '
            "epoch as the trainer's monitor"
        )
    return True


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those in it, as in a ``SequentialLR``."""
    yield scheduler
    for value in vars(scheduler).values() if hasattr(scheduler, "__dict__") else ():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, LRScheduler):
                yield from _parts(inner)


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
