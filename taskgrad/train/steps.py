"""The steps of a trainer that are on their way: submitted, waited for, or taken back."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.step_lowering import NotCompilableError
from taskgrad.graph.leaves import Leaf
from taskgrad.graph.nodes import Node
from taskgrad.layout import Layout
from taskgrad.train.call_lock import CallLock
from taskgrad.train.callbacks.on_step import OnStep
from taskgrad.train.chain_group import ChainGroup
from taskgrad.train.data import Batch
from taskgrad.train.hint import Hints
from taskgrad.train.loss import StepLoss
from taskgrad.train.loss_weight import Accumulation
from taskgrad.train.owner import check_owner, recover
from taskgrad.train.runners import CompiledRunner, FuturesRunner, Runner
from taskgrad.train.step import Settings
from taskgrad.worker import training

# A step is submitted while the one before still runs: its inputs are there when that is done.
_AHEAD = 2
logger = logging.getLogger("taskgrad")

# How long Ctrl-C may wait for the workers to take back a step, in seconds.
_INTERRUPT_S = 0.5


def _is_read(loss: StepLoss) -> bool:
    return loss.is_read


class Steps:
    """The steps of one trainer, and the owner of its chain. Several threads may use it.

    ``notify`` is called with the loss of each step that is done, in order, and calls ``on_step``.

    Attributes
    ----------
    taken : int
        How many batches were taken, or are being taken.
    metric_for : str or None
        The class of the learning-rate scheduler, if its step needs a metric.
    accumulation : Accumulation
        The weights of the batches since the last update, where losses have weights.
    """

    def __init__(
        self,
        chain: GraphChain | ChainGroup,
        layout: Layout,
        settings: Settings,
        on_step: OnStep,
        notify: Callable[[StepLoss], None],
        executor: str,
    ) -> None:
        self.taken = 0
        self.metric_for: str | None = None
        self.accumulation = Accumulation(settings.accumulate)
        self._in_fit = False
        self._chain = chain
        self._layout = layout
        self._executor = layout.executor
        self._settings = settings
        runner = CompiledRunner if executor == "compiled" else FuturesRunner
        self._runner: Runner = runner(layout, settings)
        self._hints = Hints(settings.plan)
        self._on_step = on_step
        self._notify = notify
        self._lock = CallLock(self._notified)
        self._running: deque[StepLoss] = deque()
        self._taken_back: list[StepLoss] = []  # to be taken again once a callback has returned
        self._own: set[int] = set()  # steps whose callbacks take steps themselves
        self._settled: int | None = None  # steps up to this may be so that they stay
        self._readers: WeakSet[Node] = WeakSet()  # what uses the model, not in a step
        self._unsettled = False  # a step may have begun that is not counted, or no longer
        self._broken: BaseException | None = None

    @property
    def taken_by_now(self) -> int:
        """As `taken`; in a callback of a step how many were taken when that one was.

        Waits where an interrupt did not: a step that it cut off is taken or taken back.
        """
        loss = self._lock.notified
        if loss is not None and loss.step not in self._own:
            return loss.step + 1
        if self._unsettled:
            with self._lock.held(), contextlib.suppress(TaskgradError):
                self._settle_interrupted()
        return self.taken

    @contextlib.contextmanager
    def in_fit(self) -> Iterator[None]:
        """Allow steps in the block even if the scheduler needs a metric: `advance` follows."""
        self._in_fit = True
        try:
            yield
        finally:
            self._in_fit = False

    def advance(self, metric: float) -> None:
        """Step schedulers that need a metric, on all shards or on none."""
        layout, done = self._layout, self.taken
        try:
            layout.run(layout.tasks(training.advance, done=done, metric=metric))
        except BaseException:
            layout.run(layout.tasks(training.undo_advance, done=done))
            raise

    def take(self, split: Callable[[bool], Batch]) -> StepLoss:
        """Submit a step on the batch that `split` returns; see `Trainer.step`.

        Its argument is True if the step may be taken back for a callback, and then again: what
        might write the memory of the batch is not to change it.
        """
        if self.metric_for is not None and not self._in_fit:
            raise TaskgradError(
                f"the lr_scheduler is a {self.metric_for}, which needs a metric, and step() has "
                "none to give: fit(loader, epochs, val_loader) gives it the validation loss after "
                "each epoch"
            )
        batch: Batch | None = None
        while True:
            with self._lock.held():
                self._check_usable()
                self._layout.refuse_averages("a step")
                inside = self._lock.notified
                if inside is not None:
                    self._own.add(inside.step)
                self._take_again()
                batch = batch or split(bool(self._on_step))
                if self._has_room():
                    return self._submit(batch)
            self._lock.wait_for(_is_read)

    def make_room(self) -> None:
        """Wait until another step can be submitted, and the callbacks before it have returned."""
        room = False
        while not room:
            with self._lock.held():
                self._check_usable()
                self._take_again()
                room = self._has_room()
            self._lock.wait_for(_is_read)

    def _has_room(self) -> bool:
        """True if a step can be submitted now; else a step was waited for, or a thread is to be."""
        held = self._running and self._running[-1].may_be_read
        if held or len(self._running) >= _AHEAD:
            self._finish_first()  # and then its callbacks, before the next step is submitted
            return False
        return not self._lock.is_elsewhere(_is_read)

    def _submit(self, batch: Batch) -> StepLoss:
        """Submit a step on this batch; those before may run."""
        is_read = self._on_step.reads(self.taken)  # first, as it is the user's code
        if self._runner.must_finish:
            while self._running:
                self._finish_first()
            self._runner.finish()
        self._wait_for_readers()
        if self._on_step and self._settled is None:
            self._settle_up_to(self.taken)
        # All of it within the block: once a step may have been sent, an interrupt is to end it.
        try:
            try:
                running = self._launch(batch)
            except NotCompilableError as reason:
                while self._running:
                    self._finish_first()
                self._runner.finish()
                self._runner = FuturesRunner(self._layout, self._settings)
                logger.warning("taskgrad runs these steps as Dask tasks: %s.", str(reason))
                running = self._launch(batch)
            loss = StepLoss(self.finish, self.taken, batch, running)
            loss.is_read, loss.may_be_read = is_read, is_read or self._on_step.any_uncalled
            self._running.append(loss)
            self.taken += 1
            self._unsettled = False
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, TaskgradError | OSError):
                self._unsettled = False
                error.add_note(
                    f"The batch of step {self.taken} cannot be sent to the workers; nothing "
                    "of this step was submitted, and steps before it are not affected."
                )
                raise
            self.abort(error)
            raise
        return loss

    def _launch(self, batch: Batch) -> Any:
        """Submit the next step; what the runner knows it by.

        Until the caller has counted the step it is one that may have to be taken back.
        """
        if batch.loss_weights:
            scales, rescale = self.accumulation.scales(batch.loss_weights, self.taken)
            batch = replace(
                batch,
                scales=tuple([Leaf(scale, needs_grad=False) for scale in scales]),
                rescale=None if rescale is None else Leaf(rescale, needs_grad=False),
            )
        self._unsettled = True
        return self._runner.submit(batch, self.taken)

    def wait(self) -> None:
        """Return when every step so far is done; see `Trainer.wait`."""
        while True:
            with self._lock.held():
                self._check_usable()
                self._take_again()
                if not self._running:
                    self._runner.finish()
                    return
                self._finish_first()

    def finish(self, loss: StepLoss) -> None:
        """Wait for the steps up to this one."""
        while not loss.done:
            with self._lock.held():
                loss.raise_error()  # another thread may have found it
                self._take_again()
                if not loss.done:
                    self._finish_first()

    def _finish_first(self) -> None:
        """Wait for the first step that runs; its callbacks come when the lock is released."""
        first = self._running[0]
        count = first.batch.count
        try:
            report = self._runner.wait(first.running)
            first.settle(report)
            self._lock.notify_later(first)
            self._running.popleft()
        except BaseException as error:
            self.abort(error)
            raise
        self._hints.note(report, count)

    def _notified(self, loss: StepLoss) -> None:
        """Call the callbacks of a step that is done; then take again what they had taken back."""
        try:
            self._notify(loss)
        finally:
            self._own.discard(loss.step)
            with self._lock.held():
                self._take_again()
                self._settle_up_to(loss.step + 1)

    def _settle_up_to(self, step: int) -> None:
        """Let workers drop what takes this step back: the callbacks of the one before are done."""
        self._settled = step
        self._runner.settle_up_to(step)

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Hold the lock in the block while no step runs.

        In a callback's `on_step` the state then is that of its step.
        """
        self._hold_for_callback()
        while True:
            with self._lock.held():
                self._check_usable()
                if not self._running:
                    if not self._taken_back:
                        self._runner.finish()
                    yield
                    return
                self._finish_first()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """As `idle`, and nothing else that uses the chain's layers runs."""
        with self.idle():
            self._wait_for_readers()
            yield

    @contextlib.contextmanager
    def between_steps(self, readers: Iterable[Node]) -> Iterator[None]:
        """Submit these nodes, which use the chain's layers, in the block.

        They run after the steps so far, and before the next. In a callback's `on_step` they see the
        state of its step.
        """
        self._hold_for_callback()
        waited = False
        while True:
            with self._lock.held():
                if self._broken is None and (self._running or self._unsettled):
                    self._check_usable()
                if not self._running:
                    if waited and not self._taken_back:
                        self._runner.finish()
                    yield
                    self._readers.update(readers)
                    return
                self._finish_first()
                waited = True

    # -- steps that are taken back for a callback, and again when it has returned -----------------

    def _hold_for_callback(self) -> None:
        """If a callback of a step runs in this thread, take back the steps after that one.

        Raises TaskgradError if they can no longer be taken back.
        """
        loss = self._lock.notified
        if loss is None or loss.step in self._own:
            return
        name = self._on_step.note_reader()
        with self._lock.held():
            if self.taken > loss.step + 1:
                self._take_back(loss.step + 1, name)

    def drop_ahead(self) -> list[StepLoss]:
        """In a callback of a step: do not take the steps after it, if they can be taken back.

        Returns these.
        """
        if self._lock.notified is None:
            return []
        with contextlib.suppress(TaskgradError), self._lock.held():
            self._hold_for_callback()
            dropped, self._taken_back = self._taken_back, []
            for loss in dropped:
                loss.fail(TaskgradError(f"step {loss.step} was not taken: training was stopped"))
            return dropped
        return []

    def _take_back(self, done: int, callback: str) -> None:
        """Take back the steps from this number on; `_take_again` takes them again."""
        ahead = list(self._running)
        if not self._runner.takes_back:
            why = "steps that run as Dask tasks cannot"
        elif len(ahead) < self.taken - done or (self._settled or 0) >= done:
            why = "it has ended, as another thread uses the trainer"
        elif not all(loss.batch.is_intact for loss in ahead):
            why = "the memory of its batch was written meanwhile"
        else:
            why = ""
        if why:
            raise TaskgradError(
                f"the callback {callback} uses the state after step {done - 1} in on_step, when "
                f"step {done} has begun, and that step cannot be taken back: {why}. Have the "
                "callback say so before: def reads_state(self, step): return True"
            )
        self._unsettled = True
        self._running.clear()
        try:
            self._runner.stop(None)
            recover(self._layout, done=done)
            self.taken, self._unsettled = done, False
            self._taken_back = ahead
        except BaseException as error:
            for loss in ahead:
                loss.fail(error)
            if isinstance(error, TaskgradError):
                self._broken = error
            raise

    def _take_again(self) -> None:
        """Submit the steps that were taken back."""
        if self._taken_back:
            self._layout.refuse_averages("a wait for a later step")
        while self._taken_back:
            loss = self._taken_back[0]
            try:
                self._wait_for_readers()
                loss.running = self._launch(loss.batch)
                self._running.append(loss)
                self._taken_back.pop(0)
                self.taken += 1
                self._unsettled = False
            except BaseException as error:
                for each in self._taken_back:
                    each.fail(error)
                self._taken_back.clear()
                self.abort(error)
                raise

    def add_reader(self, node: Node) -> None:
        """A submitted node that uses the model: it runs before the next step."""
        self._readers.add(node)

    def _wait_for_readers(self) -> None:
        """Wait for what uses the model, such as an evaluation, before a step changes it."""
        readers = [node for node in self._readers if self._executor.is_submitted(node)]
        if readers:
            self._executor.wait(readers)  # errors are raised where values are taken
        self._readers.clear()

    def abort(self, error: BaseException) -> None:
        """Cancel all steps that run, and go back to before the first of them."""
        with self._lock.held():
            self._unsettled = True
            self._fail_running(error)
            interrupted = not isinstance(error, Exception)
            try:
                self._roll_back(_INTERRUPT_S if interrupted else None)
            except TaskgradError as broken:
                if not isinstance(error, WorkerLostError):
                    error.add_note(f"The step could not be taken back: {broken}")

    def _roll_back(self, seconds: float | None = None) -> None:
        try:
            if not self._runner.stop(seconds):
                return
            done = recover(self._layout, seconds=seconds)
        except TaskgradError as error:
            self._broken = error
            raise
        if done is not None:
            self.taken = done
            self._unsettled = False

    def _settle_interrupted(self) -> None:
        """Take back the step that was interrupted, if there is one, unless all shards took it."""
        if self._unsettled and self._broken is None:
            self._fail_running(TaskgradError("the step was interrupted"))
            self._roll_back()

    def _fail_running(self, error: BaseException) -> None:
        for loss in self._running:
            loss.fail(error)
        self._running.clear()

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise TaskgradError(
                f"this trainer lost part of its model: {self._broken}"
            ) from self._broken
        check_open(self._layout.session.client)
        check_owner(self._chain, self, "Trainer")
        self._settle_interrupted()
