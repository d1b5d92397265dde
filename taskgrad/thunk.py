"""Lazy values over Dask, as DaggerFlux.jl's thunks: `spawn` makes them, `collect` runs them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from dask.base import is_dask_collection
from dask.delayed import Delayed, delayed, single_key
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from torch import nn

from taskgrad import autograd
from taskgrad.arguments import flag
from taskgrad.cluster.session import Session, WorkerSpec, check_open, current_session, session
from taskgrad.display.graph import call_graph, html, nested
from taskgrad.errors import TaskgradError
from taskgrad.executors.backward import run_backward
from taskgrad.executors.registry import executor_of, graph_of
from taskgrad.graph import pack
from taskgrad.graph.adjoint import adjoint
from taskgrad.graph.calls import Call
from taskgrad.graph.cotangents import check_cotangent, remember
from taskgrad.graph.functions import pack_function, template_of
from taskgrad.graph.layers import kind_of
from taskgrad.graph.leaves import External, Leaf, resolve
from taskgrad.graph.nodes import Node, new_key
from taskgrad.graph.pytree import Slot, flatten, plain
from taskgrad.graph.refusals import refuse_hidden, refuse_writing
from taskgrad.tracing import current_tracer, refuse_reading

_LOSS_WORDS = ("loss", "entropy", "kl_div")  # in the names of functions that are losses


class Lazy:
    """Base of callables whose calls are thunks already."""

    def __call__(self, *args: Any, **kwargs: Any) -> Thunk:
        raise NotImplementedError


def _single_value(results: Any) -> Any:
    return plain(single_key(results))


class Thunk(Delayed):
    """A lazy, differentiable value: one call that has not run, or its result.

    Made by `spawn` or by calling a `GraphChain`. It is a Dask collection (``dask.compute``,
    ``dask.persist``, ``dask.visualize``, ``dask.delayed(f)(thunk)``); `collect` does what
    ``dask.compute`` does and also connects the value to autograd. Operators and torch functions of
    a thunk are thunks: ``thunk + 1``, ``thunk[0]``, ``torch.relu(thunk)``.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> y = tg.spawn(torch.add, torch.ones(2), torch.ones(2)) * 3
    >>> tg.collect(y)
    tensor([6., 6.])
    """

    __slots__ = ("_node", "_session")

    # The current cluster, or one of our own if there is none.
    __dask_scheduler__ = staticmethod(lambda *args, **kwargs: session().client.get(*args, **kwargs))
    __dask_optimize__ = None

    def __init__(self, node: Node, session: Session | None = None) -> None:
        # Not Delayed's: our graph is made when it is asked for.
        self._node = node
        self._session = session
        self._key = resolve(node).key
        self._length = None
        self._layer = node.key

    @property
    def dask(self) -> HighLevelGraph:
        """The graph behind this thunk, for Dask; every task annotated with its worker."""
        return graph_of(self._node, self._session or current_session())

    def __dask_graph__(self) -> HighLevelGraph:
        if self._session is not None:  # else Dask runs it on whichever cluster there is
            check_open(self._session.client)
        return self.dask

    def __dask_postcompute__(self) -> Any:
        return _single_value, ()

    def __dask_postpersist__(self) -> Any:
        return _persisted, (self.key, self._session)

    def persist(self, **kwargs: Any) -> Thunk:
        """Start running on the cluster; returns this thunk, whose value then stays there."""
        refuse_reading()
        executor = executor_of(self._session or session())
        executor.run([self._node], wait=False, tapes=torch.is_grad_enabled())
        return self

    def backward(self, cotangent: Any = None, *, retain_graph: bool = False) -> None:
        """Run the backward; add to the gradients of parameters where they live.

        Gradients of the driver's own tensors (inputs with ``requires_grad``, parameters of a module
        given to `spawn`) are added to their ``.grad`` on the driver. Returns when all is done.

        Parameters
        ----------
        cotangent
            Of the structure, shapes and dtypes of this thunk's value, or a thunk of one; None
            means 1 for a scalar.
        retain_graph
            Keep the tapes for another backward.

        Raises
        ------
        CotangentError
            The cotangent does not match the value.
        TapeError
            The thunk needs no gradient, was made under ``torch.no_grad()``, or its tapes are used.
        """
        refuse_reading()
        retain_graph = flag("retain_graph", retain_graph)
        seed = cotangent_node(self._node, cotangent)
        found = adjoint([(self._node, seed)], retain=retain_graph)
        grads = run_backward(found, executor_of(self._session or session()), accumulate=True)
        pairs = [(leaf.value, g) for leaf, g in grads.items() if leaf.value.requires_grad]
        pairs = [(value, g) for value, g in pairs if g is not None]
        if pairs:
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(list(tensors), list(gradients), retain_graph=retain_graph)

    def item(self) -> Any:
        """The number in a value of one element; runs what it needs, once, like `collect`."""
        return collect(self).item()

    @property
    def requires_grad(self) -> bool:
        """True if a backward can start here."""
        return self._node.needs_grad

    def __repr__(self) -> str:
        return nested(self._node)

    def _repr_html_(self) -> str:
        owner = self._session or current_session()
        placed = None if owner is None else executor_of(owner).worker_of
        names = {} if owner is None else owner.names
        return html(repr(self), call_graph([self._node], placed), names)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Thunk cannot be pickled: it belongs to this driver. Pass it to tg.spawn or "
            "dask.delayed as an argument, or collect it first"
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a Thunk has no attribute {name!r}: its value is not here yet. Use a function of it "
            f"(torch.sum(thunk), tg.spawn(getattr, thunk, {name!r})), or tg.collect(thunk) first"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a Thunk is a value and cannot be called; use tg.spawn(fn, thunk)")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            "a Thunk has no length before it has run: take parts with thunk[0], thunk[1], ..."
        )

    def __len__(self) -> int:
        raise TypeError("a Thunk has no length before it has run; collect it first")

    def _not_yet(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "a Thunk has no value before it has run: use tg.collect(thunk), or thunk.item() for a "
            "number"
        )

    __bool__ = __float__ = __int__ = __complex__ = __index__ = __round__ = _not_yet
    __trunc__ = __ceil__ = __floor__ = __array__ = _not_yet
    __array_ufunc__ = None  # array + thunk is a thunk, and not an array of one for each element

    def __format__(self, spec: str) -> str:
        return self._not_yet() if spec else str(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a Thunk cannot be written to: spawn a function that returns the new value")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ATTRIBUTES:
            raise TypeError(
                f"a Thunk cannot be written to: it has no attribute {name!r} of its own"
            )
        object.__setattr__(self, name, value)

    @classmethod
    def _get_binary_operator(cls, op: Callable[..., Any], inv: bool = False) -> Callable[..., Any]:
        if inv:
            return lambda self, other: spawn(op, other, self)
        return lambda *args: spawn(op, *args)

    _get_unary_operator = _get_binary_operator

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        refuse_writing(func, args, kwargs)
        return spawn(func, *args, **kwargs)


_ATTRIBUTES = {*Delayed.__slots__, *Thunk.__slots__}

for _op in (
    *(operator.abs, operator.neg, operator.pos, operator.invert, operator.add, operator.sub),
    *(operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow),
    *(operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift),
    *(operator.eq, operator.ge, operator.gt, operator.ne, operator.le, operator.lt),
    *(operator.getitem, operator.matmul),
):
    Thunk._bind_operator(_op)
Thunk.__hash__ = Delayed.__hash__  # type: ignore[method-assign]


def _persisted(futures: Any, key: str, owner: Session | None, **kwargs: Any) -> Thunk:
    """A thunk of a result that Dask's own persist holds; gradients stop at it."""
    graph = HighLevelGraph({key: MaterializedLayer(dict(futures))}, {key: set()})
    return Thunk(External(Delayed(key, graph)), owner)


def spawn(
    fn: Callable[..., Any], *args: Any, worker: WorkerSpec | None = None, **kwargs: Any
) -> Thunk:
    """Make a lazy, differentiable call of any torch function or ``nn.Module``.

    Nothing runs and nothing is sent until the thunk is collected.

    Parameters
    ----------
    fn
        A function or module. It runs on a worker as a function of its tensors: parameters and
        tensors that it closes over are inputs of the call, and receive gradients on the driver. For
        a module whose parameters shall live on the worker use `GraphChain`.
    *args, **kwargs
        Pytrees of tensors, thunks, Dask collections and plain values.
    worker
        Index, name or address. By default the worker of the first argument that has one, else each
        worker in turn.

    Raises
    ------
    TypeError
        `fn` is not callable, or cannot be pickled.
    PlacementError
        There is no such worker.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> y = tg.spawn(torch.nn.functional.relu, torch.tensor([-1.0, 2.0]))
    >>> y
    Thunk[1](relu, (float32[2],))
    """
    if isinstance(fn, Lazy):
        if worker is not None:
            raise TypeError("a GraphChain has a placement of its own; worker= is for functions")
        return fn(*args, **kwargs)
    if not callable(fn) or isinstance(fn, Thunk):
        raise TypeError(f"spawn takes a function or an nn.Module; got {type(fn).__name__}")
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        raise TypeError(
            f"spawn takes a module, and {fn.__name__} is a class: give an instance of it"
        )
    tracer = current_tracer()
    if tracer is not None:
        recorded: Thunk = tracer.spawn(fn, args, kwargs, worker)
        return recorded
    title = kind_of(fn).strip("<>")
    packed = pack_function(fn, title)
    inputs = Inputs()
    tensor_slots = tuple([inputs.slot(t, name, m) for t, name, m, _ in packed.closed_over])
    buffers = tuple([inputs.slot(found.tensor) for found in packed.closed_over if found.is_buffer])
    template = inputs.template((args, kwargs), title)
    owner = inputs.session or (None if worker is None else session())
    address = None if owner is None or worker is None else owner.resolve(worker)
    is_loss = isinstance(fn, nn.modules.loss._Loss) or any(w in title.lower() for w in _LOSS_WORDS)
    call = Call(
        title=title,
        steps=((0, title, kind_of(fn)),),
        inputs=inputs.nodes,
        template=template,
        function=packed.data,
        tensor_slots=tensor_slots,
        buffers=buffers,
        worker=address,
        key=new_key("loss" if is_loss else "forward", title),
    )
    return Thunk(call, owner)


class Inputs:
    """The inputs of one call: every tensor, thunk and collection among its arguments, once."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.session: Session | None = None
        self._slots: dict[int, int] = {}

    def slot(self, value: Any, name: str = "", owner: Any = None) -> int:
        """The slot of a thunk, node, collection or tensor (a parameter with name and module)."""
        known = value._node if isinstance(value, Thunk) else value
        if id(known) not in self._slots:
            self._slots[id(known)] = len(self.nodes)
            self.nodes.append(self._node_of(value, name, owner))
        return self._slots[id(known)]

    def _node_of(self, value: Any, name: str, owner: Any) -> Node:
        if isinstance(value, Thunk):
            theirs = value._session
            if self.session and theirs and theirs.client is not self.session.client:
                raise TaskgradError("thunks of two clients meet in one call; use one client")
            self.session = self.session or theirs
            return value._node
        if isinstance(value, Node):
            return value
        if isinstance(value, torch.Tensor):
            return Leaf(value, name=name, owner=owner, kept=owner is None)
        return External(value if isinstance(value, Delayed) else delayed(value))

    def template(self, arguments: Any, title: str) -> bytes:
        """The arguments, pickled, with a slot for each input."""
        leaves, structure = flatten(arguments)
        given = [
            Slot(self.slot(x))
            if isinstance(x, torch.Tensor | Thunk | Node) or is_dask_collection(x)
            else x
            for x in leaves
        ]
        return pack.pickle_or_explain(
            lambda: template_of(given, structure), f"an argument of {title!r}"
        )


def cotangent_node(node: Node, cotangent: Any) -> Node | None:
    """A cotangent as the user gave it, checked as far as can be, as a node; None means ones."""
    if cotangent is None:
        return None
    if isinstance(cotangent, Thunk):
        return cotangent._node
    if any(map(_is_thunk, flatten(cotangent, _is_thunk)[0])):
        return spawn(_same, cotangent, worker=node.worker)._node
    return Leaf(cotangent, needs_grad=False, kept=True, checked=check_cotangent(node, cotangent))


def _same(value: Any) -> Any:
    return value


def _is_thunk(leaf: Any) -> bool:
    return isinstance(leaf, Thunk)


def collect(tree: Any) -> Any:
    """Run what the thunks in a pytree need, once, and return the pytree of their values.

    In grad mode, tensors that depend on something with ``requires_grad`` come back as part of the
    driver's autograd graph: their ``.backward()`` runs the backward on the workers. Under
    ``torch.no_grad()`` or ``torch.inference_mode()`` no tape is kept anywhere. A thunk that has run
    does not run again.

    Raises
    ------
    LayerError
        A layer raised: names it, its worker and what it was given.
    WorkerLostError
        A worker went away with layers or tapes.
    TaskgradError
        The client is closed or asynchronous.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> y = tg.spawn(torch.add, torch.ones(2), 1)
    >>> tg.collect({"y": y, "n": 3})
    {'y': tensor([2., 2.]), 'n': 3}
    """
    leaves, structure = flatten(tree, lambda leaf: False)  # objects stay themselves
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Thunk)]
    refuse_hidden(tree, leaves, Thunk)
    if not at:
        return tree
    refuse_reading()
    thunks: list[Thunk] = [leaves[i] for i in at]
    owners = {t._session.client: t._session for t in thunks if t._session is not None}
    if len(owners) > 1:
        raise TaskgradError("thunks of two clients cannot be collected in one call")
    nodes = [t._node for t in thunks]
    executor = executor_of(next(iter(owners.values()), None) or session())
    executor.run(nodes, tapes=torch.is_grad_enabled())
    values = executor.values(nodes)
    for node, value in zip(nodes, values, strict=True):
        remember(node, value)
    if torch.is_grad_enabled():
        values = autograd.attach(nodes, values, executor)
    for i, value in zip(at, values, strict=True):
        leaves[i] = value
    return structure.build(leaves)
