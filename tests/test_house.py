"""How the package is built, by its source: who writes to nodes, and which files the docs name.

`make lint` checks the imports.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import taskgrad.graph
from taskgrad.graph.nodes import Node

PACKAGE = Path(taskgrad.graph.__file__).parents[1]
# Variables that hold no node.
OTHERS = {"batch", "distributed.worker", "error", "history", "scheduler"}
SETTER = re.compile(r"\b(set|del)attr$|__(set|del)attr__$")


def node_classes() -> list[type[Node]]:
    """`Node` and all that inherits from it in graph/."""
    for module in pkgutil.iter_modules(taskgrad.graph.__path__, "taskgrad.graph."):
        importlib.import_module(module.name)
    found = [Node]
    for kind in found:
        found += [k for k in kind.__subclasses__() if k.__module__.startswith("taskgrad.graph.")]
    return found


def written(tree: ast.AST) -> Iterator[tuple[ast.expr, str | None]]:
    """(object, attribute) of each attribute that is set or deleted; None for a computed name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.value, node.attr
        elif isinstance(node, ast.Call) and SETTER.search(ast.unparse(node.func)):
            target, name, *_ = node.args
            yield target, name.value if isinstance(name, ast.Constant) else None


def test_no_code_outside_graph_writes_to_a_node():
    kinds = node_classes()
    bases = {kind.__name__ for kind in kinds}
    fields: set[str | None] = {None}
    for kind in kinds:
        fields.update(vars(kind).get("__slots__", ()), inspect.get_annotations(kind))
    assert fields >= {"key", "worker"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in ("graph", "kernels"):  # kernels import no nodes
            continue
        tree = ast.parse(path.read_text())
        own = set()  # `self` of other objects, and where it is made
        for part in ast.walk(tree):
            match part:
                case ast.ClassDef(bases=of) if bases.isdisjoint(map(ast.unparse, of)):
                    own |= {target for target, _ in written(part) if ast.unparse(target) == "self"}
                case ast.FunctionDef(name="__init__"):
                    own |= {target for target, _ in written(part) if ast.unparse(target) == "self"}
        found += [
            f"{path}:{target.lineno}: {ast.unparse(target)}.{name}"
            for target, name in written(tree)
            if name in fields and target not in own and ast.unparse(target) not in OTHERS
        ]
    assert not found, "\n".join(found)


def test_training_uses_no_private_attribute_of_a_chain():
    found = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted((PACKAGE / "train").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and ast.unparse(node.value).rpartition(".")[2] in ("chain", "_chain")
    ]
    assert not found, "\n".join(found)


def test_files_that_the_docs_name_exist():
    root = PACKAGE.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md")]
    named = {
        (page.name, path)
        for page in pages
        if page.name != "CHANGELOG.md"
        for path in re.findall(r"`((?:taskgrad/)?(?:\w+/)+\w+\.py)`", page.read_text("utf-8"))
    }
    assert len(named) > 40
    ours = [n for n in named if not n[1].startswith(("dask/", "distributed/"))]
    assert [n for n in ours if not ((root / n[1]).exists() or (PACKAGE / n[1]).exists())] == []
