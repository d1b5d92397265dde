"""Which executor runs the graphs of a session."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from dask.highlevelgraph import HighLevelGraph

from taskgrad.cluster.session import Session
from taskgrad.executors.base import Executor
from taskgrad.executors.futures import FuturesExecutor, dask_graph
from taskgrad.executors.table import TaskTable
from taskgrad.graph.nodes import Node

_tables: WeakKeyDictionary[Session, TaskTable] = WeakKeyDictionary()


def executor_of(session: Session) -> Executor:
    """The executor of this session. All of one session share what was submitted."""
    return FuturesExecutor(session, _table_of(session))


def graph_of(node: Node, session: Session | None) -> HighLevelGraph:
    """The Dask graph of all that is behind a node, for Dask's own compute and persist.

    Without a session it is for whichever cluster there will be.
    """
    table = TaskTable() if session is None else _table_of(session)
    return dask_graph(node, table, session)


def _table_of(session: Session) -> TaskTable:
    table = _tables.get(session)
    return _tables.setdefault(session, TaskTable()) if table is None else table
