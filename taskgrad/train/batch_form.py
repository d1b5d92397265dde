"""What the batches of a trainer are: arguments of the model, and targets of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taskgrad.graph.pytree import describe
from taskgrad.graph.signature import Signature


@dataclass(frozen=True)
class BatchForm:
    """How a trainer reads its batches.

    Attributes
    ----------
    takes
        The arguments of the model, where they are known.
    own_loss
        True if the model computes the loss: a batch then has no targets, and a tuple or list are
        positional arguments.
    one_input
        True if the model is a function of one input, whatever a batch is.
    """

    takes: Signature | None
    own_loss: bool
    one_input: bool

    def of_item(self, item: Any, where: str) -> tuple[Any, Any]:
        """The inputs and targets of what a loader yields.

        Raises ValueError if it is not a pair where there are targets.
        """
        if self.own_loss:
            return item, None
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(
                f"{where} yields pairs (inputs, targets), each a tensor or a pytree of them; got "
                f"{describe(item)}"
            )
        return item[0], item[1]

    def inputs(self, x: Any) -> Any:
        """Inputs in the form that `arguments` takes: a dict for keywords, a tuple for positions.

        Raises TypeError if the model cannot be called with them.
        """
        if self.one_input:
            return x
        if self.takes is not None and self.takes.takes_keywords(x):
            return dict(x)
        if self.own_loss:
            x = tuple(x) if type(x) is list else x
            if self.takes is not None:
                self.takes.check_positional(len(x) if type(x) is tuple else 1)
        return x

    def arguments(self, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of the model, from what `inputs` returned."""
        if not self.one_input:
            if type(x) is dict and self.takes is not None and self.takes.takes_keywords(x):
                return (), x
            if self.own_loss and type(x) is tuple:
                return x, {}
        return (x,), {}

    def check_trains(self, x: Any, y: Any) -> None:
        """Raise unless a loss can be had of inputs, as `inputs` returned them, and targets."""
        if not self.own_loss:
            return
        if y is not None:
            raise TypeError(
                "the trainer has loss_fn=None, so the model computes the loss and takes all of a "
                "batch: give it as one, step({'input_ids': x, 'labels': y}) or step((x, y))"
            )
        causal = self.takes is not None and self.takes.shifts_labels
        if causal and isinstance(x, Mapping) and x.get("labels") is None:
            raise ValueError(
                "the trainer has loss_fn=None, and the model computes a loss only if a batch has "
                f"'labels'; this one has {', '.join(map(repr, x))}"
            )
