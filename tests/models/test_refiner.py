from __future__ import annotations

from typing import Any

import pytest
import torch

from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig, Objective
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.refine import forward_backward

CONFIG = HeadConfig(32, 32, 16, 64)


def make(
    blocks: tuple[int, ...] = (1, 2),
    *,
    pooling: str | list[str] = "cls",
    frozen_blocks: int = 0,
    objective: Any = None,
    **options: object,
) -> Refiner:
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=32, **options))
    return Refiner(backbone, blocks, CONFIG, objective, pooling=pooling, frozen_blocks=frozen_blocks)


def views() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_heads_read_raw_blocks_and_only_the_last_one_after_the_norm(pooling: str) -> None:
    refiner = make(pooling=pooling)
    features = refiner.features(views())
    for v, view in enumerate(views()):
        raw, last = refiner.backbone.forward_blocks(view, [1, 2])
        normed = refiner.backbone.forward_blocks(view, [2], norm=True)[0]
        torch.testing.assert_close(features[1][v], raw.pooled(pooling), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features[2][v], normed.pooled(pooling), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(features[2][v], last.pooled(pooling))


def test_the_loss_is_the_sum_over_heads() -> None:
    refiner = make()
    output = refiner.head_losses(refiner.features(views()), torch.arange(4))
    assert output.loss.item() == pytest.approx(sum(head.loss.item() for head in output.heads.values()))
    assert sorted(output.heads) == [1, 2]


@pytest.mark.parametrize("poolings", [["cls", "mean", "cls"], ["mean", "cls", "mean"]])
def test_each_head_has_its_own_pooling_and_temperature(poolings: list[str]) -> None:
    temperatures = [0.1, 0.5, 0.1]
    own = make((0, 1, 2), pooling=poolings, objective=[Objective(temperature) for temperature in temperatures])
    output = own.head_losses(own.features(views()), torch.arange(4))
    for number, (pooling, temperature) in enumerate(zip(poolings, temperatures, strict=True)):
        same = make((0, 1, 2), pooling=pooling, objective=Objective(temperature))
        alone = same.head_losses(same.features(views()), torch.arange(4)).heads[number]
        torch.testing.assert_close(output.heads[number].loss, alone.loss)
        torch.testing.assert_close(output.heads[number].predicted, alone.predicted)
    assert list(output.heads) == [0, 1, 2]


def test_a_frozen_encoder_keeps_no_gradient_and_stays_in_eval_mode() -> None:
    refiner = make(drop_path_rate=0.5)
    refiner.freeze_encoder()
    refiner.train()
    assert not refiner.backbone.training
    assert refiner.heads["1"].training
    assert not refiner.features(views())[1].requires_grad


def test_a_frozen_prefix_changes_nothing_but_its_gradients() -> None:
    whole, prefix = make((2,)), make((2,), frozen_blocks=2)
    for refiner in (whole, prefix):
        refiner.unfreeze_encoder()
        forward_backward(refiner, views(), torch.arange(4), None, Run())
    theirs = dict(prefix.named_parameters())
    for name, parameter in whole.named_parameters():
        fixed = "pos_embed" in name or any(
            part in name for part in ("patch_embed", "cls_token", "blocks.0.", "blocks.1.")
        )
        if fixed:
            assert theirs[name].grad is None, name
        else:
            torch.testing.assert_close(theirs[name].grad, parameter.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": (1, 3)}, "blocks 0 to 2"),
        ({"blocks": ()}, "blocks 0 to 2"),
        ({"frozen_blocks": 2}, "between 0 and the first head's block 1"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
    ],
)
def test_impossible_settings_are_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
