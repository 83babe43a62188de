"""The cached step is the plain step: gradients, queues, parameters, with random layers and frozen blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim_refiner.core.optim import adamw, parameter_groups
from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig, Objective
from mim_refiner.models.refiner import Refiner, RefinerOutput
from mim_refiner.training.cached import refuse_batch_dependent
from mim_refiner.training.refine import forward_backward
from mim_refiner.types import Checkpointing

BATCH = 12


def make(
    frozen_blocks: int = 0,
    dtype: torch.dtype = torch.float64,
    pooling: Any = "cls",
    temperatures: Any = (),
    **options: Any,
) -> Refiner:
    torch.manual_seed(0)
    vit = create_vit("vit_w32_d4_h2_p8", image_size=16, **({"drop_path_rate": 0.4} | options))
    config, objective = HeadConfig(24, 24, 16, 64), [Objective(temperature) for temperature in temperatures] or None
    refiner = Refiner(Backbone.wrap(vit), (2, 3), config, objective, pooling=pooling, frozen_blocks=frozen_blocks)
    refiner.unfreeze_encoder()
    refiner.set_top_k(5)
    return refiner.to(dtype)


def views(step: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    sizes = (16, 16, 8, 8, 8)
    return [torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def run(
    refiner: Refiner, micro_batch: int | None, step: int = 0, precision: str = "fp32", kept: int = 0
) -> RefinerOutput:
    """One step as the loop does it: the global generator seeded by the step."""
    dtype = next(refiner.parameters()).dtype
    refiner.zero_grad(set_to_none=True)
    torch.manual_seed(7 + step)
    sample_ids, generator = torch.arange(BATCH) + step, torch.Generator().manual_seed(step)
    return forward_backward(
        refiner, views(step, dtype), sample_ids, generator, Run(precision=precision), micro_batch, kept
    )


def gradients(refiner: Refiner) -> dict[str, Tensor]:
    return {name: p.grad for name, p in refiner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 5, 6, 11])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frozen_blocks": 2},
        {"pooling": "mean"},
        {"pooling": ["mean", "cls"], "temperatures": (0.1, 0.4)},
        {"pooling": ["cls", "mean"], "frozen_blocks": 1},
        {"proj_drop_rate": 0.3, "attn_drop_rate": 0.2, "pos_drop_rate": 0.1},
        {"init_values": 0.1, "reg_tokens": 2},
    ],
    ids=str,
)
def test_all_gradients_and_buffers_equal_the_plain_step_in_float64(options: dict[str, Any], micro_batch: int) -> None:
    plain, cached = make(**options), make(**options)
    expected, output = run(plain, None), run(cached, micro_batch)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    theirs, ours = gradients(plain), gradients(cached)
    assert theirs.keys() == ours.keys()
    assert any(name.startswith("backbone.model.blocks.3") for name in ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(cached.named_buffers())[name], buffer, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("kept", [1, 3, 100])
@pytest.mark.parametrize("frozen_blocks", [0, 2])
def test_kept_graphs_change_no_gradient_and_spare_their_second_pass(kept: int, frozen_blocks: int) -> None:
    plain, cached = make(frozen_blocks), make(frozen_blocks)
    passes: list[int] = []
    cached.backbone.model.blocks[2].register_forward_hook(lambda *_: passes.append(1))
    expected, output = run(plain, None), run(cached, 5, kept=kept)
    assert len(passes) == 2 * 6 - min(kept, 6)  # two sizes of view, three micro-batches each
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_the_random_layers_of_the_comparison_do_drop() -> None:
    """Without this the equality above could hold because nothing is random."""
    dropping, steady = make(), make(drop_path_rate=0.0)
    assert run(dropping, 4).loss.item() != run(steady, 4).loss.item()
    first = run(make(), 4).loss.item()
    assert run(make(), 4, step=1).loss.item() != first


def test_micro_batches_of_any_size_give_the_same_parameters_after_five_steps() -> None:
    results = {}
    for micro_batch in (None, 1, 2, 3, 5, 12):
        refiner = make(frozen_blocks=1)
        optimizer = adamw(parameter_groups(refiner.named_parameters(), weight_decay=0.05), (0.9, 0.95))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for step in range(5):
            run(refiner, micro_batch, step)
            optimizer.step()
        results[micro_batch] = refiner.state_dict()
    moved = (
        (
            results[None]["backbone.model.blocks.2.attn.qkv.weight"]
            - make().state_dict()["backbone.model.blocks.2.attn.qkv.weight"]
        )
        .abs()
        .max()
    )
    assert moved > 1e-3
    for micro_batch, state in results.items():
        for name, tensor in results[None].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-9, msg=f"{micro_batch} {name}")


@pytest.mark.parametrize("kept", [True, "selective"])
@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("math_attention", [True, False])
def test_checkpointing_changes_no_gradient(micro_batch: int | None, kept: Checkpointing, math_attention: bool) -> None:
    plain, checkpointed = make(attn_drop_rate=0.2 * math_attention), make(attn_drop_rate=0.2 * math_attention)
    if math_attention:
        checkpointed.backbone.use_math_attention()
    checkpointed.backbone.set_checkpointing(kept)
    run(plain, None)
    run(checkpointed, micro_batch)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(checkpointed)[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_bf16_differs_by_no_more_than_its_rounding() -> None:
    """Forward passes are the same numbers; gradients differ by the order of sums over rows, a few units of 2^-8."""
    plain, cached = make(dtype=torch.float32), make(dtype=torch.float32)
    assert run(cached, 4, precision="bf16").loss.item() == pytest.approx(
        run(plain, None, precision="bf16").loss.item(), rel=1e-2
    )
    exact = make()
    run(exact, None)
    for name, gradient in gradients(plain).items():
        scale = gradients(exact)[name].norm()
        if scale > 1e-6:  # parameters without effect have rounding noise for a gradient
            own_error = (gradient - gradients(exact)[name]).norm() / scale
            difference = (gradients(cached)[name] - gradient).norm() / scale
            assert difference <= max(2 * own_error, 0.02), (name, difference.item(), own_error.item())


@pytest.mark.parametrize("kept", [True, "selective"])
def test_checkpointing_changes_no_gradient_in_bf16(kept: Checkpointing) -> None:
    """autocast keeps the casts of weights for the second size of views; what is computed again must not miss them.

    Where it keeps none, gradients of both sizes are added in float32 and not in bf16.
    """
    plain, checkpointed = make(dtype=torch.float32), make(dtype=torch.float32)
    checkpointed.backbone.set_checkpointing(kept)
    for refiner in (plain, checkpointed):
        run(refiner, None, precision="bf16")
    for name, gradient in gradients(plain).items():
        assert (gradients(checkpointed)[name] - gradient).norm() <= 0.01 * gradient.norm() + 1e-6, name


def test_frozen_blocks_run_once_and_the_encoder_of_the_warm_up_once() -> None:
    calls = {0: 0, 2: 0}
    refiner = make(frozen_blocks=2)
    for block in calls:
        refiner.backbone.model.blocks[block].register_forward_hook(lambda *_, b=block: calls.update({b: calls[b] + 1}))
    run(refiner, 4)
    assert calls == {0: 6, 2: 12}  # two sizes of view x three micro-batches; trained blocks twice
    refiner.freeze_encoder()
    run(refiner, 4)
    assert calls == {0: 12, 2: 18}
    assert all(name.startswith("heads.") for name in gradients(refiner))


def test_at_most_one_micro_batch_is_held_with_its_graph() -> None:
    refiner = make(drop_path_rate=0.0)
    held: list[int] = []
    hook = lambda module, inputs, output: held.append(len(output)) if torch.is_grad_enabled() else None  # noqa: E731
    refiner.backbone.model.blocks[0].register_forward_hook(hook)
    run(refiner, 5)
    assert held == [10, 10, 4, 15, 15, 6]  # two global views, then three local ones


def test_layers_that_mix_the_images_are_refused_with_the_reason() -> None:
    refiner = make()
    refuse_batch_dependent(refiner.backbone, 5, checkpointing=True)
    refiner.backbone.model.norm = nn.BatchNorm1d(32)
    with pytest.raises(InputError, match=r"model.norm \(BatchNorm1d\).*depend on the other images") as caught:
        refuse_batch_dependent(refiner.backbone, 5)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"checkpointing: .*model.norm \(BatchNorm1d\).*running statistics"):
        refuse_batch_dependent(refiner.backbone, None, checkpointing="selective")
    refuse_batch_dependent(refiner.backbone, None)
