"""On-disk cache of kernels: compiled once a machine, loaded by every other process.

Each source is a file whose name contains a hash of the source, of the modules that it imports and
of the versions of Numba and Python. Numba's own cache keeps the machine code in the same folder.
Processes that need the same kernel at the same time wait for the first, by a file lock.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from taskgrad.kernels import codegen
from taskgrad.kernels.codegen.numba_typing import require_numba
from taskgrad.kernels.codegen.work_stealing import FAILED
from taskgrad.kernels.ir.bytecode import fingerprint
from taskgrad.kernels.ir.expression import ScalarFunction


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    `run` takes the address of a call descriptor (`codegen.work_stealing`) and releases the GIL.
    `fail` runs the same call as Python, raising the functions' errors; None if it calls none.
    """

    run: Callable[[int], None]
    address: int  # of the machine code: a C function that takes the same
    fail: Callable[[int], None] | None
    name: str
    path: Path  # of the source
    compiled_here: bool  # False if the machine code was in the cache
    vector_bits: int  # the widest vector registers of its loop; 0 if LLVM vectorised nothing
    seconds: float  # that compiling took, in whichever process


# A C function cannot raise: it sets a flag, and `Kernel.fail` runs the call again.
_GUARD = f"""

kernel = njit(error_model="numpy")(kernel)


def guarded(call):
    try:
        kernel(call)
    except Exception:
        m.store_int64(call, {FAILED}, 1)
"""

_IMPORTED = (
    "intrinsics",
    "tiled_transpose",
    "nontemporal",
    "scalar_math",
    "arithmetic",
    "numba_pipeline",
)
_kernels: dict[Path, Kernel] = {}
_lock = threading.RLock()


def compile_kernel(
    source: str, name: str, calls: Sequence[ScalarFunction] = (), part: str = ""
) -> Kernel:
    """The kernel of a source that defines ``kernel``.

    `name` is the function's, to which `part` is appended in the name of the file. `calls` are the
    functions without an expression that the source calls as ``call0``, ``call1``, ...
    """
    numba = require_numba()
    if calls:
        source += _GUARD
    content = "\n".join([source, _foundations(), *(fingerprint(c.python) for c in calls)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    path = cache_folder() / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name + part)[:40]}_{digest}.py"
    with _lock:
        if path not in _kernels:
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
                _kernels[path] = _compile(numba, path, name, source, calls)
        return _kernels[path]


def _compile(
    numba: ModuleType, path: Path, name: str, source: str, calls: Sequence[ScalarFunction]
) -> Kernel:
    _write(path, source)
    module = _load(path)
    if calls:
        from taskgrad.kernels.codegen.numba_pipeline import dispatcher  # needs Numba

        for k, function in enumerate(calls):
            assert function.python is not None
            setattr(module, f"call{k}", dispatcher(function.python))
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
    fail = module.kernel if calls else None
    return Kernel(code.ctypes, code.address, fail, name, path, fresh, **notes)


def _vector_bits(code: Any) -> int:
    """From LLVM's metadata of vectorised loops and the registers in the assembly."""
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
    sys.modules[name] = module  # Numba's cache looks it up by name
    spec.loader.exec_module(module)
    return module


def _write(path: Path, text: str) -> None:
    """Write a file atomically; an equal one is kept, since Numba's cache checks its date."""
    try:
        if path.read_text() == text:
            return
    except FileNotFoundError:
        pass
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@cache
def cache_folder() -> Path:
    """The folder of sources and machine code: in NUMBA_CACHE_DIR, else in the user's cache."""
    chosen = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen or Path.home() / ".cache") / "taskgrad-kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # not writable: a cache for this process only
        return Path(tempfile.mkdtemp(prefix="taskgrad-kernels-"))


@cache
def _foundations() -> str:
    """Everything but its source that a kernel's machine code depends on."""
    folder = Path(codegen.__path__[0])
    ours = [(folder / f"{name}.py").read_text() for name in _IMPORTED]
    return "\n".join([*ours, sys.version, version("numba"), version("llvmlite"), version("numpy")])
