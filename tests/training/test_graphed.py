"""A step as a CUDA graph, as far as a machine without a GPU can see it: what it repeats, and where it is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.training import graphed, refine
from mim_refiner.training.graphed import WARM, Graphed, uses_graph
from mim_refiner.training.state import RunFolder

ON_THE_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
GPU = Run(torch.device("cuda"))


class Pretended(Graphed):
    """A capture that computes and takes it back, and a replay that computes again into the same memory."""

    made = 0

    def _warm(self, given: tuple[Any, ...]) -> Any:
        return self.work(*given)

    def _capture(self) -> tuple[Callable[[], None], Any]:
        Pretended.made += 1
        state, random = copy.deepcopy(self.module.state_dict()), torch.get_rng_state()
        output = self.work(*self.given)
        gradients = [parameter.grad for parameter in self.parameters]
        self.module.load_state_dict(state)
        torch.set_rng_state(random)

        def replay() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            new = self.work(*self.given)
            for own, other in zip(tree_leaves(output), tree_leaves(new), strict=True):
                own.copy_(other)
            for own, parameter in zip(gradients, self.parameters, strict=True):
                assert (own is None) == (parameter.grad is None)
                if own is not None:
                    own.copy_(parameter.grad)

        return replay, output


def losses(run: Any, folder: Path) -> list[dict[str, float]]:
    recipe = run.refinement.recipe
    refine.train(run.refinement, RunFolder(folder, recipe.model_dump(mode="json"), overwrite=False))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def test_a_run_of_graphs_is_the_run_without(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses(tiny_run(), tmp_path / "plain")
    monkeypatch.setattr(refine, "uses_graph", lambda *_: True)
    monkeypatch.setattr(refine, "Graphed", Pretended)
    assert losses(tiny_run(), tmp_path / "graphed") == plain
    assert Pretended.made == 2  # one a phase
    assert len(plain) > 2 * WARM


class Shapes(TorchDispatchMode):
    """Every operation with the shapes that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(result)]
        self.seen.append((str(func), shapes))
        return result


def test_a_step_makes_the_same_shapes_whatever_its_data_and_asks_for_no_number(tiny_run: Callable[..., Any]) -> None:
    refinement = tiny_run().refinement
    refine.begin_refinement(refinement)
    work, refiner = refine.graphed(refinement.refiner, Run(), refinement.labels).work, refinement.refiner
    steps = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        views = [torch.randn(16, 3, size, size, generator=generator) for size in (16, 16, 8, 8)]
        ids = torch.arange(16) if seed else torch.zeros(16, dtype=torch.long)
        refiner.zero_grad(set_to_none=True)
        with Shapes() as shapes:
            work(views, ids, refiner.draw_choices(ids, generator))
        steps.append(shapes.seen)
    assert steps[0] == steps[1] == steps[2]
    assert not [name for name, _ in steps[0] if any(word in name for word in ON_THE_HOST)]


def test_no_tensor_of_the_graph_leaves_it() -> None:
    """The next step would overwrite it."""
    module = nn.Linear(2, 1, bias=False)
    weight = module.weight

    def work(x: list[Tensor]) -> dict[str, Tensor]:
        module(x[0]).sum().backward()
        return {"sum": x[0].sum()}

    graph = Pretended(work, module)
    monitored = []
    for step in range(WARM + 3):
        weight.grad = None
        monitored.append(graph([torch.full((2,), float(step))])["sum"])
        assert weight.grad.tolist() == [[step, step]]
    assert [value.item() for value in monitored] == [2.0 * step for step in range(WARM + 3)]


@pytest.mark.parametrize(
    ("settings", "run", "why"),
    [
        ({}, Run(), "the device is cpu, and graphs are CUDA's"),
        ({}, Run(torch.device("mps")), "the device is mps"),
        ({"micro_batch": 4}, GPU, r"the cached step \(micro_batch\)"),
        ({"checkpointing": True}, GPU, "checkpointing"),
        ({"checkpointing": "selective"}, GPU, "checkpointing"),
    ],
)
def test_a_graph_is_refused_with_the_reason(
    settings: dict[str, Any], run: Run, why: str, tiny_run: Callable[..., Any]
) -> None:
    tiny = tiny_run()
    for value in ("on", "auto", "off"):
        recipe = tiny.refinement.recipe.model_copy(update=settings | {"cuda_graphs": value})
        if value != "on":
            assert not uses_graph(recipe, tiny.refiner, run)
            continue
        with pytest.raises(InputError, match=f"cuda_graphs=on: .*{why}.*; set it to off"):
            uses_graph(recipe, tiny.refiner, run)


def test_other_encoders_are_refused_and_dropout_is_not(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_run()
    recipe = tiny.refinement.recipe.model_copy(update={"cuda_graphs": "auto"})
    assert uses_graph(recipe, tiny.refiner, GPU)
    assert not uses_graph(recipe.model_copy(update={"cuda_graphs": "off"}), tiny.refiner, GPU)
    monkeypatch.setattr(graphed, "SMALL", 16)
    assert not uses_graph(recipe, tiny.refiner, GPU)
    assert uses_graph(recipe.model_copy(update={"cuda_graphs": "on"}), tiny.refiner, GPU)
    dropping = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16, proj_drop_rate=0.1))
    refiner = refine.make_refiner(dropping, recipe)
    assert uses_graph(recipe.model_copy(update={"cuda_graphs": "on"}), refiner, GPU)  # it draws on the device
    tiny.refiner.backbone.is_plain_vit = False
    assert graphed.why_no_graph(recipe, tiny.refiner, GPU) == "the encoder is no plain ViT"
