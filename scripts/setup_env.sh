#!/usr/bin/env bash
# Make or update the virtual environment: scripts/setup_env.sh VENV [EXTRA]
#
# uv does the installing, because pip needs minutes more for the several GB of torch. A uv on the PATH is used when there
# is one; otherwise uv goes into the environment first, and pip itself is the last resort.
set -euo pipefail

venv=${1:?usage: scripts/setup_env.sh VENV [EXTRA]}
extra=${2:-}
here=$(cd "$(dirname "$0")/.." && pwd)
target="$here${extra:+[$extra]}"

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11-3.13 found (tried ${PYTHON:-python3}, python3.13, python3.12, python3.11); set PYTHON=/path/to/python" >&2
    return 1
}

# A shim on the PATH may exist and still not run, so ask it for its version.
if uv --version >/dev/null 2>&1; then uv=uv; else uv="$venv/bin/uv"; fi

if ! supported "$venv/bin/python"; then
    python=$(find_python)
    if [ "$uv" = uv ]; then
        uv venv --quiet --python "$(command -v "$python")" "$venv"
    else
        "$python" -m venv "$venv"
    fi
fi
if [ "$uv" != uv ] && [ ! -x "$uv" ]; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
    "$venv/bin/python" -m pip install --quiet uv || uv=""
fi

if [ -n "$uv" ]; then
    "$uv" pip install --python "$venv/bin/python" --constraint "$here/constraints.txt" --editable "$target"
else
    "$venv/bin/python" -m pip install --constraint "$here/constraints.txt" --editable "$target"
fi

# uv leaves no bytecode, and some machines forbid Python to write it: then every start of the command would compile torch
# anew (10 s and more). One import here, with writing allowed, pays that once.
env -u PYTHONDONTWRITEBYTECODE MPLBACKEND=Agg "$venv/bin/python" -W ignore -c '
import jinja2, matplotlib.pyplot, pyarrow.parquet, pydantic, rich.live, rich.markdown, rich.progress, rich.table
import safetensors.torch, scipy.optimize, sklearn.cluster, sklearn.linear_model, sklearn.metrics, sklearn.neighbors
import timm, torch, torch._dynamo, torchvision.transforms.v2, typer.rich_utils, yaml'
