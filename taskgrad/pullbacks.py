"""vjp: a pullback of lazy calls, in the form of ``torch.func.vjp`` and ``jax.vjp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from taskgrad.arguments import flag, shown
from taskgrad.errors import CotangentError
from taskgrad.graph.adjoint import Adjoint, adjoint, calls_behind
from taskgrad.graph.calls import Call
from taskgrad.graph.layers import kind_of
from taskgrad.graph.leaves import Leaf, Primal
from taskgrad.graph.nodes import Node, new_key, sum_of
from taskgrad.graph.pytree import Structure, carries_gradient, flatten
from taskgrad.graph.shards import Shard, ShardCall
from taskgrad.thunk import Thunk, cotangent_node, spawn
from taskgrad.worker import shard_ops


class _PrimalTree(NamedTuple):
    leaves: list[Leaf | Primal | None]
    structure: Structure


def vjp(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """Call `f` lazily and return its output and its pullback.

    Parameters
    ----------
    f
        A `GraphChain`, an ``nn.Module``, or a Python function that spawns: it is called at once,
        with thunks in place of tensors, and returns thunks.
    *primals
        What to differentiate by: pytrees of tensors and thunks. Whether a tensor has
        ``requires_grad`` makes no difference; integers and other values get None.

    Returns
    -------
    y
        What `f` returned: a thunk or a pytree of them. Nothing has run.
    back
        ``grads, *input_grads = back(cotangent, retain_graph=False)``. `cotangent` has the structure
        of `y`'s value, None where there is none. ``grads`` has a thunk for each trainable parameter
        by its name in the chain or module (with several of these behind `y`, after the name of
        each: ``"Sequential.0.weight"``, ``"Sequential_1.0.weight"``); ``input_grads`` one pytree of
        thunks for each primal, with None in place of a value that no cotangent reaches.

    Raises
    ------
    CotangentError
        The cotangent does not match the output (by `back` where the output was collected before,
        else when the gradients are).
    TapeError
        `back` is called twice without ``retain_graph=True``.

    Notes
    -----
    As DaggerFlux's pullbacks: each backward task runs where its forward left its tape.

    Examples
    --------
    >>> import torch, taskgrad as tg
    >>> client = tg.local_cluster(n_workers=2)
    >>> chain = tg.GraphChain(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
    >>> y, back = tg.vjp(chain, torch.zeros(3, 3))
    >>> grads, gx = back(torch.ones(3, 3))
    >>> grads
    {}
    >>> tg.collect(gx).sum()
    tensor(9.)
    >>> client.close()
    """
    if not callable(f) or isinstance(f, Thunk | type):
        raise TypeError(
            f"vjp takes a GraphChain, an nn.Module, or a function that spawns; got {shown(f)}"
        )
    trees: list[_PrimalTree] = []
    arguments = []
    for primal in primals:
        leaves, structure = flatten(primal)
        nodes = [_primal(leaf) for leaf in leaves]
        trees.append(_PrimalTree(nodes, structure))
        arguments.append(
            structure.build(
                [
                    leaf if node is None else Thunk(node, getattr(leaf, "_session", None))
                    for leaf, node in zip(leaves, nodes, strict=True)
                ]
            )
        )
    with torch.enable_grad():
        if isinstance(f, torch.nn.Module):
            _refuse_hooks(f)
            y = spawn(f, *arguments)
        else:
            y = f(*arguments)
    outputs, output_structure = flatten(y)
    for output in outputs:
        if not isinstance(output, Thunk):
            raise TypeError(
                f"f must return thunks (what tg.spawn or a chain gives); it returned "
                f"{type(output).__name__}. Give vjp the chain or module itself, or spawn inside f"
            )

    def back(cotangent: Any, *, retain_graph: bool = False) -> tuple[Any, ...]:
        retain_graph = flag("retain_graph", retain_graph)
        parts = _split(cotangent, output_structure, len(outputs))
        seeds: list[tuple[Node, Node | None]] = []
        for output, part in zip(outputs, parts, strict=True):
            if part is None:
                continue
            seed = cotangent_node(output._node, part)
            if output._node.needs_grad:
                seeds.append((output._node, seed))
        found = adjoint(seeds, retain=retain_graph)
        owner = next((o._session for o in outputs if o._session is not None), None)

        def thunk(node: Node | None) -> Thunk | None:
            return None if node is None else Thunk(node, owner)

        reachable = calls_behind([o._node for o in outputs])
        grads = {name: thunk(node) for name, node in _parameter_grads(found, reachable).items()}
        inputs = [
            tree.structure.build(
                [None if leaf is None else thunk(found.leaf_grad(leaf)) for leaf in tree.leaves]
            )
            for tree in trees
        ]
        return grads, *inputs

    return y, back


def _refuse_hooks(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter._backward_hooks:
            raise TypeError(
                f"vjp of {kind_of(module)!r}: its parameter {name!r} has hooks on its gradient, "
                "which run in a backward on the driver. Use thunk.backward(), or put the module in "
                "a GraphChain, where they run on its worker"
            )


def _primal(leaf: Any) -> Leaf | Primal | None:
    if isinstance(leaf, Thunk):
        return Primal(leaf._node)
    if carries_gradient(leaf):
        return Leaf(leaf, needs_grad=True, kept=True)
    return None


def _split(cotangent: Any, structure: Structure, n: int) -> list[Any]:
    """One cotangent for each output thunk; each may be a pytree of its own."""
    if cotangent is None:
        return [None] * n
    try:
        return structure.flatten_up_to(cotangent)
    except ValueError as error:
        raise CotangentError(
            f"the cotangent has another structure than f's output, a pytree of {n} thunks: {error}"
        ) from error


def _parameter_grads(found: Adjoint, reachable: list[Call]) -> dict[str, Node | None]:
    """Gradients of all trainable parameters behind the outputs, by name.

    Owners are chains and the modules given to `spawn`, in the order in which they were first used.
    A parameter that no cotangent reaches still has its name, with None.
    """
    parts_of: dict[int, list[Node]] = {}  # of each parameter on the driver: one leaf for each call
    for leaf, parts in found.leaves.items():
        if isinstance(leaf, Leaf) and leaf.owner is not None:
            parts_of.setdefault(id(leaf.value), []).extend(parts)
    owners: dict[int, tuple[str, dict[str, Node | None]]] = {}
    for call in reversed(reachable):
        if call.shard is not None:
            chain = call.shard.chain
            _, grads = owners.setdefault(id(chain), (chain.title, {}))
            for name in call.parameters:
                home = call.shard.home(name)
                if name not in grads:
                    parts = found.parameters.get((home, name), ())
                    grads[name] = _parameter_grad(parts, name, home)
        for given in call.inputs:
            if isinstance(given, Leaf) and given.owner is not None and given.needs_grad:
                _, grads = owners.setdefault(id(given.owner), (kind_of(given.owner), {}))
                if given.name not in grads:
                    grads[given.name] = sum_of(parts_of.get(id(given.value), ()), given.name)
    if len(owners) == 1:
        return next(iter(owners.values()))[1]
    seen: dict[str, int] = {}
    named: dict[str, Node | None] = {}
    for title, grads in owners.values():
        count = seen.get(title, 0)
        seen[title] = count + 1
        prefix = f"{title}_{count}" if count else title
        named |= {f"{prefix}.{name}": node for name, node in grads.items()}
    return named


def _parameter_grad(parts: Sequence[Node], name: str, home: Shard) -> Node | None:
    """One node for a parameter's gradient, after its hooks, where it lives."""
    if parts and name in home.hooked:
        return ShardCall(
            home, shard_ops.hooked, {"name": name}, key=new_key("grad", name), after=parts
        )
    return sum_of(parts, name, home.worker)
