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
    table = _tables.get(session)
    if table is None:
        table = _tables.setdefault(session, TaskTable())
    return FuturesExecutor(session, table)


def graph_of(node: Node, session: Session | None) -> HighLevelGraph:
    """The Dask graph of all that is behind a node, for whichever cluster there will be if None."""
    if session is None:
        return dask_graph(node, TaskTable(), None)
    return executor_of(session).graph(node)
