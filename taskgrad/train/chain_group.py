"""Several chains that are trained together: named, placed, and joined on their workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from taskgrad.arguments import shown
from taskgrad.captured_layout import CapturedLayout
from taskgrad.chain import GraphChain
from taskgrad.cluster.session import Session, check_open, session
from taskgrad.display.table import MemoryRow, PlacementRow, Table
from taskgrad.errors import TaskgradError
from taskgrad.executors.between_steps import between_steps
from taskgrad.function_layout import FunctionLayout, JoinedLayout
from taskgrad.graph.deferred_init import named_tensors
from taskgrad.graph.layers import flatten_model, is_sequential, kind_of
from taskgrad.graph.leaves import Leaf
from taskgrad.layout import Layout
from taskgrad.memory_table import memory_table
from taskgrad.recording import Recording, record
from taskgrad.tracing import random_state_kept
from taskgrad.train.chain_names import named_in
from taskgrad.worker import shard_ops


class ChainGroup:
    """Chains that one `Optimizer` or `Trainer` trains; ``Trainer.chain`` of a function is one.

    Attributes
    ----------
    chains : dict of str to GraphChain
        By name. A module that the function gives to `spawn` has become one.
    placement : Table
        The worker of each layer, by the names that layers and parameters have in the group:
        ``"down.0"``.
    """

    def __init__(self, layout: JoinedLayout, chains: Mapping[str, GraphChain]) -> None:
        self.layout = layout
        """For taskgrad itself."""
        self.chains = dict(chains)
        rows = [
            replace(row, layer=".".join(filter(None, (name, row.layer))), activations=None)
            for name, chain in chains.items()
            for row in chain.placement
        ]
        total = max(1, sum(row.bytes for row in rows))
        rows = [replace(row, share=row.bytes / total) for row in rows]
        self.placement = Table(PlacementRow, rows, "share: of bytes")
        layout.join()

    def memory(self) -> Table[MemoryRow]:
        """Bytes that the chains hold on each worker now, as `GraphChain.memory` of all of them."""
        layouts = (self.layout, *self.layout.parts.values())  # tapes of steps are the layout's
        return memory_table(self.layout, (shard for one in layouts for shard in one.shards))

    def state_dict(self) -> dict[str, Any]:
        """Parameters and persistent buffers of all chains, as copies on the driver."""
        return {
            f"{name}.{key}": value
            for name, chain in self.chains.items()
            for key, value in chain.state_dict().items()
        }

    def zero_grad(self) -> None:
        """Drop the gradients of all chains on the workers."""
        with between_steps((), self.layout.refs):
            self.layout.run(self.layout.tasks(shard_ops.zero_grad))

    def __repr__(self) -> str:
        return f"ChainGroup({self.layout.title}: {', '.join(self.chains)})"


def group_of(chains: Any) -> ChainGroup:
    """The group of these chains: a list, or a mapping of names to chains.

    Raises TypeError if one of them is no chain; ValueError if there is none, or one twice;
    TaskgradError if they are of different clients.
    """
    if not isinstance(chains, Mapping):
        chains = {str(i): chain for i, chain in enumerate(chains)}
    if not chains:
        raise ValueError("there are no chains to optimize")
    _check(chains, GraphChain)
    layouts = {name: chain.layout for name, chain in chains.items()}
    return ChainGroup(JoinedLayout("+".join(chains), layouts, _session_of(layouts)), chains)


def to_train(given: Any, chains: Any = None) -> GraphChain | ChainGroup:
    """What a `Trainer` of this trains: a chain, or the group of the chains that a function calls.

    Raises TypeError if it is neither, and what `group_of_function` does.
    """
    if isinstance(given, GraphChain | ChainGroup):
        if chains is not None:
            raise TypeError("chains= names the chains of a function; a GraphChain is one by itself")
        return given
    model = isinstance(given, nn.Module) and chains is None
    if model and any(isinstance(chain, GraphChain) for _, chain in named_in(given).values()):
        model = False
    if model or isinstance(given, type) or not callable(given):
        raise TypeError(
            f"a Trainer trains a GraphChain; got {type(given).__name__}. To train several together "
            "give it a Python function that calls them"
        )
    return group_of_function(given, chains)


def group_of_function(function: Callable[..., Any], chains: Any) -> ChainGroup:
    """The group of the chains and modules that a function calls.

    The function is called once, with a thunk that has no value. `chains` are names for chains and
    modules, None to take those by which the function knows them.

    Raises what the function does; TypeError if it cannot be recorded, or calls nothing that can be
    trained; ValueError if it calls what has no name, or does not call what was given, or if modules
    share parameters; TaskgradError if chains are of different clients.
    """
    title = kind_of(function).strip("<>")
    if chains is None:
        known = named_in(function)
    elif isinstance(chains, Mapping):
        _check(chains, GraphChain | nn.Module)
        known = {_id_of(chain): (name, chain) for name, chain in chains.items()}
    else:
        raise TypeError(f"chains= has chains by name, {{'down': down}}; got {shown(chains)}")

    def part_of(module: nn.Module) -> nn.Module | None:
        return module if named_tensors(module) else None

    with random_state_kept():
        found = record(function, Leaf(None, needs_grad=False), title, part_of)
    called = {id(call.target): call.target for call in found.calls if call.target is not None}
    if not called:
        raise TypeError(
            f"a Trainer trains a GraphChain, or a function that calls some; {title} calls none, "
            "and gives no module with parameters to tg.spawn"
        )
    for key, target in called.items():
        if isinstance(target, CapturedLayout):
            raise TypeError(
                f"{title} calls a chain of {target.title}, whose own forward says what runs: train "
                "it alone, or give the function a chain of an nn.Sequential, or with "
                'keep_together="" in one layer'
            )
        if key not in known:
            what = f"chain ({target.title})" if isinstance(target, Layout) else kind_of(target)
            raise ValueError(
                f"{title} calls a {what} that has no name here: make it a variable that the "
                "function uses, an attribute of its object, or one of chains={'name': ...}"
            )
    used = found.used()
    for i, call in enumerate(found.calls):
        if call.target is not None and i not in used:
            raise ValueError(
                f"{title} calls {known[id(call.target)][0]!r} and does not use what it gives: "
                "leave the call out, or return its value with the others"
            )
    if chains is not None:
        unused = [name for key, (name, _) in known.items() if key not in called]
        if unused:
            raise ValueError(f"{title} does not call {unused[0]!r}, which is one of chains=")
    named = dict(known[key] for key in (called if chains is None else known))
    modules = {name: module for name, module in named.items() if isinstance(module, nn.Module)}
    _check_apart(modules)
    layouts = {name: c.layout for name, c in named.items() if isinstance(c, GraphChain)}
    owner = _session_of(layouts)
    kept = {id(module): chain for module in modules.values() if (chain := _kept(module, owner))}
    workers = _workers(found, kept, owner)
    at = {id(call.target): w for call, w in reversed([*zip(found.calls, workers, strict=True)])}
    devices = {w: device for layout in layouts.values() for w, device in layout.devices.items()}
    group = {
        name: chain
        if isinstance(chain, GraphChain)
        else kept.get(id(chain)) or _made(chain, at[id(chain)], devices, owner)
        for name, chain in named.items()
    }
    layout = FunctionLayout(
        function,
        title,
        {name: chain.layout for name, chain in group.items()},
        modules,
        found,
        workers,
        owner,
    )
    return ChainGroup(layout, group)


def _id_of(chain: GraphChain | nn.Module) -> int:
    return id(chain.layout if isinstance(chain, GraphChain) else chain)


def _check(chains: Mapping[Any, Any], kind: Any) -> None:
    """Raise TypeError unless these are of a kind, by name; ValueError if one is there twice."""
    seen: dict[int, str] = {}
    for name, chain in chains.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"chains have names, texts; got {shown(name)}")
        if not isinstance(chain, kind):
            raise TypeError(
                f"chain {name!r} of several that are trained together is a {type(chain).__name__}, "
                "and no GraphChain"
            )
        first = seen.setdefault(_id_of(chain), name)
        if first != name:
            raise ValueError(f"chain {name!r} is the same one as {first!r}: give each chain once")
    for name in chains:
        outer = next((other for other in chains if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"the names {outer!r} and {name!r} of two chains cannot be told from names of "
                "layers: take other ones"
            )


def _session_of(layouts: Mapping[str, Layout]) -> Session:
    """The session of these chains, or that of the current client; TaskgradError if it is closed."""
    sessions = {name: layout.session for name, layout in layouts.items()}
    first = next(iter(sessions), None)
    if first is None:
        return session()
    for name, other in sessions.items():
        check_open(other.client)
        if other.client is not sessions[first].client:
            raise TaskgradError(
                f"chain {name!r} is of another client than chain {first!r}: chains that are "
                "trained together are on the workers of one cluster"
            )
    return sessions[first]


def _check_apart(modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if two of these modules share a parameter or buffer."""
    homes: dict[int, tuple[str, str]] = {}
    for name, module in modules.items():
        for inner, tensor in named_tensors(module).items():
            first, other = homes.setdefault(id(tensor), (name, inner))
            if first != name:
                raise ValueError(
                    f"the modules {first!r} and {name!r} share a tensor ({first}.{other} is "
                    f"{name}.{inner}), and each would have its own on its worker: call them as one "
                    "module, or make them one tg.GraphChain"
                )


def _workers(found: Recording, kept: Mapping[int, GraphChain], owner: Session) -> list[str]:
    """The worker of each call: what it asked for, else that of its first argument that has one.

    If there is none, that of the first call that takes its value. Of a chain it is the first one;
    `kept` are those of modules, by their ids.
    """
    placed: list[str | None] = []
    ends: list[str | None] = []  # where the value is
    for call, sources in zip(found.calls, found.sources, strict=False):
        known = kept.get(id(call.target))
        layout = call.target if known is None else known.layout
        if isinstance(layout, Layout):
            placed.append(layout.first.worker)
            ends.append(layout.last.worker)
            continue
        given = (ends[i] for i in sources if i is not None and i >= 0)
        asked = None if call.worker is None else owner.resolve(call.worker)
        placed.append(asked or next(filter(None, given), None))
        ends.append(placed[-1])
    for i in reversed(range(len(found.calls))):
        takers = (w for w, s in zip(placed[i:], found.sources[i:-1], strict=True) if w and i in s)
        placed[i] = placed[i] or next(takers, None)
    others = owner.workers()[0].address
    return [worker or others for worker in placed]


_chains: WeakKeyDictionary[nn.Module, GraphChain] = WeakKeyDictionary()
"""The chains that were made of modules, for as long as these exist."""


def _kept(module: nn.Module, owner: Session) -> GraphChain | None:
    """The chain that was made of a module for an earlier trainer, if it is still there.

    So a trainer goes on with what another one has trained, as it does with other chains.
    """
    chain = _chains.get(module)
    if chain is None or chain.layout.session is not owner:
        return None
    there = {worker.address for worker in owner.workers()}
    return chain if there.issuperset(chain.layout.devices) else None


def _made(module: nn.Module, worker: str, devices: Mapping[str, str], owner: Session) -> GraphChain:
    """A chain of a module, all on one worker, on the device that other chains have there."""
    placement = [worker] * len(flatten_model(module).layers)
    _chains[module] = made = GraphChain(
        module,
        client=owner.client,
        placement=placement,
        device=devices.get(worker),
        keep_together=None if is_sequential(module) else "",
    )
    return made
