"""Try the user's optimizer factory on the driver, and make the tasks that call it on workers."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from taskgrad.graph.leaves import Leaf
from taskgrad.graph.pack import Packed
from taskgrad.graph.shards import ShardCall
from taskgrad.layout import Layout
from taskgrad.worker import optimizing
from taskgrad.worker.training_state import TrainingOptions

OptimizerFactory = Callable[..., torch.optim.Optimizer]
Groups = list[tuple[list[str], dict[str, Any]]]


def example_of(factory: Any, layout: Layout) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer over a small parameter that has a gradient and the attributes of a chain's own.

    Raises TypeError if `factory` does not make an optimizer, or one whose step needs a closure.
    """
    example = "a class of torch.optim, or functools.partial(torch.optim.SGD, lr=0.1)"
    if not callable(factory) or isinstance(factory, torch.optim.Optimizer):
        raise TypeError(
            f"the optimizer is what makes one from parameters on each worker, {example}; got "
            f"{type(factory).__name__}"
        )
    with torch.enable_grad():
        parameter = nn.Parameter(torch.zeros(8, 8))
    parameter.grad = torch.zeros(8, 8)
    for info in reversed(layout.tensors.values()):  # of each attribute the first example
        if info.requires_grad and not info.is_buffer:
            vars(parameter).update(info.attributes)
    try:
        made = factory([parameter])
    except TypeError as error:
        raise TypeError(
            f"the optimizer cannot be made from parameters: {error}. Give {example}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"the optimizer is what makes one from parameters, {example}; this one gave a "
            f"{type(made).__name__}"
        )
    if _needs_closure(made):
        raise TypeError(
            f"{type(made).__name__} evaluates the model inside its step (it needs a closure), "
            "which a model on workers cannot: take an optimizer that needs the gradients alone"
        )
    if not any(p is parameter for group in made.param_groups for p in group["params"]):
        raise TypeError(
            "the optimizer is made of other parameters than it is given: of copies, or of what the "
            "function closes over, which are not those on the workers. Make it of the parameters "
            "that the function is given: lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    return made, parameter


# Options that torch's schedulers and checkpoints put into groups.
_BESIDE = frozenset({"initial_lr", "max_lr", "min_lr", "swa_lr", "name"})


def check_group_options(
    patterns: Mapping[str, Mapping[str, Any]], example: torch.optim.Optimizer
) -> None:
    """Raise ValueError for an option that this kind of optimizer does not read.

    An optimizer that is not torch's own may read options that it has no default for; there only
    what looks like a mistyped option is refused.
    """
    known = example.defaults.keys() | example.param_groups[0].keys()
    own = type(example).__module__.startswith("torch.")
    for pattern, options in patterns.items():
        for option in options.keys() - known - _BESIDE:
            close = difflib.get_close_matches(str(option), known, n=1, cutoff=0.8)
            if own or close:
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"param_groups[{pattern!r}] has an option {option!r}, which "
                    f"{type(example).__name__} does not read{meant}; it has "
                    f"{', '.join(sorted(known - {'params'}))}"
                )


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    if isinstance(optimizer, torch.optim.LBFGS):
        return True
    parameters = inspect.signature(type(optimizer).step).parameters.values()
    plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return any(p.default is p.empty for p in plain[1:])


def state_per_parameter(factory: Any, layout: Layout) -> float | None:
    """The numbers of state that an optimizer keeps for each number of a parameter, by trial.

    None if a small parameter is no example for it. Raises what `example_of` does.
    """
    made, parameter = example_of(factory, layout)
    try:
        made.step()
    except Exception:  # it wants other parameters than this one
        return None
    kept = [v for v in made.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() for v in kept if v.dim()) / parameter.numel()


def parameter_groups(names: Sequence[str], patterns: Mapping[str, Mapping[str, Any]]) -> Groups:
    """The names in groups: one for each pattern that comes first to match, and the rest.

    Raises ValueError if a pattern matches no parameter, or has options that are the trainer's own.
    """
    for pattern, options in patterns.items():
        if "params" in options:
            raise ValueError(
                f"param_groups[{pattern!r}] has an option 'params': the pattern says which "
                "parameters are in the group"
            )
    groups: Groups = [([], {}), *(([], dict(options)) for options in patterns.values())]
    for name in names:
        matching = (i for i, p in enumerate(patterns, 1) if fnmatch.fnmatchcase(name, p))
        groups[next(matching, 0)][0].append(name)
    for pattern, (members, _) in zip(patterns, groups[1:], strict=True):
        if not members:
            raise ValueError(
                f"no trainable parameter is left for {pattern!r}: the first pattern to match takes "
                f"a name. The names are {', '.join(list(names)[:8])}, ..."
            )
    return groups


def optimizers_on(
    layout: Layout,
    factory: OptimizerFactory,
    groups: Groups,
    options: TrainingOptions | None = None,
    loss: Packed | None = None,
    in_files: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> list[ShardCall]:
    """Tasks that make an optimizer on each shard, over what lives there of these parameters.

    For a trainer also what its `options` say, and the loss function where the model's output is;
    `in_files` says by worker what is kept in files there.
    """
    makes = []
    for shard in layout.shards:
        mine = {name for name in layout.trainable if layout.home(name) is shard}
        own = loss if layout.may_end_at(shard) else None
        arguments = {
            "factory": factory,
            "groups": [([n for n in names if n in mine], given) for names, given in groups],
            "options": options
            and replace(
                options,
                names=[name for name in layout.trainable if name in mine],
                in_files=in_files.get(shard.worker, frozenset()),
                loss=own.data if own else b"",
            ),
        }
        after = [Leaf(own.tensors, needs_grad=False)] if own else []
        makes.append(layout.task(shard, optimizing.make, arguments, after=after, name="optimizer"))
    return makes
