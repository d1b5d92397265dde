"""Worker: run the function with a batch of items, the only kind of task of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from distributed import Worker, get_worker
from distributed.protocol.serialize import to_serialize

from taskgrad import remote_errors
from taskgrad.cluster.messages import task_messages
from taskgrad.cluster.nested import give_thread_back
from taskgrad.cluster.tasks import contained
from taskgrad.cluster.wire.leases import BufferLease
from taskgrad.cluster.wire.thresholds import LEASE_MESSAGE_MIN
from taskgrad.cluster.worker_plugin import store_of
from taskgrad.errors import TaskgradError, TravelError
from taskgrad.graph.pack import missing_code
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.item_errors import portable
from taskgrad.remote_errors import own_frames, text_of
from taskgrad.streaming.batch_codec import Batch, BatchEncoder
from taskgrad.worker.settings import applied


@dataclass(frozen=True)
class BatchTask:
    """Which items of which stream to run, how, and for which client."""

    token: str
    client: str
    number: int
    star: bool
    lease: bool
    """True if the driver can read large results in the worker's memory."""
    settings: TorchSettings
    """Torch's, under which the function runs."""


class Failure(NamedTuple):
    """What an item raised, and where."""

    error: BaseException
    frames: str = ""
    of_item: bool = True
    """False if the function itself could not be loaded."""

    def __reduce__(self) -> Any:
        return _failure, (remote_errors.dumps(self.error), self.frames, self.of_item)


def _failure(error: bytes, frames: str, of_item: bool) -> Failure:
    return Failure(remote_errors.loads(error), frames, of_item)


class LeasedResult:
    """A task's result whose large frames the driver reads in place; it is pickled as the batch."""

    def __init__(self, results: Batch) -> None:
        self.results = results
        self._lease = BufferLease()
        self.leased = results.leased(self._lease)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.results.__reduce_ex__(protocol)

    def __sizeof__(self) -> int:
        return self.results.nbytes


def run_batch(task: BatchTask, items: Batch) -> Any:
    """Call the function with each item; send the results to the driver.

    A message has them if they are small, or else their leased addresses. The task itself returns
    large results, for a driver that cannot read them in place.
    """
    return contained("a batch of items", _run_batch, get_worker(), task, items)


def _run_batch(worker: Worker, task: BatchTask, items: Batch) -> Any:
    try:
        fn = task_messages.broadcast_get(worker, task.token, _load)
    except Exception as error:
        unloaded = Failure(portable(error), of_item=False)
        _tell(worker, task, failure=unloaded, whole=True)
        return None
    if fn is None:
        return None  # the stream has ended
    try:
        items = items.fetch()
    except OSError:
        _tell(worker, task, unreadable=True)
        return None
    wanted = task_messages.broadcast_values(worker)
    try:
        with applied(task.settings, store_of(worker).worker, give_thread_back):
            started = time.perf_counter()
            encoder, failure = _run(fn, items, task.star, wanted, task.token)
            seconds = time.perf_counter() - started
    except TaskgradError as error:
        _tell(worker, task, failure=Failure(error, of_item=False), whole=True)
        return None
    results = encoder.batch()
    whole = results.nbytes <= LEASE_MESSAGE_MIN  # with the message, through the scheduler
    about = {"seconds": seconds, "failure": failure, "nbytes": results.nbytes, "whole": whole}
    if whole:
        _tell(worker, task, results=results, **about)
        return None
    if not task.lease:
        _tell(worker, task, **about)
        return results
    result = LeasedResult(results)
    _tell(worker, task, results=result.leased, **about)
    return result


def _run(
    fn: Callable[..., Any], items: Batch, star: bool, wanted: dict[str, Any], token: str
) -> tuple[BatchEncoder, Failure | None]:
    """The results up to the first failure, or until the stream has ended."""
    encoder = BatchEncoder()
    add = encoder.add
    args = iter(items)
    while token in wanted:
        try:
            item = next(args)
        except StopIteration:
            break
        except TravelError as error:
            return encoder, Failure(error)
        try:
            result = fn(*item) if star else fn(item)
        except BaseException as error:
            return encoder, Failure(portable(error), own_frames(error))
        try:
            add(result)
        except Exception as error:
            return encoder, Failure(_unsendable(result, error))
        except BaseException as error:
            return encoder, Failure(portable(error), own_frames(error))
    return encoder, None


def _unsendable(result: Any, error: Exception) -> TravelError:
    kind = type(result)
    return TravelError(
        f"a result cannot be sent to the driver: a {kind.__module__}.{kind.__qualname__} "
        f"({type(error).__name__}: {error}). Return tensors, numbers or other values that can be "
        "pickled"
    )


def _load(batch: Batch) -> Any:
    try:
        [fn] = batch
    except BaseException as error:
        if isinstance(error.__cause__, ImportError | AttributeError):
            raise missing_code(error.__cause__) from None
        raise TaskgradError(
            f"the mapped function arrived and cannot be unpickled there ({text_of(error)}). Are "
            "the modules that it needs installed on the workers? "
            'client.upload_file("module.py") sends one'
        ) from error
    return fn


def _tell(worker: Worker, task: BatchTask, **message: Any) -> None:
    for part in ("results", "failure"):
        if message.get(part) is not None:
            message[part] = to_serialize(message[part])
    task_messages.send(worker, task.client, task.token, {"number": task.number, **message})
