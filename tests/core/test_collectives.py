"""Two real gloo processes against the recorded two-process run of the reference code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.core import collectives
from mim_refiner.core.nna import multi_view_nna_loss
from mim_refiner.models.heads import HeadConfig, RefinerHead

Results = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def reference(golden_dir: Path) -> dict[str, Tensor]:
    return load_file(golden_dir / "distributed" / "world2_gloo.safetensors")


@pytest.fixture(scope="module")
def ranks(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory, forked_file: Callable[..., Any]) -> Results:
    folder = tmp_path_factory.mktemp("gloo")
    golden = golden_dir / "distributed" / "world2_gloo.safetensors"
    words = ["{rank}", folder / "store", golden, folder / "rank{rank}.safetensors"]
    for code, said, errors in forked_file(Path(__file__).with_name("two_process_worker.py"), words, 2):
        assert code == 0, said + errors
    outputs = [folder / f"rank{rank}.safetensors" for rank in range(2)]
    return [load_file(out) for out in outputs]


def test_golden_loss_and_gradient(ranks: Results, reference: dict[str, Tensor]) -> None:
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result["loss"], reference[f"rank{rank}/loss/total"], rtol=1e-6, atol=0)
        expected = reference[f"rank{rank}/grad/predicted"]
        assert float((result["grad"] - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_golden_queues(ranks: Results, reference: dict[str, Tensor]) -> None:
    for rank, result in enumerate(ranks):
        for step in range(3):
            for key in ("nn_x", "after/x", "after/idx", "after/age", "after/ptr"):
                assert torch.equal(result[f"q{step}/{key}"], reference[f"rank{rank}/q{step}/{key}"]), (rank, step, key)


def test_mean_over_ranks_is_the_single_process_loss(ranks: Results, reference: dict[str, Tensor]) -> None:
    def together(name: str) -> Tensor:
        return torch.cat([reference[f"rank{rank}/{name}"] for rank in range(2)]).transpose(0, 1).contiguous()

    predicted = together("predicted").requires_grad_()
    loss = multi_view_nna_loss(
        predicted,
        together("projected_preswap"),
        together("projected_postswap"),
        0.2,
        view_pairing="reference",
    ).loss
    loss.backward()
    assert predicted.grad is not None
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach())
    # each rank holds the gradient of the SUM of both losses; average_gradients divides by the world size
    summed = torch.cat([result["grad"] for result in ranks]).transpose(0, 1)
    torch.testing.assert_close(summed / 2, predicted.grad)


def test_head_on_two_ranks_equals_one_process(ranks: Results) -> None:
    torch.manual_seed(0)
    head = RefinerHead(6, HeadConfig(8, 8, 4, 12))
    for module in (head.projector, head.predictor):
        module.eval()
    out = head(torch.randn(3, 8, 6), torch.arange(8))
    out.loss.backward()
    torch.testing.assert_close((ranks[0]["head/loss"] + ranks[1]["head/loss"]) / 2, out.loss.detach())
    for result in ranks:
        assert torch.equal(result["head/queue_ids"], head.queue.sample_ids)
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(result[f"head/grad/{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_identity_without_a_process_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (collectives.rank(), collectives.world_size(), collectives.is_distributed()) == (0, 1, False)
    assert collectives.all_gather_with_grad(x) is x
    gathered = collectives.all_gather(x)
    assert torch.equal(gathered, x)
    assert not gathered.requires_grad
