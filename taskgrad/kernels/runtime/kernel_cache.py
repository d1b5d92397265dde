"""Kernels from their sources: compiled once a machine, kept on disk, loaded by every other process.

A source is written to a file of its own, whose name is a hash of it, of taskgrad's part in it and
of the versions of Numba and Python; Numba keeps the machine code beside it. A lock on a file makes
processes that want the same kernel at the same time wait for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from taskgrad.kernels import codegen
from taskgrad.kernels.codegen.numba_typing import require_numba
from taskgrad.kernels.codegen.work_stealing import FAILED
from taskgrad.kernels.ir.expression import Function


@dataclass(frozen=True)
class Kernel:
    """Machine code.

    Attributes
    ----------
    run : callable
        Takes the address of a call (`codegen.work_stealing.CALL`) and releases the GIL.
    address : int
        Of the machine code, a C function of that address.
    fail : callable or None
        Runs the same call with Python's own errors, where there are functions without a formula.
    name : str
    path : Path
        Of the source.
    compiled_here : bool
        False where another process had compiled it already.
    vector_bits : int
        The widest vector registers that its loop works with; 0 where LLVM vectorised nothing.
    seconds : float
        What compiling took, whoever did it.
    """

    run: Callable[[int], None]
    address: int
    fail: Callable[[int], None] | None
    name: str
    path: Path
    compiled_here: bool
    vector_bits: int
    seconds: float


# A C function cannot raise Python's errors: it leaves a mark, and `Kernel.fail` does it again.
_GUARD = f"""

kernel = njit(error_model="numpy")(kernel)


def guarded(call):
    try:
        kernel(call)
    except Exception:
        m.store_int64(call, {FAILED}, 1)
"""

_PARTS = (
    "intrinsics",
    "tiled_transpose",
    "nontemporal",
    "scalar_math",
    "arithmetic",
    "numba_pipeline",
)
_kernels: dict[Path, Kernel] = {}
_lock = threading.RLock()


def compiled(source: str, name: str, calls: Sequence[Function] = (), way: str = "") -> Kernel:
    """The kernel of a source that defines ``kernel``.

    Parameters
    ----------
    source : str
    name : str
        Of the function.
    way : str
        What the kernel does with it, for the name of its file.
    calls : sequence of Function
        Those without a formula, which the source calls as ``call0``, ``call1``, ...
    """
    numba = require_numba()
    if calls:
        source += _GUARD
    content = "\n".join([source, _foundations(), *(fingerprint(c.plain) for c in calls)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    path = cache_folder() / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name + way)[:40]}_{digest}.py"
    with _lock:
        if path not in _kernels:
            with _locked(path.with_suffix(".lock")):
                _kernels[path] = _compile(numba, path, name, source, calls)
        return _kernels[path]


def _compile(
    numba: ModuleType, path: Path, name: str, source: str, calls: Sequence[Function]
) -> Kernel:
    _write(path, source)
    module = _load(path)
    for k, function in enumerate(calls):
        setattr(module, f"call{k}", _dispatcher(function))
    signature = numba.void(numba.int64)
    start = time.perf_counter()
    code = numba.cfunc(signature, cache=True, error_model="numpy")(
        module.guarded if calls else module.kernel
    )
    seconds = time.perf_counter() - start
    fresh = code.cache_hits == 0
    notes_path = path.with_suffix(".json")
    if fresh or not notes_path.exists():
        notes = {"vector_bits": _vector_bits(code) if fresh else 0, "seconds": seconds}
        _write(notes_path, json.dumps(notes))
    notes = json.loads(notes_path.read_text())

    return Kernel(
        code.ctypes,
        code.address,
        module.kernel if calls else None,
        name,
        path,
        fresh,
        notes["vector_bits"],
        notes["seconds"],
    )


def _dispatcher(function: Function) -> Any:
    from taskgrad.kernels.codegen.numba_pipeline import dispatcher  # needs Numba

    assert function.plain is not None
    return dispatcher(function.plain)


def _vector_bits(code: Any) -> int:
    """From LLVM's own mark on the loops that it vectorised, and the registers in the assembly."""
    if "llvm.loop.isvectorized" not in code.inspect_llvm():
        return 0
    assembly = code._library.get_asm_str()
    registers = {"%zmm": 512, "%ymm": 256, "%xmm": 128}
    widest = (bits for register, bits in registers.items() if register in assembly)
    return next(widest, 128)


def _load(path: Path) -> ModuleType:
    name = f"taskgrad_kernel_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Numba looks it up by its name when it loads from its cache
    spec.loader.exec_module(module)
    return module


def _write(path: Path, text: str) -> None:
    """All of it or nothing; a file that is right stays, since Numba's cache goes by its date."""
    try:
        if path.read_text() == text:
            return
    except FileNotFoundError:
        pass
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed
        yield


@cache
def cache_folder() -> Path:
    """Where sources and machine code are: below NUMBA_CACHE_DIR, else below the user's cache."""
    chosen = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen or Path.home() / ".cache") / "taskgrad-kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # a home that cannot be written to: a cache for this process
        return Path(tempfile.mkdtemp(prefix="taskgrad-kernels-"))


@cache
def _foundations() -> str:
    """What a kernel's machine code depends on beside its source."""
    folder = Path(codegen.__path__[0])
    ours = [(folder / f"{name}.py").read_text() for name in _PARTS]
    return "\n".join([*ours, sys.version, version("numba"), version("llvmlite"), version("numpy")])


def fingerprint(value: Any) -> str:
    """A text that differs where a function, or what it refers to, does."""
    if isinstance(value, FunctionType):
        closed = [fingerprint(cell.cell_contents) for cell in value.__closure__ or ()]
        used = [
            f"{name}={fingerprint(value.__globals__[name])}"
            for name in _names_in(value.__code__)
            if name in value.__globals__ and value.__globals__[name] is not value
        ]
        return " ".join([_code(value.__code__), *closed, *used, repr(value.__defaults__)])
    if isinstance(value, ModuleType):
        return value.__name__
    inner = getattr(value, "py_func", None)  # of a function that Numba's own decorator made
    return fingerprint(inner) if inner is not None else f"{type(value).__name__} {value!r}"


def _names_in(code: CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return sorted({*code.co_names}.union(*map(_names_in, inner)))


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return " ".join([code.co_code.hex(), *constants, *code.co_names, *code.co_varnames])
