"""A torch device named "hostmem", of host memory: code for GPUs can be tried where there is none.

What it is for are mistakes with devices. Tensors of two devices in one operation, results on the
wrong device, and reads of a device's memory by the host fail on it as they do with CUDA. There are
two such devices. They compute as the CPU does, with its bits, and random numbers are the CPU's.
They have no streams, pinned memory or limit of memory, and no LSTM or GRU.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

NAME = "hostmem"

_HERE = Path(__file__).resolve().parent  # others import it through a link
_SOURCES = tuple(_HERE / name for name in ("hostmem.cpp", "autocast.cpp", "device.cpp"))
_TORCH = Path(torch.__file__).parent
_FOLDER = _HERE.parents[1] / "build" / NAME


def install() -> str | None:
    """Register the device here and in all processes to come; the reason if that is not possible.

    Torch imports what is installed as one of its backends, and for other processes the folder of
    the built library is such an installation.
    """
    if shutil.which("g++") is None and not _built().is_dir():
        return "there is no g++, which builds the device 'hostmem'"
    folder = _build()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    register()
    return None


def register() -> None:
    """Register the device in this process; once."""
    if getattr(torch, NAME, None) is not None:
        return
    torch.ops.load_library(_built() / "hostmem.so")
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    # As with CUDA, a module that is moved keeps its parameters, and so those that are tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # Torch's thread for backward passes still has Python objects to let go of after the last one,
    # and aborts the process if Python has ended by then.
    atexit.register(time.sleep, 0.05)


def _built() -> Path:
    """The folder of the library, by all that it is made from."""
    found = hashlib.sha256(torch.__version__.encode())
    for source in (*_SOURCES, _HERE / "memory.h", Path(__file__)):
        found.update(source.read_bytes())
    return _FOLDER / found.hexdigest()[:16]


def _build() -> Path:
    """Compile the library, unless that has been done; takes half a minute."""
    folder = _built()
    if folder.is_dir():
        return folder
    _FOLDER.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=_FOLDER))
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={_cxx11_abi()}"]
    include = _TORCH / "include"
    flags += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    compiling = [
        subprocess.Popen(["g++", *flags, "-c", source, "-o", made / f"{source.stem}.o"])
        for source in _SOURCES
    ]
    failed = [one for one in compiling if one.wait()]
    if failed:
        raise RuntimeError("the device 'hostmem' cannot be compiled; the messages are above")
    lib = _TORCH / "lib"
    objects = [made / f"{source.stem}.o" for source in _SOURCES]
    link = ["g++", "-shared", *objects, "-o", made / "hostmem.so", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    subprocess.run([*link, "-ltorch_cpu", "-lc10"], check=True)
    for one in objects:
        one.unlink()
    (made / NAME).symlink_to(_HERE)
    about = made / f"{NAME}-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[torch.backends]\n{NAME} = {NAME}:register\n")
    try:
        made.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(made)
    return folder


def _cxx11_abi() -> int:
    return int(torch._C._GLIBCXX_USE_CXX11_ABI)


def _module() -> ModuleType:
    """What torch looks for in `torch.hostmem`."""
    module = ModuleType(f"torch.{NAME}")
    accelerator = torch.accelerator
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda: True,
        "device_count": lambda: 2,
        "current_device": accelerator.current_device_index,
        "device": lambda device: accelerator.device_index(torch.device(device).index),
        "set_device": accelerator.set_device_index,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "synchronize": lambda device=None: None,
        # The generator is that of the CPU, which torch seeds, saves and restores anyway.
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }.items():
        setattr(module, name, value)
    sys.modules[module.__name__] = module
    return module
