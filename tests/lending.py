"""Messages that lend what is large in them; where this system cannot do that, tests are skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from taskgrad.cluster import cross_memory, loans

HERE, THERE = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


@contextmanager
def lending(known: bool = True) -> Iterator[loans.Loan]:
    """A loan for the messages of this block; whether the receiver has shown that it can read."""
    lender = loans.Lender(HERE)
    if known:
        lender.readers.add(THERE)
    loan = lender.loan(THERE)
    assert loan is not None
    loans._current.set(loan)
    try:
        yield loan
    finally:
        loans._current.set(None)
        loan.end(answered=True)


def _can_read_others() -> bool:
    """Whether processes here can read each other: a child its parent no easier than a sibling."""
    with lending() as loan:
        script = f"from taskgrad.cluster.loans import Seal; assert Seal{tuple(loan.seal)}.intact()"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    return done.returncode == 0


needs_call = pytest.mark.skipif(not cross_memory.available(), reason="no process_vm_readv")
needs_others = pytest.mark.skipif(not _can_read_others(), reason="no reading of other processes")
