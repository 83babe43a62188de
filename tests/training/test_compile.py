"""A compiled encoder: every pass of a run has its graph, and none falls back to eager."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._dynamo import config
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import extract_features
from mim_refiner.models.backbone import GRAPHS, Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.refine import forward_backward

# the compiler's own, when it looks at the gradient of every input
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """A compiler that has seen nothing, whose limit turns into an error."""
    torch._dynamo.reset()
    counters.clear()
    with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield
    torch._dynamo.reset()


def make(frozen_blocks: int, drop_path: float = 0.0, depth: int = 4) -> Refiner:
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit(f"vit_w32_d{depth}_h2_p8", image_size=16, drop_path_rate=drop_path))
    return Refiner(
        backbone, (depth - 2, depth - 1), HeadConfig(16, 16, 8, 64), pooling="cls", frozen_blocks=frozen_blocks
    )


def step(refiner: Refiner, micro_batch: int | None) -> torch.Tensor:
    """Losses of six images in five views of two sizes; micro-batches of 4 leave a last one of 2."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    views = [torch.randn(6, 3, size, size, generator=generator) for size in (16, 16, 8, 8, 8)]
    return forward_backward(refiner, views, torch.arange(6), None, Run(), micro_batch).loss.detach()


def steps(refiner: Refiner, micro_batch: int | None) -> list[torch.Tensor]:
    """Warm-up and refinement, two steps each."""
    refiner.freeze_encoder()
    losses = [step(refiner, micro_batch), step(refiner, micro_batch)]
    refiner.unfreeze_encoder()
    return [*losses, step(refiner, micro_batch), step(refiner, micro_batch)]


@pytest.mark.parametrize(
    ("frozen_blocks", "micro_batch", "graphs"), [(0, None, 4), (0, 4, 12), (1, None, 8), (1, 4, 20)]
)
def test_every_pass_has_its_graph_and_gives_what_the_eager_one_gives(
    frozen_blocks: int, micro_batch: int | None, graphs: int
) -> None:
    expected = steps(make(frozen_blocks), micro_batch)
    refiner, backend = make(frozen_blocks), CompileCounter()
    refiner.backbone.compile_blocks(backend=backend)
    torch.testing.assert_close(steps(refiner, micro_batch), expected, rtol=1e-5, atol=1e-6)
    assert backend.frame_count == counters["stats"]["unique_graphs"] == graphs <= GRAPHS
    assert not counters["unimplemented"]


def test_blocks_that_differ_have_graphs_of_their_own() -> None:
    """Stochastic depth with a rate a block, whose draws stay outside of graphs."""
    expected = steps(make(0, 0.2, depth=3), 4)
    refiner = make(0, 0.2, depth=3)
    refiner.backbone.compile_blocks(backend="eager")
    torch.testing.assert_close(steps(refiner, 4), expected, rtol=1e-5, atol=1e-6)
    assert not any("limit" in reason for reason in counters["unimplemented"])


def test_evaluation_of_any_batch_makes_no_graph(tiny_images: ImageSet) -> None:
    refiner, backend = make(0), CompileCounter()
    refiner.backbone.compile_blocks(backend=backend)
    step(refiner, None)
    made = backend.frame_count
    assert made
    for batch_size, count in ((7, 20), (5, 11)):
        extract_features(refiner.backbone, tiny_images, batch_size=batch_size, indices=np.arange(count))
    assert backend.frame_count == made
    step(refiner, None)
    assert backend.frame_count == made


def test_the_default_limit_would_not_do() -> None:
    """Guards the tests above: the limit counts, and it is an error here."""
    refiner = make(0)
    refiner.backbone.compile_blocks(backend="eager")
    config.recompile_limit = 8
    with pytest.raises(Exception, match="limit"):
        steps(refiner, 4)
