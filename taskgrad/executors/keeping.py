"""Change stages on several workers as a whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from taskgrad.cluster.session import Session
from taskgrad.errors import TaskgradError
from taskgrad.executors.futures import run
from taskgrad.graph.nodes import Node, Stage, StageCall, new_key


@contextlib.contextmanager
def all_or_nothing(stages: Iterable[Stage], session: Session) -> Iterator[None]:
    """If what is done meanwhile raises, the layers of all stages are what they were before.

    So are the optimizers that train them. Each worker keeps copies of parameters and buffers.
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
