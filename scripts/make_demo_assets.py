"""Make what the demo embeds: a CIFAR-10 subset, and two encoders in half precision with the story of their making.

    python scripts/make_demo_assets.py images --train 'cifar10_train-*.parquet' --test cifar10_test.parquet
    python scripts/make_demo_assets.py weights --name mae --run runs/mae --what "..." --command "..." \\
        --date 2026-11-24 --draws 1500000

Images become lossy WebP (assets/README.md says what that costs); an equal number of each class is drawn with a fixed
seed.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mim_refiner.data.sources import open_source

ASSETS = Path(__file__).resolve().parent.parent / "src" / "mim_refiner" / "assets"
TRAIN_PER_CLASS, TEST_PER_CLASS, SEED = 300, 1000, 0
QUALITY = 80  # of WebP


def lossy(image: bytes) -> bytes:
    packed = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(packed, "WEBP", quality=QUALITY, method=6)
    return packed.getvalue()


def write_subset(spec: str, per_class: int, path: Path) -> None:
    source = open_source(spec)
    assert source.labels is not None
    rng = np.random.default_rng(SEED)
    classes = range(int(source.labels.max()) + 1)
    chosen = np.concatenate([rng.choice(np.flatnonzero(source.labels == c), per_class, replace=False) for c in classes])
    rng.shuffle(chosen)
    table = pa.table({"image": [lossy(source.read(int(i))) for i in chosen], "label": source.labels[chosen]})
    names = json.dumps(list(source.class_names or ()))
    pq.write_table(table.replace_schema_metadata({"class_names": names}), path, compression="zstd")
    print(f"{path}: {len(chosen)} images, {path.stat().st_size / 1e6:.1f} MB")


def copy_weights(args: argparse.Namespace) -> None:
    source, target = Path(args.run) / "export", ASSETS / args.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    head, title, rest = (source / "README.md").read_text().partition("\n# ")
    name, _, card = rest.partition("\n")  # the card tells of the last run alone
    (target / "README.md").write_text(f"{head}{title}{name}\n\n{args.what}. Made by: `{args.command}`\n{card}")
    half = {name: tensor.to(torch.float16) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    record = ASSETS / "weights.json"
    made = json.loads(record.read_text()) if record.exists() else {}
    made[args.name] = {key: getattr(args, key) for key in ("what", "date", "command", "draws")} | {"seed": 0}
    record.write_text(json.dumps(made, indent=2) + "\n")
    print(f"{target}: {(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    images = parts.add_parser("images")
    images.add_argument("--train", required=True)
    images.add_argument("--test", required=True)
    weights = parts.add_parser("weights")
    for option in ("name", "run", "what", "command", "date"):
        weights.add_argument(f"--{option}", required=True)
    weights.add_argument("--draws", type=int, required=True, help="images that the training drew, with repetition")
    args = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    if args.part == "images":
        write_subset(args.train, TRAIN_PER_CLASS, ASSETS / "cifar10_train.parquet")
        write_subset(args.test, TEST_PER_CLASS, ASSETS / "cifar10_test.parquet")
    else:
        copy_weights(args)


if __name__ == "__main__":
    main()
