#!/usr/bin/env bash
# The tests of the extras that the development environment leaves out, each of which is skipped without its package. Needs uv.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

uv venv --quiet --python "${PYTHON:-python3}" "$work/venv"
uv pip install --quiet --python "$work/venv/bin/python" --constraint "$here/constraints.txt" \
    --editable "${here}[wandb,mlflow,umap]" "pytest>=8.3" "pytest-timeout>=2.3"
cd "$here"
OMP_NUM_THREADS=1 "$work/venv/bin/python" -m pytest -q -rs -p no:cacheprovider \
    tests/commands/test_loggers.py tests/analysis/test_gallery.py "$@"
