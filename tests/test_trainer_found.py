"""Faults that the first users of the Trainer found; each stays away."""

from __future__ import annotations

from taskgrad.cluster.session import session


def test_no_worker_is_gone_when_the_client_refreshes_what_it_knows(client, monkeypatch):
    """Every 2 s the client asks the scheduler for everything but the workers."""
    ours = session(client)
    addresses = {worker.address for worker in ours.workers()}
    ask = client._update_scheduler_info

    async def ask_and_refresh(n_workers=0):
        await ask(n_workers=n_workers)
        await ask()

    monkeypatch.setattr(client, "_update_scheduler_info", ask_and_refresh)
    assert not client.scheduler_info(n_workers=-1)["workers"]
    assert ours.out_of_order(addresses) == {}
    assert {worker.address for worker in ours.workers()} == addresses
