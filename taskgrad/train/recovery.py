"""After a step that did not come to its end: every stage at the same step again."""

from __future__ import annotations

from typing import Any

from taskgrad.chain import GraphChain
from taskgrad.executors.futures import cancel, run, submit, values_of
from taskgrad.executors.watching import wait_for
from taskgrad.graph.nodes import Leaf, Node, StageCall, new_key
from taskgrad.train.step import Settings, finish


def recover(chain: GraphChain, settings: Settings, *, seconds: float | None = None) -> int | None:
    """Have every stage forget a step under way, or finish one that some have committed.

    Returns the number of batches taken; with `seconds` None if the stages are busy for longer, and
    nothing is changed then.
    """
    asked = _on_all(chain, "progress")
    submit(asked, chain._session)
    error = wait_for(asked, chain._session, seconds=seconds)
    if isinstance(error, TimeoutError):
        cancel(asked, chain._session)
        return None
    if error is not None:
        raise error
    answers: list[tuple[int, Any]] = values_of(asked, chain._session)
    done = max(count for count, _ in answers)
    lagging = min(count for count, _ in answers) < done
    # Copies of tied parameters get their values last: those of the last step may not have come.
    copies = done > 0 and any(stage.homes for stage in chain._stages.values())
    if lagging or copies:
        summaries = [Leaf(summary, needs_grad=False) for _, summary in answers]
        update = done % settings.accumulate == 0
        run(
            list(finish(chain, done - 1, settings, summaries, update=update).values()),
            chain._session,
        )
    run(_on_all(chain, "roll_back"), chain._session)
    return done


def _on_all(chain: GraphChain, action: str) -> list[Node]:
    return [
        StageCall(stage, f"training.{action}", {}, key=new_key(action, chain._title))
        for stage in chain._stages.values()
    ]
