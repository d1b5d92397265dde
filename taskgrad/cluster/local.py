"""A cluster on this machine."""

from __future__ import annotations

from typing import Any

from distributed import Client


def local_cluster(n_workers: int = 2, threads_per_worker: int = 1, **kwargs: Any) -> Client:
    """Start worker processes on this machine and connect to them.

    Parameters
    ----------
    n_workers, threads_per_worker
        One thread a worker by default: a stage runs one task at a time.
    **kwargs
        Passed on to ``distributed.LocalCluster`` (``dashboard_address``, ``memory_limit``, ...).

    Returns
    -------
    distributed.Client
        Closing it closes the cluster. It becomes Dask's default client.

    Examples
    --------
    >>> import taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> client.close()
    """
    # With no address, a Client starts a LocalCluster of its own and closes it with itself.
    return Client(
        n_workers=n_workers,
        threads_per_worker=threads_per_worker,
        **{"processes": True, **kwargs},
    )
