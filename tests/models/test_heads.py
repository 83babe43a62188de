from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from mim_refiner.core.nna import multi_view_nna_loss
from mim_refiner.errors import InputError
from mim_refiner.models.heads import HeadConfig, HeadOutput, Objective, RefinerHead, draw_choices, run_heads

QUEUE_NAMES = {"queue.x": "queue.entries", "queue.idx": "queue.sample_ids", "queue.ptr": "queue.pointer"}
ZERO_GRADIENT = "projector.2.1.bias"  # removed by the normalisation of the predictor's first BatchNorm and of the loss
SMALL = HeadConfig(projector_hidden=8, predictor_hidden=12, out_dim=4, queue_size=16)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def part(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries below ``prefix`` under our names; the reference also stores classes in its queue, we do not."""
    found = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    return {QUEUE_NAMES.get(key, key): value for key, value in found.items() if key != "queue.cls"}


def golden_head(data: dict[str, Tensor], top_k: int) -> RefinerHead:
    objective = Objective(temperature=0.2, view_pairing="reference")
    head = RefinerHead(32, HeadConfig(48, 40, 16, 64), objective, top_k=top_k)
    head.load_state_dict(part(data, "init/"))
    return head


def run(head: RefinerHead, features: Tensor, choice: Tensor | None = None, **objective: Any) -> HeadOutput:
    head.objective = dataclasses.replace(head.objective, **objective)
    return head(features, torch.arange(features.shape[1]), choice=choice)


@pytest.mark.parametrize("local", [0, 4])
@pytest.mark.parametrize("top_k", [1, 20])
def test_golden_two_steps_and_eval(golden_dir: Path, top_k: int, local: int) -> None:
    data = load_file(golden_dir / "head" / f"head_topk{top_k}_local{local}.safetensors")
    head = golden_head(data, top_k)
    for step in range(2):
        head.zero_grad()
        x = data[f"step{step}/x"].clone().requires_grad_()
        out = head(x.view(2 + local, 8, 32), data[f"step{step}/idx"], choice=data[f"step{step}/choice"])
        out.loss.backward()
        assert out.predicted.shape == (2 + local, 8, 16)
        torch.testing.assert_close(out.predicted.flatten(0, 1), data[f"step{step}/predicted"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            out.projected[:2].flatten(0, 1), data[f"step{step}/projected_preswap"], rtol=1e-5, atol=1e-5
        )
        assert float(out.loss.detach()) == pytest.approx(float(data[f"step{step}/loss/total"]), rel=1e-6)
        similarity, age = data[f"step{step}/metric/nn-similarity"], data[f"step{step}/metric/nn-age"]
        assert float(out.neighbor_age.float().mean()) == pytest.approx(float(age), rel=1e-6)
        if top_k == 1:  # the reference averages over all k there
            assert float(out.neighbor_similarity.mean()) == pytest.approx(float(similarity), abs=1e-6)
        check_gradients(head, x, part(data, f"step{step}/grad/"))
        for name, expected in part(data, f"step{step}/after/").items():
            torch.testing.assert_close(head.state_dict()[name], expected, rtol=1e-5, atol=1e-5)
    check_eval(head, data)


def check_gradients(head: RefinerHead, x: Tensor, expected: dict[str, Tensor]) -> None:
    actual = {"x": x.grad, **{name: parameter.grad for name, parameter in head.named_parameters()}}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        found = actual[name]
        assert found is not None
        if name == ZERO_GRADIENT:
            assert float(found.abs().max()) < 1e-6
        else:
            assert relative_error(found, gradient) <= 1e-5, name


def check_eval(head: RefinerHead, data: dict[str, Tensor]) -> None:
    head.eval()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    x = data["eval/x"].view(2, 8, 32)
    out = head(x, data["eval/idx"], choice=data["eval/choice"])
    torch.testing.assert_close(out.predicted.flatten(0, 1), data["eval/predicted"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.projected.flatten(0, 1), data["eval/projected"], rtol=1e-5, atol=1e-5)
    found = head.queue.lookup(out.projected.flatten(0, 1), exclude_same=False, choice=data["eval/choice"])
    torch.testing.assert_close(found.neighbors, data["eval/postswap"], rtol=1e-5, atol=1e-5)
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])


def test_golden_initialisation_of_the_full_size_head(golden_dir: Path) -> None:
    statistics = json.loads((golden_dir / "head" / "init_stats_base_head_L16.json").read_text())
    head = RefinerHead(1024, HeadConfig(2048, 4096, 256, queue_size=8))
    parameters = dict(head.named_parameters())
    assert parameters.keys() == statistics.keys()
    for name, expected in statistics.items():
        value = parameters[name].detach()
        assert list(value.shape) == expected["shape"]
        if value.ndim == 1:
            assert bool((value == expected["mean"]).all())
            continue
        bound = math.sqrt(6 / sum(value.shape))  # Xavier uniform
        assert float(value.abs().max()) == pytest.approx(bound, rel=1e-4)
        assert float(value.std()) == pytest.approx(expected["std"], rel=5e-3)
        assert float(value.mean()) == pytest.approx(0, abs=5 * expected["std"] / math.sqrt(value.numel()))


def test_targets_and_neighbours_carry_no_gradient() -> None:
    """Gradient flows through the prediction only: with a predictor that ignores its input nothing reaches x."""
    head = RefinerHead(6, SMALL)
    nn.init.zeros_(head.predictor[0][0].weight)
    x = torch.randn(3, 8, 6, requires_grad=True)
    run(head, x).loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_reads_the_queue_then_writes_global_view_0() -> None:
    head = RefinerHead(6, SMALL)
    start = head.queue.entries.clone()
    out = run(head, torch.randn(3, 8, 6))
    assert (out.neighbor_sample_ids == -1).all()  # the batch itself was not there yet
    assert torch.equal(head.queue.entries[:8], out.projected[0].detach())
    assert torch.equal(head.queue.entries[8:], start[8:])
    assert head.queue.sample_ids[:8].tolist() == list(range(8))


def test_default_pairing_is_the_correct_one() -> None:
    head = RefinerHead(6, SMALL).eval()
    x = torch.randn(4, 8, 6)
    default, cross = run(head, x).loss, run(head, x, view_pairing="cross").loss
    assert torch.equal(default, cross)
    assert not torch.equal(default, run(head, x, view_pairing="reference").loss)
    assert not torch.equal(default, run(head, x, view_pairing="cross", swap_negatives=True).loss)


def test_without_swap_the_positive_is_the_target() -> None:
    head = RefinerHead(6, SMALL).eval()
    x = torch.randn(4, 8, 6)
    out = run(head, x, swap_positive=False)
    targets = out.projected[:2].detach()
    expected = multi_view_nna_loss(out.predicted, targets, targets, 0.2).loss
    assert torch.equal(out.loss, expected)
    assert not torch.equal(out.loss, run(head, x, swap_positive=True).loss)


def test_draws_come_from_the_generator() -> None:
    head = RefinerHead(6, SMALL, top_k=5).eval()
    x = torch.randn(2, 8, 6)
    generators = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    choices = [draw_choices([head], 2, x.shape[1], generator, x.device) for generator in generators]
    losses = [float(run(head, x, *choice).loss.detach()) for choice in choices]
    assert losses[0] == losses[1] != losses[2]


def test_bfloat16_autocast_keeps_the_loss_in_float32() -> None:
    head = RefinerHead(6, SMALL).eval()
    x = torch.randn(3, 8, 6)
    full = run(head, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(head, x)
    assert out.loss.dtype == torch.float32
    assert out.projected.dtype == torch.float32
    assert not torch.equal(out.projected, full.projected)  # the linears did run in bfloat16
    assert float(out.loss.detach()) == pytest.approx(float(full.loss.detach()), rel=0.1)


def test_state_dict_round_trip_with_the_queue() -> None:
    head, other = RefinerHead(6, SMALL), RefinerHead(6, SMALL)
    run(head, torch.randn(2, 8, 6))
    other.load_state_dict(head.state_dict())
    x = torch.randn(2, 8, 6)
    assert torch.equal(run(head, x).loss, run(other, x).loss)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch of 20 .* queue of 16"):
        run(RefinerHead(6, SMALL), torch.randn(2, 20, 6))
    with pytest.raises(InputError, match=r"1 view of .* use 2 global views"):
        run(RefinerHead(6, SMALL), torch.randn(1, 8, 6))


@pytest.mark.parametrize("one_by_one", [set(), {"cpu"}])
def test_several_heads_at_once_are_each_head_alone(monkeypatch: pytest.MonkeyPatch, one_by_one: set[str]) -> None:
    """Losses, gradients, statistics and queues in float64; stacked, as many products for three heads as for one."""
    monkeypatch.setattr("mim_refiner.models.heads.ONE_BY_ONE", one_by_one)
    torch.manual_seed(0)
    alone = [RefinerHead(6, SMALL, top_k=3).double() for _ in range(3)]
    together = [copy.deepcopy(head) for head in alone]
    x, ids = torch.randn(3, 4, 8, 6, dtype=torch.float64), torch.arange(8)
    choices = [torch.randint(3, (16,)) for _ in alone]
    outputs = run_heads(together, x, ids, choices=choices)
    sum(output.loss for output in outputs).backward()  # type: ignore[union-attr]
    for number, (head, other) in enumerate(zip(alone, together, strict=True)):
        expected = head(x[number], ids, choice=choices[number])
        expected.loss.backward()
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(outputs[number], name), value, rtol=1e-12, atol=1e-12)
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad, rtol=1e-11, atol=1e-12)
        for name, buffer in head.named_buffers():
            torch.testing.assert_close(other.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
        assert other.projector[0][1].num_batches_tracked == 1
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_heads(together, x, ids, choices=choices)
    products = {event.key: event.count for event in profiler.key_averages()}
    assert products["aten::native_batch_norm"] == (15 if one_by_one else 5)
    assert one_by_one or "aten::addmm" not in products


def test_a_batch_norm_sends_one_message_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three heads of five layers over two make-believe processes: five messages for the norms, three for the rest."""
    sent: list[str] = []
    for name in ("all_gather", "all_reduce"):
        plain = getattr(dist, name)
        monkeypatch.setattr(dist, name, lambda *a, name=name, plain=plain, **k: (sent.append(name), plain(*a, **k))[1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        heads = [RefinerHead(6, SMALL) for _ in range(3)]
        outputs = run_heads(heads, torch.randn(3, 4, 8, 6), torch.arange(8))
        assert sent == ["all_gather"] * 8  # also predictions, queue entries and their numbers
        sent.clear()
        torch.stack([output.loss for output in outputs]).sum().backward()
        assert sent == ["all_reduce"] * 6
    finally:
        dist.destroy_process_group()
