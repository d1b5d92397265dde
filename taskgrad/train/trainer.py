"""Train a chain: microbatches in a schedule, optimizers where the parameters live."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch

from taskgrad.arguments import flag, whole
from taskgrad.chain import GraphChain
from taskgrad.formats.weights import path_of
from taskgrad.graph.own_loss import own_loss
from taskgrad.graph.slices import Dims
from taskgrad.plan.plan import Plan
from taskgrad.plan.schedule import Schedule
from taskgrad.train.arguments import (
    RecomputeOption,
    check_epochs,
    check_loader,
    check_metrics,
    check_options,
    check_trainer,
)
from taskgrad.train.callbacks.base import Callback
from taskgrad.train.callbacks.model_checkpoint import ModelCheckpoint
from taskgrad.train.callbacks.on_step import OnStep
from taskgrad.train.chain_group import ChainGroup, to_train
from taskgrad.train.checkpoints.read import restore
from taskgrad.train.checkpoints.write import save
from taskgrad.train.fit import Fit
from taskgrad.train.fits import Fits
from taskgrad.train.loops import Loops
from taskgrad.train.loss import StepLoss
from taskgrad.train.optimizer_factory import OptimizerFactory, optimizers_on
from taskgrad.train.owner import take_over
from taskgrad.train.replicas import install, replicated
from taskgrad.train.steps import Steps

# Arguments of a trainer that its checkpoints do not have.
_APART = frozenset({"self", "chain", "loss_fn", "optimizer", "callbacks", "executor", "chains"})


class Trainer:
    """Trains a chain, as one process of plain torch would with the same microbatches.

    Each batch is cut into microbatches, which pass the stages in the order of a schedule. The loss
    is computed where the model's output is, the optimizer of each shard runs where its parameters
    are. A step is compiled to one program for each worker, which stays there. With a fixed
    placement and number of microbatches a step has the same bits as plain torch. Several threads
    may call it.

    Parameters
    ----------
    chain : GraphChain or callable
        A chain; or a function of the input that calls several chains, and functions and modules by
        `spawn`, and returns the output. It is called for every microbatch, where it may not read
        values, and has to make the same calls each time. Names of parameters and layers begin with
        the name by which the function knows their chain, as in ``"down.0.weight"``. A module with
        parameters that it gives to `spawn` becomes a chain for as long as it exists, which
        ``trainer.chain.chains`` has by name; the module itself stays as it is.
    loss_fn : callable or None
        ``loss_fn(output, targets)`` returns one number; the mean over samples, unless it has
        ``reduction="sum"``. None takes the loss that the model computes itself: ``output.loss``,
        ``output["loss"]``, or an output that is one number. A batch then has no targets.
    optimizer : callable
        A class of ``torch.optim``, a ``functools.partial`` of one, or a function of a list of
        parameters (or of groups). It is called on each worker with the parameters there, all of
        which it has to be over.
    microbatches : int
        How many slices a batch is cut into, as ``torch.tensor_split`` does; fewer if it has fewer
        samples. A microbatch counts by its share of the samples, unless there is a `loss_weight`.
    schedule : {"1f1b", "gpipe", "interleaved_1f1b", "zb_h1", "zb_h2", "zb_v", "auto"} or callable
        The order of forwards and backwards: one of `taskgrad.plan.rules`, or by ``"auto"`` the one
        of them with the shortest step at the memory of 1F1B, by simulation; or what makes a
        `taskgrad.plan.schedule.Schedule` from a ``Pipeline`` and the number of microbatches.
    lr_scheduler : callable, optional
        Makes a scheduler from an optimizer, as ``functools.partial(StepLR, step_size=1)``. It takes
        a step after each step of the optimizer, so none where fp16 skipped that. One that needs a
        metric (``ReduceLROnPlateau``) takes a step after each epoch of `fit`, with `monitor`.
    monitor : str
        The result of an epoch that such a scheduler is given: ``"val_loss"``, ``"loss"``, or
        ``"val_"`` plus the name of a metric.
    clip_norm, clip_value : float, optional
        As ``torch.nn.utils.clip_grad_norm_`` over all parameters of the model, and
        ``clip_grad_value_``; in this order.
    accumulate : int
        The optimizer takes a step after this many batches, with the mean of their gradients.
    amp : {None, "bf16", "fp16"}
        Run forwards and loss under ``torch.autocast``; with fp16 also scale the loss, as
        ``torch.amp.GradScaler`` does.
    seed : int
        Of dropout and all else that draws random numbers in a layer; see `random_stream`.
    callbacks : sequence of Callback
        They are called in this order, each `ModelCheckpoint` after the others.
    checkpoint : {"never", "always", "except_last"} or callable
        Activation checkpointing: which forwards keep only the input of each stage and run again in
        the backward: none, all, all but the last microbatch's. A function of a layer's name says
        which layers do. (Checkpoints in files are written by `save`.)
    param_groups : mapping, optional
        Options by name pattern: ``{"*.bias": {"weight_decay": 0.0}}``. The first pattern to match a
        parameter's name takes it.
    in_dims, target_dims : int, None or pytree
        The batch dimension of inputs and targets: one number for all tensors, or a pytree of them
        in the structure of the batch, with None for what every microbatch gets whole.
    deferred_batch_norm : bool
        Batch norm's running statistics are those of the whole batch, not of each microbatch, as
        torchgpipe has it.
    compile : bool or mapping
        Compile each layer on its worker; a mapping has options of ``torch.compile``. Compiled
        layers need not have the same bits as plain torch.
    check_finite : bool
        A loss that is not finite is an error, and the step is not taken.
    executor : {"compiled", "futures"}
        How steps run: by programs on the workers, or as graphs of Dask tasks. A trainer whose steps
        cannot be compiled uses tasks, and logs why.
    loss_weight : callable or str, optional
        What the loss of a microbatch counts for, where its mean is over something else than samples
        (tokens that are not padding, class weights): a function that is called as `step` is, with
        the part of inputs and targets that a microbatch has, and returns a number; without targets
        just with the inputs. Or the name of a field of a batch that is a dict: its entries that are
        not -100 count, without the first of each row if the model compares labels with the logits
        before them, as causal language models of transformers do. The loss and the gradient of a
        step, of `accumulate` batches too, are then the weighted means: those of one forward over
        all of it. A microbatch of weight 0 counts for nothing, whatever its loss is. `fit` and
        `evaluate` weigh batches the same way.
    chains : mapping, optional
        Names for the chains and modules that a function calls, all of them. By default the names of
        variables that it closes over, of globals that it uses, and of attributes of its object.
    replicas : int
        On how many workers each stage is. The first replica is on the chain's own workers, the
        others are on those of the cluster that the chain does not use, in order. Replicas take
        microbatches in turn, and gradients are summed in the order of these: a step has the same
        bits as one of a single replica with all of them. Buffers, such as batch norm's running
        statistics, are those of the first replica, as with ``DistributedDataParallel``, unless
        `deferred_batch_norm` or `sync_batch_norm` says otherwise. A layer that writes a parameter
        in its forward, as ``nn.Embedding`` does with ``max_norm``, is an error.
    shard_optimizer : bool
        Each replica has a part of the optimizer's state and makes that part of the update, and the
        others get the new parameters: ZeRO stage 1. Else the first replica makes all of it.
    sync_batch_norm : bool
        Every ``nn.BatchNorm1d``, ``2d`` and ``3d`` in training normalizes over the microbatches
        that the replicas take at once, one each, as ``nn.SyncBatchNorm`` does over the processes of
        ``DistributedDataParallel``: microbatches 0 to R-1 of R replicas, then the next R. Running
        statistics move by those of all R, once. Where the microbatches are no multiple of R, the
        last ones are normalized together, or one alone by itself. Results equal plain torch that
        takes these microbatches as one batch, but for rounding. Not with `compile` or
        `deferred_batch_norm`; layers that call ``torch.utils.checkpoint`` are an error, the option
        `checkpoint` is not.

    Raises
    ------
    TypeError, ValueError
        An argument makes no sense; the message says which.
    PlacementError
        The cluster has too few workers for the replicas.
    LayerError
        Optimizer or scheduler cannot be made on a worker, or are over other parameters than they
        were given, or over fewer. A trainer that was made before for this chain can go on.
    MemoryLimitError
        Parameters, gradients and optimizer state do not fit the memory of a worker.

    Examples
    --------
    >>> import functools, torch, taskgrad as tg
    >>> from torch.nn.functional import mse_loss
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
    >>> trainer = tg.Trainer(chain, mse_loss, sgd, microbatches=2)
    >>> loss = trainer.step(torch.ones(4, 2), torch.zeros(4, 1))
    >>> loss.item() > 0
    True
    >>> client.close()
    """

    def __init__(
        self,
        chain: GraphChain | ChainGroup | Callable[..., Any],
        loss_fn: Callable[..., torch.Tensor] | None,
        optimizer: OptimizerFactory,
        *,
        microbatches: int = 1,
        schedule: str | Callable[..., Schedule] = "1f1b",
        lr_scheduler: Callable[[Any], Any] | None = None,
        monitor: str = "val_loss",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        amp: str | None = None,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        checkpoint: RecomputeOption = "never",
        param_groups: Mapping[str, Mapping[str, Any]] | None = None,
        in_dims: Dims = 0,
        target_dims: Dims = 0,
        deferred_batch_norm: bool = False,
        compile: bool | Mapping[str, Any] = False,
        check_finite: bool = False,
        loss_weight: Callable[..., Any] | str | None = None,
        executor: Literal["compiled", "futures"] = "compiled",
        chains: Mapping[str, Any] | None = None,
        replicas: int = 1,
        shard_optimizer: bool = False,
        sync_batch_norm: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in _APART}
        given["seed"] = whole("seed", seed)
        check_options(callbacks, executor, given)
        self.chain = trained = to_train(chain, chains)
        """What is trained: the chain, or of a function the group of those that it calls."""
        self.layout = layout = replicated(trained, given["replicas"], given["shard_optimizer"])
        """Where the layers are that are trained; for taskgrad itself."""
        checked = check_trainer(trained, layout, loss_fn, optimizer, callbacks, given)
        # Those that save come last: a checkpoint has what the others noted of the same epoch.
        self.callbacks = tuple(sorted(callbacks, key=lambda c: isinstance(c, ModelCheckpoint)))
        self._given = given
        self._splitter = checked.splitter
        self._plan = checked.settings.plan
        self._on_step = OnStep(self.callbacks)
        self._steps = Steps(
            trained, layout, checked.settings, self._on_step, self._notify, executor
        )
        self._fits = Fits(self._steps, weighted=self._splitter.weighted)
        self._loops = Loops(
            trained.layout,
            self._steps,
            self._splitter,
            checked.settings.autocast,
            own_loss if loss_fn is None else loss_fn,
        )
        install(trained, layout)
        makes = optimizers_on(layout, optimizer, *checked.optimizers)
        needing = [n for n in take_over(layout, self._steps, makes) if n is not None]
        self._steps.metric_for = next(iter(needing), None)

    @property
    def steps(self) -> int:
        """How many batches were taken, or are being taken; in `on_step`, up to that step.

        After Ctrl-C it waits until the step that was interrupted is taken, or taken back.
        """
        return self._steps.taken_by_now

    @property
    def epoch(self) -> int:
        """The epoch of `fit`, counted from 0; the next one between two epochs, 0 outside."""
        return self._fits.epoch

    @property
    def plan(self) -> Plan:
        """The plan of a step: stages, placement and order of execution. It prints.

        A batch with fewer samples than microbatches takes a step of as many microbatches.
        """
        return self._plan(self._splitter.microbatches)

    def _notify(self, loss: StepLoss) -> None:
        self._on_step.call(self, loss)

    def _call(self, method: str, *args: Any) -> None:
        """Call a method of all callbacks, in order."""
        for callback in self.callbacks:
            getattr(callback, method)(self, *args)

    def step(self, x: Any, y: Any = None) -> StepLoss:
        """Train on one batch; returns its loss, which waits only when it is read.

        Parameters
        ----------
        x, y
            Inputs and targets: tensors, NumPy arrays, or pytrees of them; or both Dask collections
            (arrays, Delayed, thunks), which are then cut on the workers. The model is called as
            ``model(x)``, the loss as ``loss_fn(output, y)``. With ``loss_fn=None`` there is no `y`,
            and `x` is the batch; a tuple or list are then several arguments, ``model(*x)``.

        Notes
        -----
        A mapping, such as a dict or the ``BatchEncoding`` of a tokenizer, is passed as keyword
        arguments, ``model(**x)``, if its keys are names of parameters of the model's forward (for
        an ``nn.Sequential``, of its first layer), and it has all of those without a default. Else
        it is one argument, ``model(x)``, as it is where the one parameter is annotated as a mapping
        (``def forward(self, batch: dict)``), and for a function that calls chains.

        Raises
        ------
        ValueError
            The batch is empty, or inputs and targets do not fit together, or what a `loss_weight`
            gives is negative, not finite, or 0 for all microbatches; nothing is submitted.
        TypeError
            The keys of the batch are others than the model's forward takes, or there are targets
            and no ``loss_fn``; nothing is submitted.
        TaskgradError
            The batch has thunks of another client; or another trainer was made over the chain, or
            the scheduler needs a metric; or the function that is trained makes other calls.
        LayerError
            A layer or the loss raised, in this step or one before that was not read: the message
            names layer, microbatch and worker. The trainer is as it was before that step.
        WorkerLostError
            A worker is gone, and with it its layers.
        """
        return self._steps.take(lambda kept: self._splitter.split(x, y, kept))

    def wait(self) -> None:
        """Return when every step so far is done.

        Raises
        ------
        LayerError, WorkerLostError
            As `step`.
        """
        self._steps.wait()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        val_loader: Iterable[Any] | None = None,
        *,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Train on every batch of a loader, `epochs` times.

        Parameters
        ----------
        loader, val_loader
            Iterables of pairs (inputs, targets), new ones for each epoch: a ``DataLoader``, a list.
            With ``loss_fn=None``, of batches, as `step` takes them.
        metrics
            As in `evaluate`, on `val_loader` after each epoch.
        progress
            Show a progress bar (needs tqdm): loss, samples a second, and the bubble, the share of
            the last step in which a worker had nothing to do.

        Returns
        -------
        list of dict
            The history: for each epoch its mean ``loss`` over samples, or by `loss_weight` (of
            batches that lie on workers each counts the same) and, with `val_loader`, ``val_loss``
            and ``val_`` plus each metric's name. After `stop` in mid-epoch the last one has the
            loss of the batches so far, and no validation. A resumed fit has all epochs from its
            first beginning on.

        Notes
        -----
        After `restore` from a checkpoint that was saved before a fit had come to its end, the next
        call of `fit`, with the same arguments, goes on in the epoch and at the batch where that
        stopped: `epochs` counts from the beginning of that fit. The random states of torch, Python
        and NumPy and of the loader's generators are set as they were at the beginning of the epoch,
        and as many batches are skipped as were trained on; a loader with a ``load_state_dict``
        takes its own state. A loader that then yields another batch than before is warned of.

        Raises
        ------
        TypeError
            An argument is of another kind; nothing is trained then.
        ValueError
            `epochs` is negative; or the loader is empty in the first epoch or a later one, or
            yields something else than pairs; or one of the loaders is an iterator, which yields its
            batches once, and there are more epochs. Or the scheduler needs a metric that an epoch
            does not have; or a fit is resumed, and the loader yields fewer batches than it had.
        """
        form = self._splitter.form
        epochs = check_epochs(epochs, form, loader=loader, val_loader=val_loader)
        flag("progress", progress)
        evaluate = partial(self._loops.evaluate, metrics=check_metrics(metrics))
        fit = Fit(
            self._steps,
            form,
            self.step,
            evaluate,
            self._call,
            self._given["monitor"],
            loader,
            epochs,
            val_loader,
            progress,
        )
        with self._fits.begun(loader) as (state, saved):
            try:
                return fit.run(state, saved)
            except BaseException as error:
                self._call("on_exception", error)
                raise

    def stop(self) -> None:
        """End the fit that runs after this step, or after this epoch if none runs.

        A callback calls it, or another thread, or a signal handler. Steps that were begun ahead are
        taken back if that is possible, and else come to their end. Without a fit it does nothing.
        """
        self._fits.stop()

    def evaluate(
        self, loader: Iterable[Any], metrics: Mapping[str, Callable[..., Any]] | None = None
    ) -> dict[str, float]:
        """The mean loss over a loader, in evaluation mode, and the mean of each metric.

        A batch counts by its number of samples: that of its targets, or of its inputs where there
        are none. A loss that is a sum over samples is divided by the number of all of them. With a
        `loss_weight` the loss, and that alone, counts by the weight of each batch.

        Parameters
        ----------
        loader
            An iterable of pairs (inputs, targets); with ``loss_fn=None`` of batches, as `step`
            takes them.
        metrics
            Functions of (output, targets) that return a number, a mean over samples. They run where
            the output is. With ``loss_fn=None`` the batch is in the place of the targets.
        """
        check_loader("loader", loader)
        return self._loops.evaluate(loader, check_metrics(metrics))

    def predict(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The model's outputs in evaluation mode, one for each batch of inputs, in order.

        Inputs are what `step` takes as such.

        A generator: a few batches are on their way at a time, however many there are.
        """
        check_loader("loader", loader)
        return self._loops.predict(loader)

    def save(self, path: str | os.PathLike[str]) -> None:
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
        place = path_of(path)
        with self._steps.idle():
            driver = {
                "fit": self._fits.to_save(),
                "callbacks": [[type(c).__qualname__, c.state_dict()] for c in self.callbacks],
                "loss_weights": self._steps.accumulation.to_save(self.steps),
            }
            save(place, self.layout, self.steps, self._given, driver)
        self._call("on_save", place)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        chain: GraphChain | Callable[..., Any],
        loss_fn: Callable[..., torch.Tensor] | None,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        chains: Mapping[str, Any] | None = None,
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
        chain, loss_fn, optimizer, chains
            As for the trainer that was saved. The chain's own weights, and options of the optimizer
            such as its learning rate, are replaced by what was saved.
        **options
            Of `Trainer`. What is not given is as it was saved. What is given counts, and if it is
            another value, steps differ from there on; but not ``amp`` nor, between two steps of the
            optimizer, ``accumulate`` or whether there is a ``loss_weight``, which what was saved
            depends on. Functions cannot be saved: ``lr_scheduler`` and a ``schedule``,
            ``checkpoint`` or ``loss_weight`` of your own have to be given again, and so do
            ``callbacks``: those whose class had one among the saved trainer's get its state.
            Averages of the weights are dropped unless an `EMA` is among them.

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
        group = to_train(chain, chains)
        make = partial(cls, group, loss_fn, optimizer)
        trainer, steps, driver = restore(
            make, path, group, optimizer, options, lambda made: made.layout
        )
        trainer._steps.taken = steps
        trainer._steps.accumulation.resume(driver.get("loss_weights", ()), steps)
        trainer._fits.resume(driver["fit"])
        states = [list(given) for given in driver["callbacks"]]
        for callback in trainer.callbacks:
            kind = type(callback).__qualname__
            found = next((given for given in states if given[0] == kind), None)
            if found is not None:
                states.remove(found)
                callback.load_state_dict(found[1])
        return trainer
