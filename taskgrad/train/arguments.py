"""Check the arguments of a trainer and of its loops, before anything is submitted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

from taskgrad.arguments import flag, shown, whole
from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.graph import pack
from taskgrad.graph.layers import kind_of
from taskgrad.graph.own_loss import own_loss
from taskgrad.graph.pytree import flatten
from taskgrad.layout import Layout
from taskgrad.train.batch_form import BatchForm
from taskgrad.train.callbacks.base import Callback
from taskgrad.train.callbacks.ema import ema_of
from taskgrad.train.chain_group import ChainGroup
from taskgrad.train.data import MicrobatchSplitter
from taskgrad.train.loss_weight import LossWeight
from taskgrad.train.memory import InFiles, check_fits
from taskgrad.train.optimizer_factory import (
    Groups,
    check_group_options,
    example_of,
    parameter_groups,
)
from taskgrad.train.planning import maker_of, planner
from taskgrad.train.replicas import check_replicas, ends_of
from taskgrad.train.step import Recompute, Settings
from taskgrad.worker.training_state import TrainingOptions

RecomputeOption = Literal["never", "always", "except_last"] | Callable[[str], bool]


class Checked(NamedTuple):
    """The checked arguments of a trainer, by what uses them."""

    settings: Settings
    splitter: MicrobatchSplitter
    optimizers: tuple[Groups, TrainingOptions, pack.Packed, InFiles]


def check_options(callbacks: Any, executor: Any, given: Mapping[str, Any]) -> None:
    """Check the options of a `Trainer`, before there is anything that it trains."""
    check_callbacks(callbacks)
    check_executor(executor)
    check_monitor(given["monitor"])
    check_counts(microbatches=given["microbatches"], accumulate=given["accumulate"])
    check_limits(clip_norm=given["clip_norm"], clip_value=given["clip_value"])
    check_scheduler(given["lr_scheduler"])
    check_param_groups(given["param_groups"])
    check_dims(in_dims=given["in_dims"], target_dims=given["target_dims"])
    check_compile(given["compile"])
    check_loss_weight(given["loss_weight"])
    flag("deferred_batch_norm", given["deferred_batch_norm"])
    flag("check_finite", given["check_finite"])
    check_replicas(given)
    maker_of(given["schedule"])
    recompute_rule(given["checkpoint"])
    precision(given["amp"])


def check_trainer(
    chain: GraphChain | ChainGroup,
    layout: Layout,
    loss_fn: Any,
    optimizer: Any,
    callbacks: Sequence[Callback],
    given: Mapping[str, Any],
) -> Checked:
    """Check what a `Trainer` is made of; `given` has its options, which are checked.

    Without a `loss_fn` the loss is the model's own. `layout` is that of the steps.
    """
    ema = ema_of(callbacks)
    check_open(chain.layout.session.client)
    schedule, recompute = maker_of(given["schedule"]), recompute_rule(given["checkpoint"])
    check_chooser(given["checkpoint"], chain.layout.names)
    dtype = precision(given["amp"])
    patterns = given["param_groups"] or {}
    example, _ = example_of(optimizer, layout)
    check_group_options(patterns, example)
    loss, loss_kind = packed_loss(own_loss if loss_fn is None else loss_fn)
    if not layout.trainable:
        raise ValueError("the chain has no trainable parameters: all of them are frozen")
    if given["microbatches"] > 1 and not given["deferred_batch_norm"]:
        refuse_repeated_norms(layout)
    microbatches, accumulate = given["microbatches"], given["accumulate"]
    in_files = check_fits(
        chain, layout, optimizer, microbatches, accumulate, averages=ema is not None
    )
    kinds = {device.partition(":")[0] for device in layout.devices.values()}
    groups = parameter_groups(layout.trainable, patterns)
    select = own_loss if loss_fn is None else None
    settings = Settings(
        # Clipping and loss scaling need the gradients of all workers.
        plan=planner(
            layout,
            schedule,
            select,
            flush=given["clip_norm"] is not None or given["amp"] == "fp16",
            at_once=bool(given["sync_batch_norm"]),
        ),
        seed=given["seed"],
        accumulate=given["accumulate"],
        clip_norm=given["clip_norm"],
        clip_value=given["clip_value"],
        autocast=tuple((kind, dtype) for kind in sorted(kinds)) if dtype else (),
        recompute=recompute,
        check_finite=given["check_finite"],
        order=layout.trainable,
        groups=["default", *patterns],
        sync_norms=bool(given["sync_batch_norm"]),
        deferred_norms=bool(given["deferred_batch_norm"]),
        select=select,
    )
    form = BatchForm(layout.takes, own_loss=loss_fn is None, one_input=layout.takes_one_input)
    weight = given["loss_weight"]
    if weight is not None and adds_up(loss_fn):
        raise ValueError(
            "loss_weight weighs losses that are means, and this one is a sum, reduction='sum': its "
            "microbatches just add up"
        )
    splitter = MicrobatchSplitter(
        layout.session.client,
        given["microbatches"],
        given["in_dims"],
        given["target_dims"],
        weighted=not adds_up(loss_fn),
        ends=ends_of(layout),
        loss_kind=loss_kind,
        form=form,
        loss_weight=None if weight is None else LossWeight(weight, form),
    )
    compiled = given["compile"]
    options = TrainingOptions(
        names=[],
        scheduler=given["lr_scheduler"],
        scaled=given["amp"] == "fp16",
        deferred=bool(given["deferred_batch_norm"]),
        monitor=given["monitor"],
        compiled=None if compiled is False else {} if compiled is True else dict(compiled),
        decay=None if ema is None else ema.decay,
        replicated=given["replicas"] > 1,
    )
    return Checked(settings, splitter, (groups, options, loss, in_files))


def refuse_repeated_norms(layout: Layout) -> None:
    """Raise ValueError if microbatches would update batch norm in the order of the schedule."""
    for name in layout.called_again:
        if any(n.startswith(f"{name}.") and n.endswith(".running_mean") for n in layout.tensors):
            raise ValueError(
                f"{name!r} is called more than once and has batch norm, whose running statistics "
                "would depend on the order in which the microbatches pass: "
                "deferred_batch_norm=True makes them those of the whole batch"
            )


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_counts(**counts: Any) -> None:
    """Raise ValueError unless these are whole numbers from 1 on."""
    for name, number in counts.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is a whole number from 1 on; got {shown(number)}")


def check_executor(executor: Any) -> None:
    """Raise ValueError unless this is the name of an executor."""
    if executor not in ("compiled", "futures"):
        raise ValueError(f'executor is "compiled" or "futures"; got {shown(executor)}')


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
    """Raise TypeError unless this is a sequence of objects with the methods of a Callback.

    Raises ValueError if several are an EMA.
    """
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str | bytes):
        raise TypeError(f"callbacks is a list of tg.Callback instances; got {shown(callbacks)}")
    for callback in callbacks:
        if isinstance(callback, type):
            raise TypeError(
                f"callbacks holds the class {callback.__name__}: give an instance, "
                f"{callback.__name__}()"
            )
        methods = [name for name in vars(Callback) if not name.startswith("_")]
        lacking = [n for n in methods if not callable(getattr(callback, n, None))]
        if lacking:
            raise TypeError(
                f"callbacks holds {shown(callback)}, which has no method "
                f"{' and no '.join(lacking[:2])}: derive it from tg.Callback"
            )
    ema_of(callbacks)


def check_monitor(monitor: Any) -> None:
    """Raise TypeError unless this is the name of a result of an epoch."""
    if not isinstance(monitor, str):
        raise TypeError(
            f'monitor names a result of an epoch, "val_loss" or "val_accuracy"; got '
            f"{shown(monitor)}"
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


def check_loss_weight(weight: Any) -> None:
    """Raise TypeError unless this is a function of a batch, the name of a field, or None."""
    if weight is None or isinstance(weight, str):
        return
    if isinstance(weight, type) or not callable(weight):
        raise TypeError(
            "loss_weight is a function of a microbatch that returns a number, such as that of its "
            f"tokens, or the name of a field of labels; got {shown(weight)}"
        )


def check_chooser(checkpoint: Any, names: Iterable[str]) -> None:
    """Raise TypeError if a function of layers' names does not return a boolean for each."""
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
    """Raise TypeError unless this is an iterable, and not text or a class."""
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if isinstance(loader, type | str | bytes) or not iterable:
        raise TypeError(
            f"{name} is something to iterate over, such as a DataLoader or a list of pairs "
            f"(inputs, targets); got {shown(loader)}"
        )


def check_epochs(epochs: Any, form: BatchForm, **loaders: Any) -> int:
    """The number of epochs; `form` is that of the batches in lists.

    Raises TypeError unless it is one and the loaders are iterables, ValueError if one of them can
    be iterated over once only and there are more epochs.
    """
    for name, loader in loaders.items():
        if loader is not None or name != "val_loader":
            check_loader(name, loader)
    epochs = whole("epochs", epochs, least=0)
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
                form.of_item(item, "val_loader")
    return epochs


def _gives_once(loader: Any) -> bool:
    """True if this is an iterator that cannot begin anew, as one of a user's class may."""
    if not isinstance(loader, Iterator):
        return False
    begin = type(loader).__iter__
    own = inspect.isfunction(begin) and begin is not Iterator.__iter__
    return not own or isinstance(loader, _BaseDataLoaderIter)


def check_metrics(metrics: Any) -> Mapping[str, Callable[..., Any]]:
    """The metrics; raises TypeError unless they are functions by name, or None for none."""
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


def adds_up(loss: Any) -> bool:
    """True if a loss is a sum over samples, and not their mean."""
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    return options.get("reduction", getattr(loss, "reduction", "mean")) == "sum"


def packed_loss(loss: Any) -> tuple[pack.Packed, str]:
    """A loss function, packed, and its name; TypeError if it cannot be a trainer's loss."""
    if isinstance(loss, type):
        raise TypeError(
            f"the loss is a class, {loss.__name__}: give an instance of it, {loss.__name__}()"
        )
    if not callable(loss):
        raise TypeError(
            "the loss is a function of (output, targets) such as torch.nn.functional.cross_entropy,"
            f" or None for the model's own; got {type(loss).__name__}"
        )
    packed = pack.pickle_or_explain(lambda: pack.pack(loss), "the loss")
    if any(t.requires_grad for t in packed.tensors):
        raise TypeError(
            f"the loss {kind_of(loss)!r} has parameters to train: make them a layer of the model, "
            "where the optimizer finds them"
        )
    return packed, kind_of(loss)


def recompute_rule(checkpoint: RecomputeOption) -> Recompute:
    """The rule that says which layers run again in the backward; ValueError if there is none."""
    if callable(checkpoint) and not isinstance(checkpoint, type):
        chosen = checkpoint
        return lambda layers, m, count: tuple(
            (i, i + 1) for i, (_, name, _) in enumerate(layers) if chosen(name)
        )
    if not isinstance(checkpoint, str) or checkpoint not in ("never", "always", "except_last"):
        raise ValueError(
            'checkpoint is "never", "always", "except_last" or a function of a layer\'s name; got '
            f"{checkpoint!r}"
        )

    def whole(
        layers: Sequence[Any], microbatch: int, microbatches: int
    ) -> tuple[tuple[int, int], ...]:
        kept = checkpoint == "except_last" and microbatch == microbatches - 1
        return () if checkpoint == "never" or kept else ((0, len(layers)),)

    return whole
