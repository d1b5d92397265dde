"""taskgrad: lazy torch models over Dask workers, differentiated where they ran."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

__version__ = version("taskgrad")

_MODULES = {
    name.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom) and node.module
    for name in node.names
}

__all__ = sorted(_MODULES)


# Names load on first use: `import dask` itself imports this package for its `dask.sizeof`
# entry point, when neither dask nor torch may be imported from here.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'taskgrad' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
