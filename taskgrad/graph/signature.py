"""How a model can be called: the parameters of its forward, as the driver knows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_origin

from torch import nn


class Signature(NamedTuple):
    """The arguments that a model's forward takes.

    Attributes
    ----------
    model
        The name of the model's class, for messages.
    names
        The parameters that can be given by keyword, in order.
    required
        Those without a default, in order; the first ones can be given by position.
    most
        How many arguments can be given by position; None for any number.
    any_keyword
        True if it takes other keywords, too (``**kwargs``).
    takes_mapping
        True if its one parameter is annotated as a mapping, which is then given as it is.
    shifts_labels
        True if the model compares the logits at each token with the label of the next one, as
        causal language models of transformers do: the first label of a row counts for nothing.
    """

    model: str
    names: tuple[str, ...]
    required: tuple[str, ...]
    most: int | None
    any_keyword: bool
    takes_mapping: bool
    shifts_labels: bool

    def takes_keywords(self, batch: Any) -> bool:
        """True if a batch is passed as keyword arguments: it is a mapping of some of the names.

        That is so if its keys are names of parameters and none is missing that has no default.
        Otherwise a mapping is one positional argument, if the forward can be called with one.

        Raises TypeError if the keys do not fit, and the batch cannot be one argument either.
        """
        if not isinstance(batch, Mapping) or not all(isinstance(key, str) for key in batch):
            return False
        if self.takes_mapping or (not self.names and not self.any_keyword):
            return False
        unknown = [] if self.any_keyword else [key for key in batch if key not in self.names]
        missing = [name for name in self.required if name not in batch]
        if not unknown and not missing:
            return True
        if missing and len(self.required) == 1 and self.most != 0:
            return False
        if not missing and (len(self.names) == 1 or len(unknown) == len(batch)):
            return False
        raise TypeError(
            f"the batch has the keys {_listed(batch)}, and the forward of {self.model} takes "
            f"{_listed(self.names)}: "
            + (f"{_listed(unknown)} is not among them" if unknown else "")
            + (" and " if unknown and missing else "")
            + (f"{_listed(missing)} is missing" if missing else "")
        )

    def check_positional(self, count: int) -> None:
        """Raise TypeError unless it can be called with so many positional arguments."""
        missing = self.required[count:]
        if missing or (self.most is not None and count > self.most):
            raise TypeError(
                f"a batch of {count} positional argument{'s' if count != 1 else ''} does not fit "
                f"the forward of {self.model}, which takes {_listed(self.names)}"
                + (f": {_listed(missing)} is missing" if missing else "")
            )


def signature_of(model: nn.Module) -> Signature | None:
    """The signature of a module's forward; None if Python does not know it."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    kinds = {p.kind for p in parameters}
    return Signature(
        type(model).__name__,
        tuple(p.name for p in named),
        tuple(p.name for p in parameters if _is_required(p)),
        None if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional),
        inspect.Parameter.VAR_KEYWORD in kinds,
        len(parameters) == 1 and _is_mapping(model, parameters[0].annotation),
        _shifts_labels(model),
    )


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def _is_mapping(model: nn.Module, annotation: Any) -> bool:
    if isinstance(annotation, str):  # from __future__ import annotations
        name = annotation.strip("'\"").partition("[")[0].rpartition(".")[2].strip()
        return name in ("dict", "Dict", "Mapping", "MutableMapping", "BatchEncoding")
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and kind is not object and issubclass(kind, Mapping)


def _shifts_labels(model: nn.Module) -> bool:
    """True for a model of transformers whose forward calls its loss for causal models."""
    base = getattr(model, "get_base_model", None)  # of an adapter around a model (peft)
    model = base() if callable(base) else model
    if not hasattr(model, "loss_type"):
        return False
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    given = getattr(model, "_loss_function", None)
    if given is None and model.loss_type is None:  # what `loss_function` then is, with a warning
        return True
    return getattr(given or model.loss_function, "__name__", "") == "ForCausalLMLoss"


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
