from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.core import nna
from mim_refiner.core.nna import multi_view_nna_loss, nna_loss, view_pair_weights
from mim_refiner.errors import InputError

TEMPERATURES = ["0.1", "0.2", "0.35", "1.0"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def views_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().requires_grad_()


def unit(row: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in row))
    return [v / norm for v in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_nna(
    predicted: Tensor, targets: Tensor, neighbors: Tensor, tau: float, *, swap: bool = False, offset: int = 0
) -> float:
    """The paper's equation, one image at a time; ``predicted`` may hold more rows (other ranks) than ``targets``."""
    p, t, n = ([unit(row) for row in x.tolist()] for x in (predicted, targets, neighbors))
    total = 0.0
    for i in range(len(t)):
        positive = math.exp(dot(n[i], p[offset + i]) / tau)
        query = n[i] if swap else t[i]
        negatives = sum(math.exp(dot(query, p[j]) / tau) for j in range(len(p)) if j != offset + i)
        total -= math.log(positive / (positive + negatives))
    return total / len(t)


def random_inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_equals_the_equation_of_the_paper(tau: float, swap: bool) -> None:
    p, t, n = random_inputs((7, 5), (7, 5), (7, 5))
    loss = nna_loss(p, t, n, tau, swap_negatives=swap)
    assert float(loss) == pytest.approx(slow_nna(p, t, n, tau, swap=swap), rel=1e-12)


def test_leading_dimensions_are_independent_pairs() -> None:
    p, t, n = random_inputs((1, 3, 6, 5), (2, 1, 6, 5), (2, 1, 6, 5))
    rows = nna_loss(p, t, n, 0.2, reduction="none")
    assert rows.shape == (2, 3, 6)
    for g in range(2):
        for v in range(3):
            assert float(rows[g, v].mean()) == pytest.approx(slow_nna(p[0, v], t[g, 0], n[g, 0], 0.2), rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("local", [0, 1, 4, 10])
@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "grad_tolerance"), [("f64", 1e-12, 1e-10), ("f32", 1e-6, 1e-5)]
)
def test_golden_reference_pairing(
    golden_dir: Path, local: int, temperature: str, precision: str, loss_tolerance: float, grad_tolerance: float
) -> None:
    data = load_file(golden_dir / "nna_loss" / f"global2_local{local}_{precision}.safetensors")
    p, t, n = (views_first(data[k]) for k in ("predicted", "projected_preswap", "projected_postswap"))
    loss = multi_view_nna_loss(p, t, n, float(temperature), view_pairing="reference").loss
    loss.backward()
    prefix = f"T{temperature}"
    assert relative_error(loss.detach(), data[f"{prefix}/loss/total"]) <= loss_tolerance
    for tensor, name in ((p, "predicted"), (t, "projected_preswap"), (n, "projected_postswap")):
        assert tensor.grad is not None
        assert relative_error(tensor.grad.transpose(0, 1), data[f"{prefix}/grad/{name}"]) <= grad_tolerance


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("local", [1, 4, 10])
def test_golden_correct_pairing(golden_dir: Path, local: int, temperature: str) -> None:
    data = load_file(golden_dir / "nna_loss" / f"global2_local{local}_f32.safetensors")
    expected = load_file(golden_dir / "nna_loss" / "offset_corrected_variant.safetensors")
    p, t, n = (views_first(data[k]) for k in ("predicted", "projected_preswap", "projected_postswap"))
    loss = multi_view_nna_loss(p, t, n, float(temperature)).loss
    loss.backward()
    prefix = f"local{local}/T{temperature}"
    assert relative_error(loss.detach(), expected[f"{prefix}/total"]) <= 1e-6
    assert p.grad is not None
    assert relative_error(p.grad.transpose(0, 1), expected[f"{prefix}/grad/predicted"]) <= 1e-5


@pytest.mark.parametrize("local", [0, 4])
def test_golden_swapped_negatives(golden_dir: Path, local: int) -> None:
    data = {
        key.removeprefix(f"local{local}/"): value
        for key, value in load_file(golden_dir / "nna_loss" / "allswap.safetensors").items()
        if key.startswith(f"local{local}/")
    }
    p, n = views_first(data["predicted"]), views_first(data["projected"])
    unused_targets = torch.randn_like(n)
    result = multi_view_nna_loss(p, unused_targets, n, 0.2, swap_negatives=True, view_pairing="reference")
    result.loss.backward()
    assert relative_error(result.loss.detach(), data["loss/total"]) <= 1e-6
    for tensor, name in ((p, "predicted"), (n, "projected")):
        assert tensor.grad is not None
        assert relative_error(tensor.grad.transpose(0, 1), data[f"grad/{name}"]) <= 1e-5


def test_pairs_are_every_target_with_every_other_view() -> None:
    expected = torch.tensor([[0.0, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
    assert torch.equal(view_pair_weights(2, 5), expected)
    assert expected.sum() == 2 + 2 * 3


def test_reference_pairs_repeat_the_published_indexing() -> None:
    # cross-global terms, plus for every target the predictions 0..L-1 with L = 3 local views
    expected = torch.tensor([[0.0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]) + torch.tensor([1.0, 1, 1, 0, 0])
    assert torch.equal(view_pair_weights(2, 5, "reference"), expected)
    assert torch.equal(view_pair_weights(2, 2, "reference"), view_pair_weights(2, 2, "cross"))


def test_multi_view_is_the_mean_over_pairs_and_reports_the_cosine() -> None:
    p, t, n = random_inputs((4, 6, 5), (2, 6, 5), (2, 6, 5))
    pairs = [(g, v) for g in range(2) for v in range(4) if g != v]
    result = multi_view_nna_loss(p, t, n, 0.3)
    expected = sum(slow_nna(p[v], t[g], n[g], 0.3) for g, v in pairs) / len(pairs)
    cosine = sum(dot(unit(n[g, i].tolist()), unit(p[v, i].tolist())) for g, v in pairs for i in range(6))
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    assert float(result.alignment) == pytest.approx(cosine / (6 * len(pairs)), rel=1e-12)
    assert not result.alignment.requires_grad


@pytest.mark.parametrize("rank", [0, 1])
def test_gathered_predictions_are_negatives_and_the_positive_sits_at_the_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, t, n, other = random_inputs((4, 6, 5), (2, 6, 5), (2, 6, 5), (4, 6, 5))

    def gather(x: Tensor) -> Tensor:
        flat = torch.nn.functional.normalize(other, dim=-1).movedim(1, 0).flatten(1)
        parts = [x, flat[:, : x.shape[1]]]
        return torch.cat(parts if rank == 0 else parts[::-1])

    monkeypatch.setattr(nna, "rank", lambda: rank)
    everyone = torch.cat([p, other] if rank == 0 else [other, p], dim=1)
    expected = [slow_nna(everyone[v], t[g], n[g], 0.2, offset=6 * rank) for g in range(2) for v in range(4) if g != v]
    assert float(multi_view_nna_loss(p, t, n, 0.2, gather=gather).loss) == pytest.approx(
        sum(expected) / len(expected), rel=1e-12
    )
    single = nna_loss(p[0], t[0], n[0], 0.2, gather=gather)
    assert float(single) == pytest.approx(slow_nna(everyone[0], t[0], n[0], 0.2, offset=6 * rank), rel=1e-12)


def test_low_temperature_stays_finite() -> None:
    p, t, n = (x.float().requires_grad_() for x in random_inputs((3, 4, 5), (2, 4, 5), (2, 4, 5)))
    loss = multi_view_nna_loss(p, t, n, 1e-3).loss
    loss.backward()
    assert loss.isfinite()
    assert p.grad is not None
    assert p.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 5), (1, 4, 5), (1, 4, 5)), {}, "at least two views"),
        (((2, 4, 5), (3, 4, 5), (3, 4, 5)), {}, "at least two views"),
        (((3, 4, 5), (2, 4, 5), (2, 4, 6)), {}, "needs predicted"),
        (((3, 4, 5), (2, 4, 5), (2, 4, 5)), {"temperature": 0.0}, "temperature above 0"),
        (((3, 4, 5), (2, 4, 5), (2, 4, 5)), {"view_pairing": "paper"}, "'cross' or 'reference'"),
    ],
)
def test_unusable_input_is_refused(shapes: tuple[tuple[int, ...], ...], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        multi_view_nna_loss(*random_inputs(*shapes), **{"temperature": 0.2, **options})
