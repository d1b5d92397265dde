#!/usr/bin/env bash
# Everything that needs a GPU, in under eight minutes, on a machine that has torch with CUDA and
# perhaps no package index:
#
#     bash benchmarks/gpu.sh                       the tests, then the figures: runs/gpu.json, gpu.md
#     bash benchmarks/gpu.sh --device cpu --small  the same code without a GPU, in two minutes
#
# PYTHON names the interpreter that has torch (python3 by default). What else is needed is taken from
# it, or from a folder `wheelhouse` beside this repository's files, into .gpu-venv. Fill that folder
# on a machine that has an index and the same Python:
#
#     pip download --only-binary=:all: -d wheelhouse -c constraints.txt \
#         dask distributed numpy cloudpickle tblib safetensors packaging \
#         pytest pytest-timeout hypothesis psutil
#
# (For another Python or system add --python-version 3.12 --platform manylinux2014_x86_64.)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
modules="dask distributed numpy cloudpickle tblib safetensors pytest pytest_timeout hypothesis psutil"

missing() {
    "$1" - $modules <<'PYTHON'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON
}

if ! "$python" -c 'import torch'; then
    echo "$python has no torch: name one that has it with PYTHON=..." >&2
    exit 2
fi
if [ -n "$(missing "$python")" ]; then
    if [ ! -d wheelhouse ]; then
        echo "$python lacks: $(missing "$python")" >&2
        echo "Bring a folder wheelhouse along, made on a machine with an index:" >&2
        sed -n 's/^#     \(pip download\|    .*\)/\1/p; s/^#         /    /p' "$0" | grep -A3 '^pip' >&2
        exit 2
    fi
    if [ ! -x .gpu-venv/bin/python ]; then
        "$python" -m venv --system-site-packages .gpu-venv
    fi
    python=.gpu-venv/bin/python
    # Torch is the machine's own: no wheel asks for it.
    "$python" -m pip install --quiet --no-index --find-links wheelhouse $(missing "$python" | tr _ -)
    if [ -n "$(missing "$python")" ]; then
        echo "the wheelhouse lacks: $(missing "$python")" >&2
        exit 2
    fi
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
exec timeout 475 "$python" -m benchmarks.gpu "$@"
