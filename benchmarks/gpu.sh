#!/usr/bin/env bash
# Everything that needs a GPU, in under eight minutes, on a machine that has torch with CUDA and
# perhaps no package index:
#
#   bash benchmarks/gpu.sh                       the tests, then the figures: runs/gpu.json, gpu.md
#   bash benchmarks/gpu.sh --device cpu --small  the same code without a GPU, in two minutes
#
# PYTHON names the interpreter that has torch, by default python3. What else is needed, and is not
# there, is installed from the folder `wheelhouse` here into `.gpu-packages`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
packages="dask distributed numpy cloudpickle tblib safetensors pytest pytest-timeout hypothesis psutil"

instructions() {
    cat >&2 <<TEXT
Bring a folder wheelhouse along. On a machine that has an index and the same Python and system, here:

    pip download --only-binary=:all: -d wheelhouse -c constraints.txt $packages
    pip wheel --no-deps -w wheelhouse .

For another Python add, say, --python-version 3.12 --platform manylinux_2_28_x86_64 to the first.
TEXT
    exit 2
}

missing() {
    "$python" - $packages taskgrad <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

def is_there(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False

print(*(name for name in sys.argv[1:] if not is_there(name)))
PYTHON
}

if ! "$python" -c 'import torch'; then
    echo "$python has no torch: name the one that has with PYTHON=..." >&2
    exit 2
fi
export PYTHONPATH="$PWD:$PWD/.gpu-packages${PYTHONPATH:+:$PYTHONPATH}"
lacks=$(missing)
if [ -n "$lacks" ]; then
    echo "$python lacks: $lacks" >&2
    [ -d wheelhouse ] || instructions
    install="$python -m pip install --quiet --no-index --find-links wheelhouse --target .gpu-packages"
    $install $packages
    $install --no-deps taskgrad # else it would ask for a torch, which is the machine's own
    [ -z "$(missing)" ] || instructions
fi
# Before any process starts CUDA: deterministic algorithms want it.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
exec timeout 475 "$python" -m benchmarks.gpu "$@"
