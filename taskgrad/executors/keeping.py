"""Change stages on several workers: all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.futures import run
from taskgrad.graph.nodes import Node, Stage, StageCall, new_key


@contextlib.contextmanager
def all_or_nothing(stages: Iterable[Stage], session: Session) -> Iterator[None]:
    """Restore the layers of all stages, and their optimizers, if the block raises.

    Each worker keeps copies of parameters and buffers until the block ends.
    """
    stages = list(stages)
    run(_on(stages, "keep"), session)
    try:
        yield
    except BaseException as error:
        try:
            run(_on(stages, "take_back"), session)
        except TaskgradError as broken:
            error.add_note(f"What was loaded could not be taken back: {broken}")
        raise
    run(_on(stages, "settle"), session)


def _on(stages: Iterable[Stage], action: str) -> list[Node]:
    return [StageCall(s, f"keeping.{action}", {}, key=new_key(action)) for s in stages]
