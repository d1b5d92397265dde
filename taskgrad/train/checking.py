"""What a trainer and its loops are given, looked at before anything is submitted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

from taskgrad.arguments import shown
from taskgrad.graph.pytree import flatten
from taskgrad.train.data import pair


def check_dims(**dims: Any) -> None:
    """Raise TypeError unless each is a dimension, None, or a pytree of them."""
    for name, given in dims.items():
        for dim in flatten(given)[0]:
            if isinstance(dim, bool) or not isinstance(dim, int | None):
                raise TypeError(
                    f"{name} is the number of a dimension, None, or a pytree of them; got "
                    f"{shown(given)}"
                )


def check_limits(**limits: Any) -> None:
    """Raise unless these are positive numbers or None."""
    for name, limit in limits.items():
        if limit is None:
            continue
        message = f"{name} is a positive number, or None; got {shown(limit)}"
        try:
            if isinstance(limit, bool | str | bytes):
                raise TypeError
            number = float(limit)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(message) from None
        if not number > 0:
            raise ValueError(message)


def check_callbacks(callbacks: Any) -> None:
    """Raise TypeError unless this is a sequence of objects with the methods of a Callback."""
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str | bytes):
        raise TypeError(f"callbacks is a list of tg.Callback instances; got {shown(callbacks)}")
    for callback in callbacks:
        if isinstance(callback, type):
            raise TypeError(
                f"callbacks holds the class {callback.__name__}: give an instance, "
                f"{callback.__name__}()"
            )
        lacking = [n for n in ("on_step", "on_epoch") if not callable(getattr(callback, n, None))]
        if lacking:
            raise TypeError(
                f"callbacks holds {shown(callback)}, which has no method "
                f"{' and no '.join(lacking)}: derive it from tg.Callback"
            )


def check_param_groups(groups: Any) -> None:
    """Raise TypeError unless these are options by name pattern, or None."""
    if groups is None:
        return
    if not isinstance(groups, Mapping):
        raise TypeError(
            'param_groups has options by name pattern, {"*.bias": {"weight_decay": 0.0}}; got '
            f"{shown(groups)}"
        )
    for pattern, options in groups.items():
        if not isinstance(pattern, str) or not isinstance(options, Mapping):
            raise TypeError(
                "param_groups has a mapping of options for each name pattern; got "
                f"{shown(options)} for {shown(pattern)}"
            )


def check_compile(options: Any) -> None:
    """Raise TypeError unless this is a boolean, or options of ``torch.compile``."""
    if not isinstance(options, bool) and not (
        isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
    ):
        raise TypeError(
            f"compile is True, False, or a mapping of options of torch.compile; got "
            f"{shown(options)}"
        )


def check_chooser(checkpoint: Any, names: Iterable[str]) -> None:
    """Raise TypeError if a function says something else than yes or no of a layer."""
    if not callable(checkpoint):
        return
    for name in names:
        found = checkpoint(name)
        if not isinstance(found, bool):
            raise TypeError(
                "checkpoint, a function of a layer's name, says True or False; of "
                f"{name!r} it said {shown(found)}"
            )


def check_loader(name: str, loader: Any) -> None:
    """Raise TypeError unless one can iterate over this, and get batches."""
    if isinstance(loader, type | str | bytes) or not _iterable(loader):
        raise TypeError(
            f"{name} is something to iterate over, such as a DataLoader or a list of pairs "
            f"(inputs, targets); got {shown(loader)}"
        )


def check_epochs(epochs: int, **loaders: Any) -> None:
    """Raise ValueError if a loader that gives its batches once is to give them in every epoch."""
    for name, loader in loaders.items():
        if epochs > 1 and _gives_once(loader):
            raise ValueError(
                f"{name} is a {type(loader).__name__}, in epoch 2 an iterator that an earlier "
                "epoch used up. Give something that can be iterated over again, such as a "
                "DataLoader or a list; or fit for one epoch"
            )
        if epochs and name == "val_loader" and isinstance(loader, Sequence):
            if not len(loader):
                raise ValueError("val_loader is empty: there is nothing to evaluate on")
            for item in loader if isinstance(loader, list | tuple) else ():
                pair(item, "val_loader")


def _gives_once(loader: Any) -> bool:
    """Whether this is an iterator that cannot begin anew, as one of a user's class may."""
    if not isinstance(loader, Iterator):
        return False
    begin = type(loader).__iter__
    own = inspect.isfunction(begin) and begin is not Iterator.__iter__
    return not own or isinstance(loader, _BaseDataLoaderIter)


def _iterable(value: Any) -> bool:
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def check_metrics(metrics: Any) -> Mapping[str, Callable[..., Any]]:
    """The metrics, none for None.

    Raises
    ------
    TypeError
        They are no functions by name.
    ValueError
        One is called "loss".
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(
            'metrics has functions by name, {"accuracy": accuracy}; got ' + shown(metrics)
        )
    for name, function in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics has functions by name; got the name {shown(name)}")
        if isinstance(function, type) or not callable(function):
            instance = f": give an instance, {function.__name__}()" if callable(function) else ""
            raise TypeError(
                f"the metric {name!r} is a function of (output, targets); got "
                f"{shown(function)}{instance}"
            )
    if "loss" in metrics:
        raise ValueError('"loss" is the loss itself; give this metric another name')
    return metrics
