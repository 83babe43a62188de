"""Dropout that draws by row: how much it drops, and that nothing follows from anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_refiner.core.collectives import Rows, use_rows
from mim_refiner.models.stochastic import RowDropout


def kept(rows: int, p: float = 0.3, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    values = RowDropout(p)(torch.ones(rows, 20, 50))
    assert torch.allclose(values[values > 0], torch.tensor(1 / (1 - p)))
    return (values > 0).double().flatten(1)


def test_the_share_that_is_dropped_is_the_one_asked_for() -> None:
    for p in (0.01, 0.3, 0.9):
        deviation = (p * (1 - p) / 200_000) ** 0.5
        assert abs(1 - kept(200, p).mean().item() - p) < 4 * deviation


def test_rows_places_and_passes_drop_independently() -> None:
    one, other = kept(200), kept(200, seed=1)
    for first, second in ((one, other), (one[:-1], one[1:]), (one[:, :-1], one[:, 1:]), (one[:, :-50], one[:, 50:])):
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(correlation.item()) < 4 / first.numel() ** 0.5
    assert len(one.unique(dim=0)) == 200


def test_a_part_of_the_batch_drops_what_the_whole_drops_there() -> None:
    whole = kept(2 * 6)
    with use_rows(Rows(1, 3, 6)):  # of two views
        assert torch.equal(kept(2 * 2), whole[[1, 2, 7, 8]])


def test_nothing_is_dropped_in_evaluation() -> None:
    assert torch.equal(RowDropout(0.5).eval()(torch.ones(3, 4)), torch.ones(3, 4))
