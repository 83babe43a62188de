"""Whole training steps against vectors made by running the published code (golden/step/README.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.optim import adamw, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadConfig, Objective
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.loop import learning_rate
from mim_refiner.training.recipe import EncoderPhase, HeadPhase, Heads, RefineRecipe
from mim_refiner.training.refine import Refinement, begin_refinement, begin_warmup, forward_backward

HEAD_OF_BLOCK = {3: "cls3", 4: "cls4", 5: "main"}
BATCH, STEPS_PER_EPOCH = 8, 7


@pytest.fixture
def step_dir(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "step"


def our_name(name: str) -> str:
    """Translate a parameter name of the published model to ours."""
    name = name.removeprefix("encoder.") if name.startswith("encoder.") else name
    for block, head in HEAD_OF_BLOCK.items():
        name = name.replace(f"heads.{head}.", f"heads.{block}.")
    name = re.sub(
        r"queue\.(x|idx|ptr)$",
        lambda m: f"queue.{ {'x': 'entries', 'idx': 'sample_ids', 'ptr': 'pointer'}[m[1]] }",
        name,
    )
    name = name.replace("cls_tokens.tokens", "cls_token").replace("pos_embed.embed", "pos_embed")
    return name if name.startswith("heads.") else f"backbone.model.{name}"


def make_refiner(step_dir: Path, dtype: torch.dtype, top_k: int) -> Refiner:
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=4, num_classes=0)
    backbone = Backbone.wrap(encoder, position_rule="bicubic")
    objective = Objective(temperature=0.2, view_pairing="reference")
    refiner = Refiner(backbone, (3, 4, 5), HeadConfig(48, 40, 16, 48), objective, pooling="cls")
    state = {
        our_name(key.removeprefix("init/")): value
        for key, value in load_file(step_dir / "init_state.safetensors").items()
        if not key.endswith("queue.cls")
    }
    table = state["backbone.model.pos_embed"]
    state["backbone.model.pos_embed"] = torch.cat([torch.zeros(1, 1, 64), table.flatten(1, 2)], dim=1)
    refiner.load_state_dict(state)
    refiner.set_top_k(top_k)
    return refiner.to(dtype)


def golden_recipe(top_k: int) -> RefineRecipe:
    return RefineRecipe(
        name="golden",
        batch_size=BATCH,
        heads=Heads(blocks=[3, 4, 5], temperature=0.2, view_pairing="reference"),
        refinement=EncoderPhase(epochs=5, base_lr=4e-2, warmup_epochs=2, end_lr=1e-6, top_k=top_k, layer_decay=0.65),
        warmup=HeadPhase(epochs=5, base_lr=4e-2, warmup_epochs=2, end_lr=1e-6, top_k=top_k),
    )


class Steps:
    """Runs the recorded steps with our refiner, optimizer and schedule."""

    def __init__(self, step_dir: Path, name: str, *, dtype: torch.dtype, top_k: int, frozen: bool = False) -> None:
        self.golden = load_file(step_dir / f"{name}.safetensors")
        self.views = load_file(step_dir / "stage3_topk1.safetensors")
        self.refiner, self.dtype = make_refiner(step_dir, dtype, top_k), dtype
        self.recipe = golden_recipe(top_k)
        refinement = Refinement(
            self.recipe,
            self.refiner,
            ExponentialMovingAverage(self.refiner.backbone),
            loader=None,  # type: ignore[arg-type]  # the recorded views take its place
            photometrics=(),
            run=Run(),
        )
        self.optimizer = begin_warmup(refinement) if frozen else begin_refinement(refinement)

    def run(self, step: int) -> None:
        views = [self.views[f"step{step}/view{v}"].to(self.dtype) for v in range(5)]
        choices = {
            b: self.golden[f"step{step}/{h}/choice"]
            for b, h in HEAD_OF_BLOCK.items()
            if f"step{step}/{h}/choice" in self.golden
        }
        self.optimizer.zero_grad()
        sample_ids = torch.arange(BATCH) + 3 * step
        self.output = forward_backward(self.refiner, views, sample_ids, None, Run(), choices=choices or None)
        set_learning_rate(self.optimizer, learning_rate(self.recipe.refinement, BATCH, STEPS_PER_EPOCH, step))
        self.grads = {n: p.grad.clone() for n, p in self.refiner.named_parameters() if p.grad is not None}
        self.optimizer.step()

    def assert_losses(self, step: int, tolerance: float, prefix: str = "") -> None:
        for block, head in HEAD_OF_BLOCK.items():
            expected = self.golden[f"{prefix}step{step}/loss/heads.{head}.total"].item()
            assert self.output.heads[block].loss.item() == pytest.approx(expected, rel=tolerance), (step, head)


def nearly_zero_gradient(step_dir: Path) -> set[str]:
    names = json.loads((step_dir / "zero_gradient_params.json").read_text())
    return {our_name(name.split("[")[0]) for name in names}


@pytest.mark.parametrize("top_k", [1, 20])
def test_losses_gradients_and_queues_of_refinement_in_float32(step_dir: Path, top_k: int) -> None:
    steps = Steps(step_dir, f"stage3_topk{top_k}", dtype=torch.float32, top_k=top_k)
    recorded = load_file(step_dir / f"stage3_topk{top_k}_grads_params.safetensors")
    steps.run(0)
    steps.assert_losses(0, 1e-5)
    grads = {k.removeprefix("step0/grad/"): v for k, v in recorded.items() if k.startswith("step0/grad/")}
    assert grads
    skip = nearly_zero_gradient(step_dir)
    for name, expected in grads.items():
        if our_name(name) in skip:
            continue
        difference = (steps.grads[our_name(name)].view_as(expected) - expected).norm() / expected.norm()
        assert difference < 1e-5, (name, difference.item())
    for key in (k for k in recorded if k.startswith("step0/buffer_after/heads.") and not k.endswith("queue.cls")):
        ours = steps.refiner.state_dict()[our_name(key.removeprefix("step0/buffer_after/"))]
        torch.testing.assert_close(ours, recorded[key], rtol=1e-4, atol=1e-5)
    for step in (1, 2):
        steps.run(step)
        steps.assert_losses(step, 1e-3)


def test_three_steps_in_float64_give_the_published_parameters_and_ema(step_dir: Path) -> None:
    recorded = load_file(step_dir / "stage3_float64.safetensors")
    steps = Steps(step_dir, "stage3_topk1", dtype=torch.float64, top_k=1)
    steps.golden = {**steps.golden, **recorded}
    ema = ExponentialMovingAverage(steps.refiner.backbone)
    for step in range(3):
        steps.run(step)
        steps.assert_losses(step, 1e-9, prefix="topk1/")
        ema.update(steps.refiner.backbone, 0.9)
    parameters = dict(steps.refiner.named_parameters())
    expected = {k.split("param_after/")[1]: v for k, v in recorded.items() if k.startswith("topk1/step2/param_after/")}
    trained = {our_name(name) for name in expected}
    assert trained == {name for name, p in parameters.items() if p.requires_grad}
    for name, value in expected.items():
        ours = parameters[our_name(name)].detach().float()
        torch.testing.assert_close(ours.view_as(value), value, rtol=0, atol=1e-6, msg=name)
    averaged = dict(ema.module.named_parameters())
    skip = nearly_zero_gradient(step_dir)
    float32 = load_file(step_dir / "stage3_topk1_grads_params.safetensors")
    for key in (k for k in float32 if k.startswith("ema0.9_after_last/")):
        name = our_name(key.removeprefix("ema0.9_after_last/"))
        if name not in skip:
            ours = averaged[name.removeprefix("backbone.")].float().view_as(float32[key])
            torch.testing.assert_close(ours, float32[key], rtol=0, atol=5e-6, msg=name)


def test_head_warmup_keeps_the_encoder_and_its_gradients_out(step_dir: Path) -> None:
    steps = Steps(step_dir, "stage2_frozen_topk1", dtype=torch.float32, top_k=1, frozen=True)
    before = {n: p.clone() for n, p in steps.refiner.backbone.named_parameters()}
    for step in range(3):
        steps.run(step)
        steps.assert_losses(step, 1e-5 if step == 0 else 1e-3)
        assert not any(name.startswith("backbone.") for name in steps.grads)
    for name, parameter in steps.refiner.backbone.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("name", ["stage2_frozen_topk1", "stage3_topk1"])
def test_parameter_groups_are_the_published_ones(step_dir: Path, name: str) -> None:
    frozen = name.startswith("stage2")
    recorded = json.loads((step_dir / f"{name}_param_groups.json").read_text())
    steps = Steps(step_dir, name, dtype=torch.float32, top_k=1, frozen=frozen)
    names = {id(p): n for n, p in steps.refiner.named_parameters()}
    ours = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"], tuple(group["betas"]), group["eps"])
        for group in steps.optimizer.param_groups
        for p in group["params"]
    }
    expected = {}
    for part, groups in recorded.items():
        for group in groups:
            for parameter in group["params"]:
                full = parameter if parameter.startswith(("encoder.", "heads.")) else f"{part}.{parameter}"
                expected[our_name(full)] = (
                    group.get("lr_scale") or 1.0, group["weight_decay"], tuple(group["betas"]), group["eps"]
                )  # fmt: skip
    assert ours.keys() == expected.keys()
    for key, (scale, *rest) in expected.items():
        assert ours[key][0] == pytest.approx(scale, rel=1e-12), key
        assert list(ours[key][1:]) == rest, key


def test_adamw_takes_lr_scale_from_its_group() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([{"params": [parameter], "lr_scale": 0.25, "weight_decay": 0.0}], (0.9, 0.95))
    set_learning_rate(optimizer, 2.0)
    assert optimizer.param_groups[0]["lr"] == 0.5
