"""The steps of a trainer that are on their way: submitted, waited for, or taken back."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakSet

from taskgrad.chain import GraphChain
from taskgrad.cluster.session import check_open
from taskgrad.errors import TaskgradError, WorkerLostError
from taskgrad.executors.step_lowering import NotCompilableError
from taskgrad.graph.nodes import Node
from taskgrad.train.call_lock import CallLock
from taskgrad.train.data import Batch
from taskgrad.train.loss import StepLoss
from taskgrad.train.owner import check_owner, recover
from taskgrad.train.runners import CompiledRunner, FuturesRunner, Runner
from taskgrad.train.step import Settings
from taskgrad.worker import training

# A step is submitted while the one before still runs: its inputs are there when that is done.
_AHEAD = 2
logger = logging.getLogger("taskgrad")

# How long Ctrl-C may wait for the workers to take back a step, in seconds.
_INTERRUPT_S = 0.5


class Steps:
    """The steps of one trainer, and the owner of its chain. Several threads may use it.

    ``notify`` is called with the loss of each step that is done, in order.

    Attributes
    ----------
    taken : int
        How many batches were taken, or are being taken.
    metric_for : str or None
        The class of the learning-rate scheduler, if its step needs a metric.
    """

    def __init__(
        self,
        chain: GraphChain,
        settings: Settings,
        notify: Callable[[StepLoss], None],
        executor: str,
    ) -> None:
        self.taken = 0
        self.metric_for: str | None = None
        self._in_fit = False
        self._chain = chain
        self._layout = chain.layout
        self._executor = chain.layout.executor
        self._settings = settings
        runner = CompiledRunner if executor == "compiled" else FuturesRunner
        self._runner: Runner = runner(chain.layout, settings)
        self._lock = CallLock(notify)
        self._running: deque[StepLoss] = deque()
        self._readers: WeakSet[Node] = WeakSet()  # what uses the model, not in a step
        self._unsettled = False  # a step was interrupted, and is yet to be taken back
        self._broken: BaseException | None = None

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of this trainer in the block."""
        return self._lock.held()

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

    def take(self, split: Callable[[], Batch]) -> StepLoss:
        """Submit a step on the batch that `split` returns; see `Trainer.step`."""
        if self.metric_for is not None and not self._in_fit:
            raise TaskgradError(
                f"the lr_scheduler is a {self.metric_for}, which needs a metric, and step() has "
                "none to give: fit(loader, epochs, val_loader) gives it the validation loss after "
                "each epoch"
            )
        with self.held():
            self._check_usable()
            batch = split()
            while len(self._running) >= _AHEAD:
                self.finish(self._running[0])
            if self._runner.must_finish:
                self.wait()
            self._wait_for_readers()
            try:
                try:
                    running = self._runner.submit(batch, self.taken)
                except NotCompilableError as reason:
                    self.wait()
                    self._runner = FuturesRunner(self._layout, self._settings)
                    logger.warning("taskgrad runs these steps as Dask tasks: %s.", str(reason))
                    running = self._runner.submit(batch, self.taken)
            except BaseException as error:
                if isinstance(error, Exception) and not isinstance(error, TaskgradError | OSError):
                    error.add_note(
                        f"The batch of step {self.taken} cannot be sent to the workers; nothing "
                        "of this step was submitted, and steps before it are not affected."
                    )
                    raise
                self.abort(error)
                raise
            loss = StepLoss(self.finish, self.taken, batch.size, running)
            self._running.append(loss)
            self.taken += 1
            return loss

    def wait(self) -> None:
        """Return when every step so far is done; see `Trainer.wait`."""
        with self.held():
            self._check_usable()
            while self._running:
                self.finish(self._running[0])
            self._runner.finish()

    def finish(self, loss: StepLoss) -> None:
        """Wait for the steps up to this one."""
        with self.held():
            while not loss.done:
                loss.raise_error()  # another thread may have found it
                first = self._running[0]
                try:
                    report = self._runner.wait(first.running)
                except BaseException as error:
                    self.abort(error)
                    raise
                self._running.popleft()
                first.settle(report)
                self._lock.notify_later(first)

    @contextlib.contextmanager
    def between_steps(self, readers: Iterable[Node]) -> Iterator[None]:
        """Submit these nodes, which use the chain's layers, in the block.

        They run after the steps so far, and before the next.
        """
        with self.held():
            if self._broken is None and (self._running or self._unsettled):
                self.wait()
            yield
            self._readers.update(readers)

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
        with self.held():
            self._runner.cancel([loss.running for loss in self._running])
            for loss in self._running:
                loss.fail(error)
            self._running.clear()
            self._unsettled = True
            interrupted = not isinstance(error, Exception)
            try:
                self._roll_back(_INTERRUPT_S if interrupted else None)
            except TaskgradError as broken:
                if not isinstance(error, WorkerLostError):
                    error.add_note(f"The step could not be taken back: {broken}")

    def _roll_back(self, seconds: float | None = None) -> None:
        try:
            if not self._runner.is_stopped(seconds):
                return
            done = recover(self._layout, seconds=seconds)
        except TaskgradError as error:
            self._broken = error
            raise
        if done is not None:
            self.taken = done
            self._unsettled = False

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise TaskgradError(
                f"this trainer lost part of its model: {self._broken}"
            ) from self._broken
        check_open(self._layout.session.client)
        check_owner(self._chain, self, "Trainer")
        if self._unsettled:
            self._roll_back()
