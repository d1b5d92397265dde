"""Read a checkpoint: check that it fits, and load what each shard needs of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from taskgrad.chain import GraphChain
from taskgrad.errors import CheckpointError
from taskgrad.executors.between_steps import between_steps
from taskgrad.formats.encoding import decode, tensors_in
from taskgrad.formats.weights import compare, opened, read_index
from taskgrad.graph.shards import Shard
from taskgrad.layout import Layout
from taskgrad.train.arguments import check_callbacks
from taskgrad.train.callbacks.ema import ema_of
from taskgrad.train.chain_group import ChainGroup
from taskgrad.train.checkpoints.inventory import DRIVER, NOT_WRITTEN, inventory, living_on
from taskgrad.train.optimizer_factory import example_of
from taskgrad.train.owner import restored_owner
from taskgrad.worker import checkpoint

T = TypeVar("T")
logger = logging.getLogger("taskgrad")


def restore(
    make: Callable[..., T],
    path: Path,
    chain: GraphChain | ChainGroup,
    optimizer: Any,
    options: Mapping[str, Any],
    layout_of: Callable[[T], Layout],
) -> tuple[T, int, dict[str, Any]]:
    """Make a trainer with its options, and load what was saved where its layout has it.

    Returns the trainer, the number of steps that it took, and the state that was not on workers.
    See `Trainer.restore`.
    """
    layout = chain.layout
    layout.refuse_averages("restore")
    check_callbacks(options.get("callbacks", ()))
    index = read_index(path)
    averaged = index.get("averaged") if ema_of(options.get("callbacks", ())) else None
    _check_model(index, layout, path)
    made, _ = example_of(optimizer, layout)
    saved, given = index["optimizer"]["class"], type(made).__qualname__
    if given != saved:
        raise CheckpointError(f"the checkpoint has the state of {saved}, and {given} was given")
    options = _options_for(index, options)
    folder = str(path / index["folder"])
    driver = _driver_state(index, Path(folder))
    needs = _parts(index, layout, averaged)
    layout.run(
        [
            layout.task(shard, checkpoint.check, {"folder": folder, "files": need["files"]})
            for shard, need in needs.items()
        ]
    )
    with between_steps((), layout.refs), restored_owner(layout), layout.all_or_nothing(needs):
        trainer = make(**options)
        used = layout_of(trainer)
        loads = needs if used is layout else _parts(index, used, averaged)
        layout.run(
            [
                layout.task(shard, checkpoint.load, {"folder": folder, **need})
                for shard, need in loads.items()
            ]
        )
    if averaged is None and ema_of(options.get("callbacks", ())):
        logger.warning(
            "the checkpoint in %s has no averages of the weights: EMA begins with the next step of "
            "the optimizer",
            path,
        )
    return trainer, index["step"], driver


def _driver_state(index: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The state that was not on the workers."""
    checkpoint.check_file(folder / DRIVER, index["files"][DRIVER], "the driver")
    written = index["files"][DRIVER]["tensors"]
    with opened(folder / DRIVER) as handle:

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = handle.get_tensor(name)
            compare(tensor, written[name], name, folder / DRIVER)
            return tensor

        found: dict[str, Any] = decode(index["driver"], read)
        return found


def _check_model(index: Mapping[str, Any], layout: Layout, path: Path) -> None:
    """Raise CheckpointError unless the checkpoint is of this chain's model."""
    ours, theirs = inventory(layout), index["tensors"]
    missing = [name for name in ours if name not in theirs]
    unexpected = [name for name in theirs if name not in ours]
    words = {
        "shape": "shape",
        "dtype": "dtype",
        "names": "names (it is tied otherwise)",
        "trainable": "requires_grad",
        "persistent": "persistent",
    }
    wrong = [
        f"{name}: {word} is {mine[key]} here, {theirs[name][key]} there"
        for name, mine in ours.items()
        for key, word in words.items()
        if name in theirs and mine[key] != theirs[name][key]
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"the checkpoint in {path} is of another model than this chain ({layout.title}). "
            f"Missing there: {missing or 'none'}. Unexpected there: {unexpected or 'none'}. "
            f"Different: {wrong or 'none'}"
        )


def _options_for(index: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the trainer: those that are given, the others as they were saved."""
    options = dict(given)
    for name, saved in index["settings"].items():
        if name not in given:
            if saved == NOT_WRITTEN:
                raise CheckpointError(
                    f"the trainer that was saved had a {name} that is a function of its own, which "
                    f"a checkpoint cannot hold: give {name}= again"
                )
            options[name] = decode(saved, _no_tensor)
    saved = index["settings"]
    between = index["step"] % saved["accumulate"] != 0
    for name, matters in (("amp", True), ("accumulate", between)):
        if matters and options[name] != saved[name]:
            raise CheckpointError(
                f"the checkpoint was saved with {name}={saved[name]!r} and its state depends on "
                f"that; {name}={options[name]!r} was given"
            )
    weighed, was_weighed = (o.get("loss_weight") is not None for o in (options, saved))
    if between and weighed != was_weighed:
        raise CheckpointError(
            f"the checkpoint was saved with{'' if was_weighed else 'out'} a loss_weight, between "
            "two steps of the optimizer, and the gradients so far depend on that: restore it so too"
        )
    if (options["lr_scheduler"] is None) != (saved["lr_scheduler"] is None):
        was = "without an" if saved["lr_scheduler"] is None else "with an"
        raise CheckpointError(f"the checkpoint was saved {was} lr_scheduler: restore it so too")
    return options


def _no_tensor(name: str) -> torch.Tensor:
    raise CheckpointError(f"the checkpoint's settings hold a tensor, {name!r}")


def _parts(
    index: Mapping[str, Any], layout: Layout, averaged: int | None
) -> dict[Shard, dict[str, Any]]:
    """The parts of a checkpoint that each shard needs, for any placement at the time of saving.

    Averages of weights, after so many updates, are left out where `averaged` is None.
    """
    groups = index["optimizer"]["groups"]
    group_of = {name: group for group in groups for name in group["parameters"]}
    homes = {name: file for file, about in index["files"].items() for name in about["tensors"]}
    found = {}
    for shard in layout.shards:
        own = layout.at(shard)
        here = living_on(own, shard)
        trained = [n for n in layout.trainable if n in group_of and layout.home(n) is shard]
        extra = {
            name: value
            for name, value in index["extra"].items()
            if own.shard_of(own.owner(name)) is shard
        }
        part = {
            "buffers": here["buffers"],
            "layers": here["layers"],
            "state": {n: s for n, s in index["optimizer"]["state"].items() if n in trained},
            "options": {name: group_of[name]["options"] for name in trained},
            "scheduler": _scheduler(index, {group_of[name]["stage"] for name in trained}),
            "scaler": index["scaler"],
            "extra": extra,
            "averaged": averaged or 0,
            "step": index["step"],
        }
        held = own.held_on(shard)
        names = [*held, *(f"buffer/{n}" for n in held), *(f"gradient/{n}" for n in trained)]
        names += [f"average/{n}" for n in trained] if averaged is not None else []
        names += tensors_in([part[key] for key in ("state", "options", "scheduler", "extra")])
        files: dict[str, Any] = {}
        for name in dict.fromkeys(n for n in names if n in homes):
            about = index["files"][homes[name]]
            file = files.setdefault(homes[name], {"bytes": about["bytes"], "tensors": {}})
            file["tensors"][name] = about["tensors"][name]
        found[shard] = {**part, "files": files}
    return found


def _scheduler(index: Mapping[str, Any], shards: set[int]) -> Any:
    """The scheduler's state for parameters that were on these shards then."""
    states = [index["schedulers"][str(i)] for i in sorted(shards)]
    plain = [repr(decode(state, lambda name: None)) for state in states]  # where NaN equals NaN
    if any(state != plain[0] for state in plain):
        raise CheckpointError(
            "the learning-rate schedulers of these shards were in different states, which cannot "
            "be one: restore the checkpoint with its layers placed as they were"
        )
    return states[0] if states else None
