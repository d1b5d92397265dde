"""Train a chain: microbatches in a schedule, optimizers where the parameters live."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch

from taskgrad.arguments import flag, whole
from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.shards import Shard, ShardCall
from taskgrad.graph.slices import Dims
from taskgrad.plan.schedule import Schedule
from taskgrad.train import loops
from taskgrad.train.call_lock import CallLock
from taskgrad.train.callbacks import Callback
from taskgrad.train.checking import (
    check_callbacks,
    check_chooser,
    check_compile,
    check_dims,
    check_epochs,
    check_limits,
    check_loader,
    check_metrics,
    check_param_groups,
)
from taskgrad.train.checkpoint import Resumable, options_of
from taskgrad.train.data import Cutter
from taskgrad.train.factories import (
    OptimizerFactory,
    adds_up,
    attributes_of,
    check_counts,
    check_group_options,
    check_scheduler,
    example_of,
    packed_loss,
    parameter_groups,
    precision,
)
from taskgrad.train.loss import StepLoss
from taskgrad.train.memory import InFiles, check_fits
from taskgrad.train.owner import acquire_ownership, check_owner
from taskgrad.train.recompute import Checkpoint, recompute_rule
from taskgrad.train.recovery import recover
from taskgrad.train.step import Settings, Step, build, maker_of
from taskgrad.worker import optimizing, training

# A step is submitted while the one before still runs: its inputs are there when that is done.
_AHEAD = 2
# Dask remembers how to compute again all that a task depended on: steps that wait for each other
# pile up on the scheduler. So after this many the workers are let run dry.
_CHAINED = 16
# How long Ctrl-C may wait for the workers to take back a step, in seconds.
_INTERRUPT = 0.5


class Trainer(Resumable):
    """Trains a chain; what one process of plain torch would do with the same microbatches.

    Each batch is cut into microbatches, which pass the stages in the order of a schedule. The loss
    is computed where the model's output is, the optimizer of each shard runs where its parameters
    are, and a step is one graph of tasks, submitted at once. With a fixed placement and number of
    microbatches a step gives plain torch's bits. Several threads may call it.

    Parameters
    ----------
    chain : GraphChain
    loss_fn : callable
        ``loss_fn(output, targets)`` gives one number; the mean over samples, unless it has
        ``reduction="sum"``.
    optimizer : callable
        A class of ``torch.optim``, a ``functools.partial`` of one, or a function of a list of
        parameters (or of groups). It is called on each worker with the parameters there, all of
        which it has to be over.
    microbatches : int
        How many slices a batch is cut into, as ``torch.tensor_split`` does; fewer if it has fewer
        samples. A microbatch counts by its share of the samples: a loss whose mean is over
        something else (``ignore_index``, class weights) is then not that of the whole batch.
    schedule : {"1f1b", "gpipe"} or callable
        The order of forwards and backwards; or what makes a `taskgrad.plan.schedule.Schedule` from
        a ``Pipeline`` and the number of microbatches.
    lr_scheduler : callable, optional
        Makes a scheduler from an optimizer, as ``functools.partial(StepLR, step_size=1)``. It takes
        a step after each step of the optimizer, so none where fp16 skipped that. One that needs a
        metric (``ReduceLROnPlateau``) takes a step after each epoch of `fit`, with ``val_loss``.
    clip_norm, clip_value : float, optional
        As ``torch.nn.utils.clip_grad_norm_`` over all parameters of the model, and
        ``clip_grad_value_``; in this order.
    accumulate : int
        The optimizer takes a step after so many batches, with the mean of their gradients.
    amp : {None, "bf16", "fp16"}
        Run forwards and loss under ``torch.autocast``; with fp16 also scale the loss, as
        ``torch.amp.GradScaler`` does.
    seed : int
        Of dropout and all else that draws random numbers in a layer; see `random_stream`.
    callbacks : sequence of Callback
    checkpoint : {"never", "always", "except_last"} or callable
        Which forwards keep only the input of each stage and run again in the backward: none, all,
        all but the last microbatch's. A function of a layer's name says which layers do.
    param_groups : mapping, optional
        Options by name pattern: ``{"*.bias": {"weight_decay": 0.0}}``. The first pattern to match a
        parameter's name takes it.
    in_dims, target_dims : int, None or pytree
        The batch dimension of inputs and targets: one number for all tensors, or a pytree of them
        in the structure of the batch, with None for what goes whole with each microbatch.
    deferred_batch_norm : bool
        Batch norm's running statistics are those of the whole batch, not of each microbatch, as
        torchgpipe has it.
    compile : bool or mapping
        Compile each layer on its worker; a mapping has options of ``torch.compile``. Compiled
        layers need not give plain torch's bits.
    check_finite : bool
        A loss that is not finite is an error, and the step is not taken.

    Raises
    ------
    TypeError, ValueError
        An argument makes no sense; the message says which.
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
        chain: GraphChain,
        loss_fn: Callable[..., torch.Tensor],
        optimizer: OptimizerFactory,
        *,
        microbatches: int = 1,
        schedule: str | Callable[..., Schedule] = "1f1b",
        lr_scheduler: Callable[[Any], Any] | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        amp: str | None = None,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        checkpoint: Checkpoint = "never",
        param_groups: Mapping[str, Mapping[str, Any]] | None = None,
        in_dims: Dims = 0,
        target_dims: Dims = 0,
        deferred_batch_norm: bool = False,
        compile: bool | Mapping[str, Any] = False,
        check_finite: bool = False,
    ) -> None:
        arguments = dict(locals())
        if not isinstance(chain, GraphChain):
            raise TypeError(f"a Trainer trains a GraphChain; got {type(chain).__name__}")
        check_open(chain._session.client)
        check_counts(microbatches=microbatches, accumulate=accumulate)
        check_limits(clip_norm=clip_norm, clip_value=clip_value)
        check_scheduler(lr_scheduler)
        check_callbacks(callbacks)
        check_param_groups(param_groups)
        check_dims(in_dims=in_dims, target_dims=target_dims)
        check_compile(compile)
        flag("deferred_batch_norm", deferred_batch_norm)
        flag("check_finite", check_finite)
        seed = whole("seed", seed)
        arguments["seed"] = seed
        make_schedule, recompute = maker_of(schedule), recompute_rule(checkpoint)
        check_chooser(checkpoint, chain.placement.column("layer"))
        dtype = precision(amp)
        example, _ = example_of(optimizer, attributes_of(chain._tensors.values()))
        check_group_options(param_groups or {}, example)
        loss, loss_kind = packed_loss(loss_fn)
        trainable = [n for n, info in chain.named_parameters_info() if info.requires_grad]
        if not trainable:
            raise ValueError("the chain has no trainable parameters: all of them are frozen")
        in_files = check_fits(chain, optimizer, microbatches, accumulate)
        self.chain = chain
        self.callbacks = tuple(callbacks)
        self.steps = 0
        """How many batches were taken, or are being taken."""
        self._options = options_of(type(self), arguments)
        self._loss_fn = loss_fn
        self._arguments = {
            "optimizer": optimizer,
            "scheduler": lr_scheduler,
            "scaled": amp == "fp16",
            "deferred": deferred_batch_norm,
            "compiled": None if compile is False else dict({} if compile is True else compile),
        }
        self._groups = parameter_groups(trainable, param_groups or {})
        kinds = {row.device.partition(":")[0] for row in chain.placement}
        self._settings = Settings(
            schedule=make_schedule,
            seed=seed,
            accumulate=accumulate,
            clip_norm=clip_norm,
            clip_value=clip_value,
            autocast=tuple((kind, dtype) for kind in sorted(kinds)) if dtype else (),
            recompute=recompute,
            check_finite=check_finite,
            order=trainable,
        )
        self._call_lock = CallLock(self._notify)
        self._running: deque[StepLoss] = deque()
        self._reading: WeakSet[Node] = WeakSet()  # what uses the model, not in a step
        self._last: Step | None = None  # the next step waits for it on the workers
        self._chained = 0
        self._unsettled = False  # a step was interrupted, and is yet to be taken back
        self._broken: BaseException | None = None
        self._metric_for: str | None = None  # the scheduler's class, if it needs a metric
        self._in_fit = False  # and will get one
        workers = [row.worker for row in chain.placement]
        self._cutter = Cutter(
            chain._session.client,
            microbatches,
            in_dims,
            target_dims,
            weighted=not adds_up(loss_fn),
            first=workers[0],
            last=workers[-1],
            loss_kind=loss_kind,
        )
        with acquire_ownership(chain, self):
            self._start(loss.data, loss.tensors, in_files)

    def _start(self, data: bytes, tensors: list[torch.Tensor], in_files: InFiles) -> None:
        """Make optimizers and schedulers on the workers, and send the loss to the last shard."""
        chain = self.chain
        calls = []
        for shard in chain._shards.values():
            mine = {n for n in self._settings.order if chain._home(n) is shard}
            groups = [([n for n in names if n in mine], kw) for names, kw in self._groups]
            arguments = {
                **self._arguments,
                "names": [n for n in self._settings.order if n in mine],
                "groups": groups,
                "done": self.steps,
                "in_files": in_files.get(shard.worker, frozenset()),
            }
            calls.append(self._on(shard, training.start, arguments))
        last = chain._shards[self._cutter.last]
        set_loss = self._on(
            last,
            training.set_loss,
            {"data": data},
            after=[Leaf(tensors, needs_grad=False)],
            awaits=calls,
        )
        uses = [
            self._on(shard, optimizing.use, {}, awaits=[set_loss])
            for shard in chain._shards.values()
        ]
        chain._executor.run(uses)
        answers = chain._executor.values(calls)
        self._metric_for = next((name for name in answers if name is not None), None)

    def _on(
        self,
        shard: Shard,
        function: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        after: Sequence[Node] = (),
        awaits: Sequence[Node] = (),
    ) -> ShardCall:
        key = new_key(function.__name__, self.chain._title)
        return ShardCall(shard, function, arguments, key=key, after=after, awaits=awaits)

    # -- steps -------------------------------------------------------------------------------------

    def step(self, x: Any, y: Any) -> StepLoss:
        """Train on one batch; returns its loss, which waits only when it is read.

        Parameters
        ----------
        x, y
            Inputs and targets: tensors, NumPy arrays, or pytrees of them; or both Dask collections
            (arrays, Delayed, thunks), which are then cut on the workers. The model is called as
            ``model(x)``, the loss as ``loss_fn(output, y)``.

        Raises
        ------
        ValueError
            The batch is empty, or inputs and targets do not fit together; nothing is submitted.
        TaskgradError
            The batch has thunks of another client; or another trainer was made over the chain, or
            the scheduler needs a metric.
        LayerError
            A layer or the loss raised, in this step or one before that was not read: the message
            names layer, microbatch and worker. The trainer is as it was before that step.
        WorkerLostError
            A worker is gone, and with it its layers.
        """
        if self._metric_for is not None and not self._in_fit:
            raise TaskgradError(
                f"the lr_scheduler is a {self._metric_for}, which needs a metric, and step() has "
                "none to give: fit(loader, epochs, val_loader) gives it the validation loss after "
                "each epoch"
            )
        with self._turn():
            self._check_usable()
            batch = self._cutter.cut(x, y)
            while len(self._running) >= _AHEAD:
                self._finish(self._running[0])
            if self._chained == _CHAINED:
                self.wait()
            self._let_reads_end()
            made = build(self.chain, batch, self.steps, self._settings, self._last)
            loss = StepLoss(self, made, batch.size)
            self._running.append(loss)
            try:
                launch = self.chain._executor.launch(made.targets, made.order)
            except BaseException as error:
                if isinstance(error, Exception) and not isinstance(error, TaskgradError | OSError):
                    self._running.pop()  # it was not submitted; the steps before it go on
                    error.add_note(
                        f"The batch of step {self.steps} cannot be sent to the workers; nothing "
                        "of this step was submitted, and steps before it are not affected."
                    )
                    raise
                self._give_up(error)
                raise
            made.launched(launch)
            self._last = made
            self._chained += 1
            self.steps += 1
            return loss

    def wait(self) -> None:
        """Return when every step so far is done.

        Raises
        ------
        LayerError, WorkerLostError
            As `step`.
        """
        with self._turn():
            self._check_usable()
            while self._running:
                self._finish(self._running[0])
            if self._last is not None:
                self.chain._executor.forget(self._last.targets)
                self._last, self._chained = None, 0

    @contextlib.contextmanager
    def _between_steps(self, users: Iterable[Node]) -> Iterator[None]:
        """Let these nodes, which use the chain's layers, run after this step and before the next.

        They are submitted in this.
        """
        with self._turn():
            if self._broken is None and (self._running or self._unsettled):
                self.wait()
            yield
            self._reading.update(users)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """Let one thread at a time do this."""
        return self._call_lock.held()

    def _notify(self, loss: StepLoss) -> None:
        for callback in self.callbacks:
            callback.on_step(self, loss)

    def _read(self, loss: StepLoss) -> None:
        """Wait for a step whose loss somebody reads."""
        with self._turn():
            self._finish(loss)

    def _finish(self, loss: StepLoss) -> None:
        """Wait for the steps up to this one."""
        while not loss.done:
            loss.raise_error()  # another thread may have found it
            first = self._running[0]
            try:
                made = first.made
                executor = self.chain._executor
                error = executor.wait(made.targets, behind=made.behind, labels=made.labels)
                if error is not None:
                    raise error
                [report] = executor.values([made.report])
            except BaseException as error:
                self._give_up(error)
                raise
            self._running.popleft()
            first.settle(report)
            if first.made is not self._last:
                executor.forget(first.made.targets)
            self._call_lock.notify_later(first)

    def _let_reads_end(self) -> None:
        """Have what uses the model, as an evaluation does, pass it before it changes."""
        executor = self.chain._executor
        reading = [node for node in self._reading if executor.is_submitted(node)]
        if reading:
            executor.wait(reading)  # who takes the values hears of errors
        self._reading.clear()

    def _give_up(self, error: BaseException) -> None:
        """Cancel all steps that run, and go back to before the first of them."""
        with self._turn():
            self._cancel_all(error)

    def _cancel_all(self, error: BaseException) -> None:
        for loss in self._running:
            self.chain._executor.cancel(loss.made.targets)
            loss.fail(error)
        self._running.clear()
        self._last, self._chained = None, 0
        self._unsettled = True
        interrupted = not isinstance(error, Exception)
        try:
            self._take_back(_INTERRUPT if interrupted else None)
        except TaskgradError as broken:
            if not isinstance(error, WorkerLostError):
                error.add_note(f"The step could not be taken back: {broken}")

    def _take_back(self, seconds: float | None = None) -> None:
        try:
            done = recover(self.chain, seconds=seconds)
        except TaskgradError as error:
            self._broken = error
            raise
        if done is not None:
            self.steps = done
            self._unsettled = False

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise TaskgradError(
                f"this trainer lost part of its model: {self._broken}"
            ) from self._broken
        check_open(self.chain._session.client)
        check_owner(self.chain, self)
        if self._unsettled:
            self._take_back()

    def _advance(self, metric: float) -> None:
        """Step schedulers that need a metric, on all shards or on none."""
        shards = self.chain._shards.values()
        done = {"done": self.steps}
        try:
            steps = [self._on(s, training.advance, {**done, "metric": metric}) for s in shards]
            self.chain._executor.run(steps)
        except BaseException:
            self.chain._executor.run([self._on(s, training.retreat, done) for s in shards])
            raise

    # -- loops -------------------------------------------------------------------------------------

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
        metrics
            As in `evaluate`, on `val_loader` after each epoch.
        progress
            Show a progress bar (needs tqdm): loss, samples a second, and the bubble, the share of
            the last step in which a worker had nothing to do.

        Returns
        -------
        list of dict
            For each epoch its mean ``loss`` over samples (of batches that lie on workers each
            counts the same) and, with `val_loader`, ``val_loss`` and ``val_`` and
            the name of each metric.

        Raises
        ------
        TypeError
            An argument is of another kind; nothing is trained then.
        ValueError
            `epochs` is negative; or the loader is empty in the first epoch or a later one, or
            yields something else than pairs; or one of the loaders is an iterator, which gives its
            batches once, and there are more epochs. Or the scheduler needs a metric, and there is
            no `val_loader`.
        """
        check_loader("loader", loader)
        if val_loader is not None:
            check_loader("val_loader", val_loader)
        epochs = whole("epochs", epochs, least=0)
        check_epochs(epochs, loader=loader, val_loader=val_loader)
        flag("progress", progress)
        return loops.fit(self, loader, epochs, val_loader, check_metrics(metrics), progress)

    def evaluate(
        self, loader: Iterable[Any], metrics: Mapping[str, Callable[..., Any]] | None = None
    ) -> dict[str, float]:
        """The mean loss over a loader, in evaluation mode, and the mean of each metric.

        A batch counts by its number of samples: that of its targets, or of its inputs where there
        are none. A loss that is a sum over samples is divided by the number of all of them.

        Parameters
        ----------
        loader
            An iterable of pairs (inputs, targets).
        metrics
            Functions of (output, targets) that give one number, a mean over samples. They run where
            the output is.
        """
        check_loader("loader", loader)
        return loops.evaluate(self, loader, check_metrics(metrics))

    def predict(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The model's outputs in evaluation mode, one for each batch of inputs, in order.

        A generator: a few batches are on their way at a time, however many there are.
        """
        check_loader("loader", loader)
        return loops.predict(self, loader)
