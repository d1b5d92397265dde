"""The loss that a model computes itself, taken of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from taskgrad.graph.pytree import describe


def own_loss(output: Any, targets: Any = None) -> torch.Tensor:
    """The loss among a model's output: the output if it is one number, else its "loss".

    That is an item of a mapping, or an attribute. It is a loss function as others are; the targets
    are part of what the model was called with.

    Raises TypeError if there is none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif not isinstance(output, torch.Tensor):
        found = getattr(output, "loss", None)
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        return found
    if found is output:
        what = f"is one tensor, {describe(output)}"
    elif found is None:
        what = f"is of type {type(output).__name__} and has no loss"
    else:
        what = f"is of type {type(output).__name__}, and its loss is {describe(found)}"
    raise TypeError(
        "loss_fn=None takes the loss that the model computes itself: an output that is one number, "
        f"or the output's .loss or ['loss']. The output of this model {what}: give it what it "
        "computes a loss of (labels=, say) in the batch, or give the Trainer a loss_fn of (output, "
        "targets)"
    )
