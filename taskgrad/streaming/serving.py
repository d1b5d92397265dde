"""What a worker does with a chunk of items: the only task of a streaming map."""

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
from taskgrad.errors import TaskgradError, TravelError
from taskgrad.graph.torch_settings import TorchSettings
from taskgrad.item_errors import portable
from taskgrad.remote_errors import own_frames, text_of
from taskgrad.streaming.batch_codec import Packer, Parcel
from taskgrad.worker.settings import applied


@dataclass(frozen=True)
class Chunk:
    """Which items of which map, and whom to tell."""

    token: str
    client: str
    number: int
    star: bool
    lend: bool
    """Whether results may be left in memory for the driver to read."""
    settings: TorchSettings
    """Those of torch under which the function runs."""


class Failure(NamedTuple):
    """What an item raised, and where."""

    error: BaseException
    frames: str = ""
    of_item: bool = True
    """Not so if the function itself could not be loaded."""

    def __reduce__(self) -> Any:
        return _failure, (remote_errors.dumps(self.error), self.frames, self.of_item)


def _failure(error: bytes, frames: str, of_item: bool) -> Failure:
    return Failure(remote_errors.loads(error), frames, of_item)


class LeasedResult:
    """A task's result of which the driver reads the large parts here; pickled, it is whole."""

    def __init__(self, results: Parcel) -> None:
        self.results = results
        self._lease = BufferLease()
        self.leased = results.leased(self._lease)

    def __reduce__(self) -> Any:
        return _whole, (self.results,)

    def __sizeof__(self) -> int:
        return self.results.nbytes


def _whole(results: Parcel) -> Parcel:
    return results


def run_chunk(chunk: Chunk, items: Parcel) -> Any:
    """Call the function with each item; write the results to the driver.

    They go with a letter, if they are small or the driver shall read them here; what the task
    itself returns is for the other cases.
    """
    return contained("a chunk of items", _run_chunk, get_worker(), chunk, items)


def _run_chunk(worker: Worker, chunk: Chunk, items: Parcel) -> Any:
    try:
        fn = task_messages.take(worker, chunk.token, _load)
    except Exception as error:
        unloaded = Failure(portable(error), of_item=False)
        _tell(worker, chunk, failure=unloaded, whole=True)
        return None
    if fn is None:
        return None  # nobody wants it any more
    try:
        items = items.fetch()
    except OSError:
        _tell(worker, chunk, unreadable=True)
        return None
    try:
        with applied(chunk.settings, worker.address, give_thread_back):
            started = time.perf_counter()
            packer, failure = _run(fn, items, chunk.star, task_messages.taken(worker), chunk.token)
            seconds = time.perf_counter() - started
    except TaskgradError as error:
        _tell(worker, chunk, failure=Failure(error, of_item=False), whole=True)
        return None
    results = packer.parcel()
    whole = results.nbytes <= LEASE_MESSAGE_MIN  # with the message, through the scheduler
    about = {"seconds": seconds, "failure": failure, "nbytes": results.nbytes, "whole": whole}
    if whole:
        _tell(worker, chunk, results=results, **about)
        return None
    if not chunk.lend:
        _tell(worker, chunk, **about)
        return results
    kept = LeasedResult(results)
    _tell(worker, chunk, results=kept.leased, **about)
    return kept


def _run(
    fn: Callable[..., Any], items: Parcel, star: bool, wanted: dict[str, Any], token: str
) -> tuple[Packer, Failure | None]:
    """Results up to the first failure, or until the map is over."""
    packer = Packer()
    add = packer.add
    args = iter(items)
    while token in wanted:
        try:
            item = next(args)
        except StopIteration:
            break
        except TravelError as error:
            return packer, Failure(error)
        try:
            result = fn(*item) if star else fn(item)
        except BaseException as error:
            return packer, Failure(portable(error), own_frames(error))
        try:
            add(result)
        except Exception as error:
            return packer, Failure(_unsendable(result, error))
        except BaseException as error:
            return packer, Failure(portable(error), own_frames(error))
    return packer, None


def _unsendable(result: Any, error: Exception) -> TravelError:
    kind = type(result)
    return TravelError(
        f"a result cannot be sent to the driver: a {kind.__module__}.{kind.__qualname__} "
        f"({type(error).__name__}: {error}). Return tensors, numbers or other values that can be "
        "pickled"
    )


def _load(parcel: Parcel) -> Any:
    try:
        [fn] = parcel
    except BaseException as error:
        raise TaskgradError(
            f"the mapped function arrived and cannot be unpickled there ({text_of(error)}). Are "
            "the modules that it needs installed on the workers? "
            'client.upload_file("module.py") sends one'
        ) from error
    return fn


def _tell(worker: Worker, chunk: Chunk, **letter: Any) -> None:
    if "results" in letter:
        letter["results"] = to_serialize(letter["results"])
    if letter.get("failure") is not None:
        letter["failure"] = to_serialize(letter["failure"])
    task_messages.write(worker, chunk.client, chunk.token, {"number": chunk.number, **letter})
