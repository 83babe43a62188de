#!/usr/bin/env bash
# Build wheel and sdist, install the wheel into an empty environment outside the repository, and use it there.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$here/dist"

if uv --version >/dev/null 2>&1; then
    (cd "$here" && uv build --quiet --python "$python")
    uv venv --quiet --python "$python" "$work/venv"
    uv pip install --quiet --python "$work/venv/bin/python" --constraint "$here/constraints.txt" "$here"/dist/*.whl
else
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet build
    (cd "$here" && "$work/venv/bin/python" -m build)
    "$work/venv/bin/python" -m pip install --quiet --constraint "$here/constraints.txt" "$here"/dist/*.whl
fi
bash "$here/scripts/use_installed.sh" "$work/venv/bin/python"
ls -l "$here/dist"
