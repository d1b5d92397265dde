"""Assign layers to workers. Pure functions over costs."""

from __future__ import annotations

from collections.abc import Sequence


def contiguous(costs: Sequence[float], n_workers: int) -> list[int]:
    """Cut layers into runs, one a worker, so that the largest run costs least.

    Returns the worker index of each layer, from 0 on, not decreasing; with fewer layers than
    workers each layer is a run. `costs` are in any unit (bytes here).

    The linear partition problem, by binary search over the bound with a greedy check, as in
    torchgpipe's block partition (Bárány and Grinberg, 2015, for the problem).

    Examples
    --------
    >>> contiguous([1, 1, 1, 3], 2)
    [0, 0, 0, 1]
    """
    n, k = len(costs), min(n_workers, len(costs))
    low, high = max(costs, default=0.0), float(sum(costs))
    for _ in range(64):  # bisection: past double precision
        bound = (low + high) / 2
        if _runs(costs, bound) <= k:
            high = bound
        else:
            low = bound
    placed: list[int] = []
    run, total = 0, 0.0
    for i, cost in enumerate(costs):
        # A new run where the bound says so, or where every run left needs a layer of its own.
        if i and (total + cost > high or n - i <= k - 1 - run):
            run, total = run + 1, 0.0
        total += cost
        placed.append(run)
    return placed


def _runs(costs: Sequence[float], bound: float) -> int:
    runs, total = 1, 0.0
    for cost in costs:
        if total and total + cost > bound:
            runs, total = runs + 1, 0.0
        total += cost
    return runs


def round_robin(n_layers: int, n_workers: int) -> list[int]:
    """Layer i goes to worker i modulo the number of workers.

    Examples
    --------
    >>> round_robin(5, 2)
    [0, 1, 0, 1, 0]
    """
    return [i % n_workers for i in range(n_layers)]


def there_and_back(n_runs: int) -> list[int]:
    """The worker of each run in a V: once over all workers, and back in the opposite order.

    The placement of the schedule ``"zb_v"``: worker 0 has the first run and the last one.

    Examples
    --------
    >>> there_and_back(6)
    [0, 1, 2, 2, 1, 0]
    """
    return [min(run, n_runs - 1 - run) for run in range(n_runs)]
