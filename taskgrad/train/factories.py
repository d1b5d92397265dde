"""A trainer's arguments as the user gives them, checked before anything is submitted."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from taskgrad.arguments import shown
from taskgrad.graph import pack
from taskgrad.graph.layers import ParameterInfo, kind_of

OptimizerFactory = Callable[..., torch.optim.Optimizer]
Groups = list[tuple[list[str], dict[str, Any]]]


def attributes_of(parameters: Iterable[ParameterInfo]) -> dict[str, Any]:
    """An example of each attribute that trainable parameters have."""
    found: dict[str, Any] = {}
    for info in parameters:
        if info.requires_grad and not info.is_buffer:
            found = {**info.attributes, **found}
    return found


def example_of(
    factory: Any, attributes: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer of this kind over one small parameter with a gradient and these attributes.

    Raises
    ------
    TypeError
        `factory` does not make an optimizer, or one whose step needs a closure.
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
    vars(parameter).update(attributes)
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


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_counts(**counts: Any) -> None:
    """Raise ValueError unless these are whole numbers from 1 on."""
    for name, number in counts.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is a whole number from 1 on; got {shown(number)}")


def check_scheduler(lr_scheduler: Any) -> None:
    """Raise TypeError unless it can make a scheduler, or is None."""
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise TypeError(
            "lr_scheduler is what makes a scheduler from an optimizer on each worker, as "
            f"functools.partial(StepLR, step_size=1); got {type(lr_scheduler).__name__}"
        )


def precision(amp: str | None) -> torch.dtype | None:
    """The dtype of ``torch.autocast``; ValueError if there is none of that name."""
    if amp is not None and not (isinstance(amp, str) and amp in _PRECISIONS):
        raise ValueError(f'amp is None, "bf16" or "fp16"; got {shown(amp)}')
    return None if amp is None else _PRECISIONS[amp]


def state_per_parameter(factory: Any, attributes: Mapping[str, Any]) -> float | None:
    """How many numbers an optimizer keeps for each number of a parameter, found by trying it.

    None if a small parameter is no example for it. Raises what `example_of` does.
    """
    made, parameter = example_of(factory, attributes)
    try:
        made.step()
    except Exception:  # it wants other parameters than this one
        return None
    kept = [v for v in made.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(v.numel() for v in kept if v.dim()) / parameter.numel()


def parameter_groups(
    names: Sequence[str], patterns: Mapping[str, Mapping[str, Any]]
) -> list[tuple[list[str], dict[str, Any]]]:
    """The names in groups: one for each pattern that comes first to match, and the rest.

    Raises
    ------
    ValueError
        A pattern matches no parameter, or has options that are the trainer's own.
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


def adds_up(loss: Any) -> bool:
    """Whether a loss is a sum over samples, and not their mean."""
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    return options.get("reduction", getattr(loss, "reduction", "mean")) == "sum"


def packed_loss(loss: Any) -> tuple[pack.Packed, str]:
    """A loss function, ready to be sent, and its name.

    Raises
    ------
    TypeError
        It is not callable, cannot be pickled, or has parameters to train.
    """
    if isinstance(loss, type):
        raise TypeError(
            f"the loss is a class, {loss.__name__}: give an instance of it, {loss.__name__}()"
        )
    if not callable(loss):
        raise TypeError(
            "the loss is a function of (output, targets) such as torch.nn.functional.cross_entropy;"
            f" got {type(loss).__name__}"
        )
    packed = pack.pickle_or_explain(lambda: pack.pack(loss), "the loss")
    if any(t.requires_grad for t in packed.tensors):
        raise TypeError(
            f"the loss {kind_of(loss)!r} has parameters to train: make them a layer of the model, "
            "where the optimizer finds them"
        )
    return packed, kind_of(loss)
