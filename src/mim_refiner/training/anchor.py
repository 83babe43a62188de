"""The dense anchor's part of a step: its gradients beside those of the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mim_refiner.core.collectives import process_rows, use_rows
from mim_refiner.core.run import Run
from mim_refiner.models.refiner import Refiner


def carries_anchor(step: int, share: float) -> bool:
    """Whether this step does: a ``share`` of all steps, evenly spread."""
    return math.floor((step + 1) * share) > math.floor(step * share)


def anchor_backward(
    refiner: Refiner,
    views: Sequence[Tensor],
    generator: torch.Generator,
    run: Run,
    weight: float,
    micro_batch: int | None = None,
) -> Tensor:
    """Add the gradients of ``weight`` times the distance on the global ``views`` to the parameters; return that.

    The encoder passes once more over these views, ``micro_batch`` images at a time: images do not meet in this loss,
    so the sum over parts is the whole. Random layers draw the same for any size of parts.
    """
    assert refiner.anchor is not None
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    rows = process_rows(len(views[0]))
    part = min(micro_batch or rows.count, rows.count)
    total = torch.zeros((), device=run.device)
    for start in range(0, rows.count, part):
        stop = min(start + part, rows.count)
        torch.manual_seed(seed)
        with use_rows(rows.part(start, stop)), run.autocast():
            prefix = refiner.frozen_prefix(torch.cat([view[start:stop] for view in views]))
            distance = refiner.anchor(refiner.backbone, prefix, refiner.frozen_blocks)
            loss = distance * (weight * (stop - start) / rows.count)
        loss.backward()
        total += loss.detach()
    return total
