"""Patch features of several encoders against the first one's, with paired intervals.

    python benchmarks/dense.py BANK TEST START OTHER [OTHER ...]

k-NN segmentation (mIoU) where both image sets have masks, patch-neighbour agreement otherwise.
"""

from __future__ import annotations

import sys

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.dense import dense_change
from mim_refiner.commands.inputs import open_images
from mim_refiner.core.run import Run
from mim_refiner.reporting import Reporter


def main(arguments: list[str]) -> None:
    if len(arguments) < 4:
        sys.exit("usage: dense.py BANK TEST START OTHER [OTHER ...]")
    bank, test = (open_images(source, Reporter()) for source in arguments[:2])
    start = load_backbone(arguments[2])
    for other in arguments[3:]:
        found = dense_change({"before": start, "after": load_backbone(other)}, bank, test, Run())
        print(f"{other}: {found['reason']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
