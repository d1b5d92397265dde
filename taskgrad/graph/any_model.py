"""A model of any kind in layers: listed if it is sequential, else cut and captured."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taskgrad.graph.activation import Activation, CannotFollowError
from taskgrad.graph.capture import Capture
from taskgrad.graph.cut import Cut, matching, may_open, pieces
from taskgrad.graph.following import Following
from taskgrad.graph.layers import Model, flatten_model, is_sequential, kind_of, model_in_pieces
from taskgrad.graph.pytree import describe
from taskgrad.graph.sending import reached

logger = logging.getLogger("taskgrad")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _ValueReadError(CannotFollowError):
    """A forward reads the value of an activation, when there is none yet."""


@dataclass
class LayeredModel:
    """A model in layers.

    Attributes
    ----------
    flat
        The layers; in the order in which the example passes them, if there was one.
    capture
        What finds the graph of a call; None if the model is sequential, or one layer.
    example
        The arguments of a call, if they were given.
    whole
        For modules that are one layer though they have parts that could be cut, why that is so.
    """

    flat: Model
    capture: Capture | None = None
    example: Arguments | None = None
    whole: dict[str, str] = field(default_factory=dict)


def in_layers(
    model: nn.Module, example_inputs: Any, cut: Cut, keep_together: Any, workers: int
) -> LayeredModel:
    """Cut a model into layers; for the arguments see `GraphChain`.

    Raises what `pieces` and the forward do, if the example is not one of its inputs TypeError.
    """
    sequential = not isinstance(model, nn.Module) or is_sequential(model)
    steered = cut is not None or keep_together is not None
    example = None if example_inputs is None else _arguments(model, example_inputs)
    if (sequential and not steered) or not may_open(model):
        if steered:
            pieces(model, cut, keep_together, workers)  # its errors
        return LayeredModel(flatten_model(model))
    title = type(model).__name__
    names = dict(model.named_modules())
    kept = matching(keep_together, names, "keep_together")
    further: set[str] = set()
    whole: dict[str, str] = {}
    while True:
        found = pieces(model, cut, kept | whole.keys(), workers, frozenset(further))
        if not found.opened:
            _say(whole, title)
            return LayeredModel(flatten_model(model), whole=whole)
        parts = found.parts
        flat = model_in_pieces(model, parts)
        reached(flat)  # its errors name the layer that cannot be sent
        capture = Capture(model, flat.layers, list(found.opened), title)
        if example is None:
            return LayeredModel(flat, capture)
        try:
            *_, following = capture.follow(*example, None, _no_value)
        except _ValueReadError:  # at the first call there are values
            return LayeredModel(flat, capture, example)
        except CannotFollowError as error:
            if error.cut_further and error.module not in further:
                further.add(error.module)
                continue
            if error.module in whole:
                raise
            whole[error.module] = str(error)
            continue
        _say(whole, title)
        used = dict.fromkeys(following.used)
        order = [*used, *(layer.index for layer in flat.layers if layer.index not in used)]
        in_order = model_in_pieces(model, [parts[i] for i in order])
        capture = Capture(model, in_order.layers, list(found.opened), title)
        in_order.activations = [following.saved[i] for i in order]
        return LayeredModel(in_order, capture, example, whole)


def _no_value(following: Following, activation: Activation) -> torch.Tensor:
    raise _ValueReadError(str(following.cannot("its forward reads the value of an activation")), "")


def _say(whole: Mapping[str, str], title: str) -> None:
    for name, why in whole.items():
        logger.warning(
            "%s is one layer, on one worker, as its forward cannot be followed: %s. To cut it, "
            "change that; to keep it so without this warning, give keep_together=[%r].",
            name or title,
            why,
            name,
        )


def _arguments(model: nn.Module, example_inputs: Any) -> Arguments:
    """The example as (args, kwargs); TypeError unless the forward takes it."""
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif (
        isinstance(example_inputs, tuple)
        and len(example_inputs) == 2
        and isinstance(example_inputs[0], tuple | list)
        and isinstance(example_inputs[1], Mapping)
    ):
        args, kwargs = tuple(example_inputs[0]), dict(example_inputs[1])
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        kwargs = {}
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            "example_inputs are the arguments of the model's forward, (args, kwargs); "
            f"{kind_of(model)} does not take {describe((args, kwargs))}: {error}"
        ) from None
    return args, kwargs
