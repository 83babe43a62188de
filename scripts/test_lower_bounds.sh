#!/usr/bin/env bash
# The quick tests with the oldest direct dependencies that pyproject.toml allows, those of the extras too. Needs uv.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

uv venv --quiet --python "${PYTHON:-3.11}" "$work/venv"
uv pip install --quiet --python "$work/venv/bin/python" --resolution lowest-direct --editable \
    "${here}[hf,onnx,tensorboard,tiff,docs,wandb,mlflow,umap]" "pytest>=8.3" "pytest-timeout>=2.3"
cd "$here"
# Old packages call what newer ones below them deprecate; deprecations of our own show with newer packages.
OMP_NUM_THREADS=1 "$work/venv/bin/python" -m pytest -q -p no:cacheprovider -m "not slow" \
    -W ignore::DeprecationWarning -W ignore::FutureWarning tests "$@"
