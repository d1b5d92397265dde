"""Wait for programs on workers, and notice when they cannot go on."""

from __future__ import annotations

import time
from collections.abc import Callable

from taskgrad.cluster import nested
from taskgrad.cluster.session import Session, check_open
from taskgrad.errors import TaskgradError
from taskgrad.executors.connections import Connections
from taskgrad.executors.monitor import CHECK_S, Outages, stays_out_of_order


def wait_for_programs(
    session: Session,
    connections: Connections,
    done: Callable[[], bool],
    lost: Callable[[str], BaseException],
    what: str,
    *,
    errors: bool = True,
    seconds: float | None = None,
) -> BaseException | None:
    """Wait until something is done, or cannot be; returns the error, or None.

    Parameters
    ----------
    lost
        Makes the error for a lost worker, from its address.
    what
        What the workers run, for messages.
    errors
        Whether an error that a worker raised ends the wait.
    seconds
        After so long the error is a TimeoutError.
    """
    try:
        check_open(session.client)
    except TaskgradError as closed:
        return closed
    outages = Outages()
    until = None if seconds is None else time.monotonic() + seconds
    with nested.waiting():
        while True:
            left = CHECK_S if until is None else min(CHECK_S, until - time.monotonic())
            connections.changed.wait_for(
                lambda: done() or (errors and connections.error is not None), max(0.0, left)
            )
            with connections.lock:
                if done():
                    return None
                error = connections.error
            if errors and error is not None:
                return lost(error) if isinstance(error, str) else error
            try:
                problem = _problem(session, connections, outages, lost, what)
            except TaskgradError as unanswered:  # the client is closed, say
                return unanswered
            if problem is not None:
                return problem
            if until is not None and time.monotonic() >= until:
                return TimeoutError(f"not done within {seconds:g} s")


def _problem(
    session: Session,
    connections: Connections,
    outages: Outages,
    lost: Callable[[str], BaseException],
    what: str,
) -> BaseException | None:
    """Why the workers will not go on; None if nothing is known."""
    trouble = session.out_of_order(set(connections.workers))
    gone = sorted(a for a, why in trouble.items() if why != "paused")
    if gone:
        return lost(gone[0])
    for address in sorted(outages.lasting(trouble)):
        return stays_out_of_order(session, address, trouble[address], what)
    return connections.task_error()
