"""Save a trainer, and go on from there: in another process, on other workers, to the same bits."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch

from taskgrad.chain import GraphChain
from taskgrad.executors.between_steps import between_steps
from taskgrad.executors.keeping import all_or_nothing
from taskgrad.formats.weights import path_of, read_index
from taskgrad.train.contents import on_shards
from taskgrad.train.owner import keeping_owner
from taskgrad.train.restoring import check_model, check_optimizer, options_for, parts
from taskgrad.train.saving import save
from taskgrad.worker import checkpoint

if TYPE_CHECKING:
    from taskgrad.train.trainer import Trainer


class Resumable:
    """What makes a `Trainer` one that can be saved and restored."""

    _options: dict[str, Any]  # the keyword arguments of the trainer that matter for its steps

    def save(self: Any, path: str | os.PathLike[str]) -> None:
        """Write all that is needed to go on from here: a checkpoint.

        Waits for the steps that run. The workers write their parts side by side: `path` is on a
        filesystem that they share with the driver. A checkpoint that is there already is replaced
        once the new one is whole, and stays if this fails.

        Parameters
        ----------
        path
            A folder; it is made if need be. It takes about the bytes of parameters, buffers and
            optimizer state, and twice that while an older checkpoint is replaced.

        Raises
        ------
        CheckpointError
            A worker does not see the folder or cannot write there, or the optimizer, the scheduler
            or a module keeps what is neither a tensor nor plain Python.
        LayerError, WorkerLostError
            A step that still ran failed, or a worker is gone.

        Examples
        --------
        >>> import functools, tempfile, torch, taskgrad as tg
        >>> from torch.nn.functional import mse_loss
        >>> client = tg.local_cluster(n_workers=2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
        >>> trainer = tg.Trainer(tg.GraphChain(model), mse_loss, sgd)
        >>> loss = trainer.step(torch.ones(4, 2), torch.zeros(4, 1))
        >>> folder = tempfile.TemporaryDirectory()
        >>> trainer.save(folder.name)
        >>> again = tg.Trainer.restore(folder.name, tg.GraphChain(model), mse_loss, sgd)
        >>> again.steps
        1
        >>> folder.cleanup()
        >>> client.close()
        """
        trainer: Trainer = self
        place = path_of(path)
        with trainer._turn():
            trainer.wait()
            save(trainer, place)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        chain: GraphChain,
        loss_fn: Callable[..., torch.Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
        **options: Any,
    ) -> Self:
        """A trainer that goes on where `save` was called.

        With the same microbatches and options it takes the same steps to the bit, also on another
        number of workers as long as each layer computes the same. Each worker reads what it needs;
        nothing passes through the driver.

        Parameters
        ----------
        path
            The folder that was given to `save`.
        chain, loss_fn, optimizer
            As for the trainer that was saved. The chain's own weights, and options of the optimizer
            such as its learning rate, are replaced by what was saved.
        **options
            Of `Trainer`. What is not given is as it was saved. What is given counts, and if it is
            another value, steps differ from there on; but not ``amp`` nor, between two steps of the
            optimizer, ``accumulate``, which what was saved depends on. Functions cannot be saved:
            ``lr_scheduler`` and a ``schedule`` or ``checkpoint`` of your own have to be given
            again. ``callbacks`` are not saved.

        Raises
        ------
        CheckpointError
            There is no checkpoint, it is damaged, or it is of another model or optimizer, or these
            options contradict it. Nothing is changed on the workers.
        LayerError
            A module, the optimizer or the scheduler raised when its state was given to it. Nothing
            is changed on any worker: a trainer that the chain had before can go on.
        """
        path = path_of(path)
        if not isinstance(chain, GraphChain):
            raise TypeError(f"a checkpoint goes into a GraphChain; got {type(chain).__name__}")
        index = read_index(path)
        check_model(index, chain, path)
        check_optimizer(index, optimizer, chain)
        options = options_for(index, options)
        folder = str(path / index["folder"])
        needs = parts(index, chain)
        checks = {s: {"folder": folder, "files": need["files"]} for s, need in needs.items()}
        on_shards(chain, checkpoint.check, checks)
        loads = {shard: {"folder": folder, **need} for shard, need in needs.items()}
        with (
            between_steps((), [chain._ref]),
            keeping_owner(chain),
            all_or_nothing(needs, chain._executor),
        ):
            trainer: Any = cls(chain, loss_fn, optimizer, **options)  # type: ignore[call-arg]
            on_shards(chain, checkpoint.load, loads)
        trainer.steps = index["step"]
        return trainer


def options_of(trainer: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that a trainer was made with, those that its steps depend on."""
    known = inspect.signature(trainer).parameters.values()
    names = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name != "callbacks"]
    return {name: arguments[name] for name in names}
