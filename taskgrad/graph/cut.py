"""Cut a model that is no Sequential into layers: which of its submodules are placed as one unit.

The items of ModuleLists and Sequentials are layers, and so are the other submodules of the modules
that have such lists. A layer that outweighs a worker's share is cut further. What a module between
has of its own, such as a class token, is a layer too: `OwnTensors`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taskgrad.arguments import shown
from taskgrad.graph import pack
from taskgrad.graph.layers import CALL_HOOKS, STATE_HOOKS, STATE_METHODS, OwnTensors, hooked
from taskgrad.graph.parallel import Parallel

Cut = int | str | Sequence[str] | None
"""How a model is cut; see `GraphChain`."""

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Torch's own modules of modules. Others of torch's, such as attention, use their parts' weights.
_TORCHS = (
    *(*_LISTS, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


@dataclass(frozen=True)
class Pieces:
    """A model in pieces, by name.

    Attributes
    ----------
    layers
        The modules that are layers, in the order in which the model has them.
    opened
        The modules that are cut, the model itself first.
    """

    layers: dict[str, nn.Module]
    opened: dict[str, nn.Module]

    @property
    def parts(self) -> list[tuple[str, nn.Module]]:
        """The layers by name; what an opened module has itself comes before what is in it."""
        left = {
            name: OwnTensors(module)
            for name, module in self.opened.items()
            if any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
        }
        found: list[tuple[str, nn.Module]] = []
        for name, module in self.layers.items():
            outer = [n for n in left if not n or name.startswith(f"{n}.")]
            found += [(n, left.pop(n)) for n in outer]
            found.append((name, module))
        return [*found, *left.items()]


def pieces(
    model: nn.Module,
    cut: Cut,
    keep_together: Any,
    workers: int,
    further: Container[str] = frozenset(),
) -> Pieces:
    """Cut a model into layers.

    Parameters
    ----------
    cut
        None: the items of lists and the modules beside them, further where one has more than
        ``1 / workers`` of all bytes. A number: all modules at that depth. Names or patterns: these
        modules are layers, and so is all that is beside one of them or of a module above one.
    keep_together
        Names or patterns of modules that are not cut.
    further
        Names of modules that are cut in any case, if they can be.

    Raises ValueError if a name or pattern matches no module, TypeError if it is no text.
    """
    names = {name: module for name, module in model.named_modules() if name}
    kept = matching(keep_together, {"": model, **names}, "keep_together")
    if cut is None or isinstance(cut, int):
        if isinstance(cut, bool) or (cut is not None and cut < 1):
            raise ValueError(f"cut is a depth from 1 on, names or patterns; got {shown(cut)}")
        rule = _by_share(model, workers) if cut is None else (lambda name, _: _depth(name) < cut)
    else:
        wanted = matching(cut, names, "cut")
        above = {name.rpartition(".")[0] for name in wanted}
        above |= {outer for name in above for outer in _outer(name)}
        wrong = next((name for name in wanted if name in above), None)
        if wrong is not None:
            inside = next(name for name in wanted if name.startswith(f"{wrong}."))
            raise ValueError(f"cut= names {wrong!r} and {inside!r}, which is a part of it")
        rule = lambda name, _: name in above  # noqa: E731
    layers: dict[str, nn.Module] = {}
    opened: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        prefix = f"{name}." if name else ""
        is_list = isinstance(module, _LISTS) or type(module) is Parallel
        opens = not name or is_list or name in further or rule(name, module)
        if name in kept or not may_open(module) or not opens:
            layers[name] = module
            return
        opened[name] = module
        for child_name, child in module.named_children():
            walk(prefix + child_name, child)

    walk("", model)
    return Pieces(layers, opened)


def matching(given: Any, names: Mapping[str, Any], what: str) -> set[str]:
    """The names that are given, or match a pattern, but no parts of other matches; see `pieces`."""
    if given is None:
        return set()
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{what}= has names or patterns of modules; got {shown(given)}")
    found: set[str] = set()
    for pattern in patterns:
        matches = set(fnmatch.filter(names, pattern))
        if not matches:
            some = ", ".join([name for name in names if name][:8])
            raise ValueError(
                f"{what}={shown(pattern)} matches no module of the model; its modules are {some}"
                + (", ..." if len(names) > 8 else "")
            )
        found |= {name for name in matches if matches.isdisjoint(_outer(name))}
    return found


def may_open(module: nn.Module) -> bool:
    """True if a module can be replaced by its forward and its parts.

    It cannot if it has no parts, has hooks or is torch's own; nor if it has methods of its own for
    its state, or for its mode unless these put all parts in one.
    """
    if next(module.children(), None) is None or isinstance(module, torch.jit.ScriptModule):
        return False
    kind = type(module)
    if isinstance(module, _LISTS) or kind is Parallel:
        pass
    elif kind.__module__.split(".")[0] == "torch" and kind not in _TORCHS:
        return False
    hooks = [n for n in STATE_HOOKS if n != _LOADING or not _takes_old_names(module)]
    if hooked(module, (*CALL_HOOKS, *hooks)) or pack.parametrized_names(module):
        return False
    methods = [name for name in STATE_METHODS if name != "train"]
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in methods):
        return False
    if any(name in vars(module) for name in (*STATE_METHODS, "forward", "__call__")):
        return False
    return kind.train is nn.Module.train or _one_mode(module)


_LOADING = "_load_state_dict_pre_hooks"


def _takes_old_names(module: nn.Module) -> bool:
    """True if its hooks on loading are those of transformers, for names of older checkpoints."""
    hooks = [getattr(hook, "hook", hook) for hook in getattr(module, _LOADING).values()]
    return all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def _one_mode(module: nn.Module) -> bool:
    """True if a ``train`` of its own puts all parts of a module in the mode it is given."""
    modes = {m: m.training for m in module.modules()}
    try:
        for mode in (True, False):
            module.train(mode)
            if any(m.training is not mode for m in modes):
                return False
        return True
    except Exception:
        return False
    finally:
        for part, mode in modes.items():
            part.training = mode


def _by_share(model: nn.Module, workers: int) -> Callable[[str, nn.Module], bool]:
    total = _nbytes(model)
    items = {id(m): False for m in model.modules()}
    for module in model.modules():
        if isinstance(module, _LISTS):
            items |= {id(child): True for child in module.children()}

    def rule(name: str, module: nn.Module) -> bool:
        has_list = any(isinstance(m, nn.Sequential | nn.ModuleList) for m in _parts(module))
        if has_list and not items[id(module)]:
            return True
        return _nbytes(module) * workers > total

    return rule


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    yield from (m for m in module.modules() if m is not module)


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _depth(name: str) -> int:
    return name.count(".") + 1


def _outer(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
