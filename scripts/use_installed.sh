#!/usr/bin/env bash
# Every step of a user's path with an installed package, in an empty folder: scripts/use_installed.sh PYTHON
set -euo pipefail

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH

run() { echo "+ mim-refiner $*"; "$python" -m mim_refiner "$@" --quiet >out.txt || { cat out.txt; return 1; }; }

"$python" -m mim_refiner --version
"$python" - <<'CODE'
import mim_refiner, pathlib
home = pathlib.Path(mim_refiner.__file__).parent
assert (home / "py.typed").is_file() and (home / "report" / "templates" / "page.html.j2").is_file()
pathlib.Path("assets").symlink_to(home / "assets")
CODE
small=(--set batch_size=32 --set heads.queue_size=128 --set warmup.epochs=1 --set warmup.warmup_epochs=0
    --set refinement.epochs=1 --set refinement.warmup_epochs=0)
run demo --smoke --out demo
test -s demo/report.html
run doctor --data 'assets/cifar10_train.parquet[:200]' --model assets/mae --out checked
run refine --data 'assets/cifar10_train.parquet[:200]' --model assets/mae --exclude checked/exclude.txt --out refined "${small[@]}"
run evaluate --model assets/mae --compare refined --data 'assets/cifar10_train.parquet[:200]' \
    --test 'assets/cifar10_test.parquet[:100]' --protocols knn --out measured
run embed --model refined --data 'assets/cifar10_test.parquet[:50]' --out features.parquet
run export --model refined --format timm --out exported
run report refined --out page.html
"$python" -c 'import timm; timm.create_model("local-dir:exported", pretrained=True)'
test -s page.html -a -s features.parquet
echo "the installed package works"
