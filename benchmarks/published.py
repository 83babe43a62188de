"""The published code as a side of before_after.py: names of parts on standard input, CPU seconds on standard output.

    git clone https://github.com/ml-jku/MIM-Refiner /tmp/published
    pip install --no-deps --target /tmp/published/site \\
        kappamodules kappaschedules kappadata kappaprofiler kappautils einops
    python benchmarks/before_after.py /tmp/published --published --parts step,warm-up,photographs,knn

Its own classes do the work: ContrastiveModel, ContrastiveTrainer.Model, SgdTrainer.update, OptimizerWrapper,
EmaCallback, KDMultiViewWrapper on its own list of augmentations, multiclass_knn. What is built around them here is no
more than its trainer builds from a configuration; there is no data loader, no log and no callback but the average.
Packages that none of these calls (wandb and the like) are empty modules. Checked at commit cc57423.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import re
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

UNUSED = ("wandb", "torchmetrics", "matplotlib", "fvcore", "iopath")
RATE, HEAD_DECAY, DECAY, LAYER_DECAY, AVERAGE, TEMPERATURE = 4e-4, 1e-5, 0.05, 0.65, 0.9999, 0.2


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of ``UNUSED``, empty."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


class Trial:
    """A step of the published trainer at the size of before_after.py."""

    def __init__(self, size: dict[str, Any], frozen: bool) -> None:
        from callbacks.checkpoint_callbacks.ema_callback import EmaCallback
        from losses.ssl.nnclr_loss import NnclrLoss
        from models.composite.contrastive_model import ContrastiveModel
        from trainers.base.sgd_trainer import SgdTrainer
        from trainers.contrastive_trainer import ContrastiveTrainer
        from utils.amp_utils import get_grad_scaler_and_autocast_context
        from utils.checkpoint import Checkpoint
        from utils.update_counter import UpdateCounter

        self.size, self.number, self.update = size, 0, SgdTrainer.update
        counter = UpdateCounter(Checkpoint(0, 0, 0), Checkpoint(epoch=5), 100, size["batch"])
        image = (3, size["image"], size["image"])
        self.model = ContrastiveModel(
            encoder=self.encoder(frozen),
            heads=self.heads(),
            input_shape=image,
            update_counter=counter,
            data_container=SimpleNamespace(get_dataset=lambda *_: SimpleNamespace(getdim_class=lambda: 10)),
            static_ctx={"input_shape": image},
            dynamic_ctx={},
        ).initialize(lr_scale_factor=size["batch"])
        scaler, precision = get_grad_scaler_and_autocast_context(torch.float32, torch.device("cpu"))
        self.trainer = SimpleNamespace(
            loss_functions=torch.nn.ModuleDict({name: NnclrLoss(TEMPERATURE) for name in self.model.heads}),
            loss_weight_schedules={},
            update_counter=counter,
            dataset_mode="index x class",
            grad_scaler=scaler,
            autocast_context=precision,
            logger=getLogger("published"),
        )
        self.trainer._step = types.MethodType(SgdTrainer._step, self.trainer)
        self.trainer_model = ContrastiveTrainer.Model(self.model, self.trainer)
        self.average = None if frozen else EmaCallback.__new__(EmaCallback)
        if self.average:  # without a path to write to
            self.average.model_paths, self.average.target_factors = ["encoder"], [AVERAGE]
            self.average.parameters, self.average.buffers = defaultdict(dict), defaultdict(dict)
            self.average._was_resumed = False
            self.average._before_training(model=self.model)
        draws = torch.Generator().manual_seed(0)
        sides = [size["image"]] * 2 + [size["local"]] * size["locals"]
        self.views = [torch.randn(size["batch"], 3, side, side, generator=draws) for side in sides]

    def encoder(self, frozen: bool) -> dict[str, Any]:
        match = re.fullmatch(r"vit_w(\d+)_d(\d+)_h(\d+)_p(\d+)", self.size["arch"])
        assert match
        dim, self.depth, heads, patch = map(int, match.groups())
        decay = [{"kind": "layerwise_lr_decay_modifier", "decay": LAYER_DECAY}]
        learns = {"is_frozen": True} if frozen else {"optim": adamw(DECAY) | {"param_group_modifiers": decay}}
        shape = {"dim": dim, "depth": self.depth, "num_attn_heads": heads, "mlp_hidden_dim": 4 * dim}
        return {"kind": "vit.vit", "patch_size": patch, **shape, **learns}

    def heads(self) -> dict[str, Any]:
        size, found = self.size, {}
        for block in range(self.depth - 1, self.depth - 1 - size["heads"], -1):
            pooling: dict[str, Any] = {"kind": "class_token"}
            if block < self.depth - 1:
                extractor = {"kind": "vit_block_extractor", "block_index": block}
                pooling = {"kind": "extractor_pooling", "extractor": extractor, "pooling": pooling}
            found[f"cls{block}"] = {
                "kind": "ssl.nnclr_head",
                "proj_hidden_dim": size["projector"],
                "pred_hidden_dim": size["predictor"],
                "output_dim": size["out_dim"],
                "queue_size": size["queue"],
                "queue_kwargs": {"topk": size["top_k"]},
                "pooling": pooling,
                "optim": adamw(HEAD_DECAY),
            }
        return found

    def step(self) -> None:
        """What the trainer does with a batch."""
        batch = self.size["batch"]
        ids, labels = torch.arange(batch) + self.number * batch, torch.zeros(batch, dtype=torch.long)
        self.number += 1
        self.model.optim_schedule_step()
        self.trainer_model.train()
        item = ((ids, list(self.views), labels), {})
        losses, _ = self.update(self.trainer, self.model, self.trainer_model, item, iter_step=0, accumulation_steps=1)
        self.trainer_model.eval()
        if self.average:
            self.average._track_after_update_step(model=self.model)
        assert torch.isfinite(losses["total"])


def adamw(weight_decay: float) -> dict[str, Any]:
    return {"kind": "adamw", "lr": RATE, "betas": [0.9, 0.95], "weight_decay": weight_decay}


def photographs(size: dict[str, Any], root: Path) -> Callable[[], Any]:
    """Twelve views of photographs by the published list of augmentations, stacked into batches."""
    import yaml
    from before_after import photograph
    from kappadata.datasets import KDDataset
    from kappadata.wrappers.sample_wrappers.kd_multi_view_wrapper import KDMultiViewWrapper
    from PIL import Image
    from torch.utils.data import default_collate

    listed = yaml.safe_load((root / "src/zztemplates/datasets/imagenet/train_byolaug_localviews.yaml").read_text())

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [filled(each) for each in value]
        name = re.fullmatch(r"\$\{vars\.(\w+)\}", value) if isinstance(value, str) else None
        return listed["vars"][name[1]] if name else value

    picture = Image.fromarray(photograph())

    class Pictures(KDDataset):  # type: ignore[misc]
        def getitem_x(self, index: int, ctx: Any = None) -> Image.Image:
            return picture

    views = KDMultiViewWrapper(Pictures(), configs=filled(listed["sample_wrappers"][0]["configs"]))
    return lambda: default_collate([views.getitem_x(number) for number in range(size["photographs"])])


def knn(size: dict[str, Any]) -> Callable[[], Any]:
    from knn import features
    from metrics.knn import multiclass_knn

    bank, labels = features(size["bank"], size["dim"], 0)
    tests, of_tests = features(size["tests"], size["dim"], 1)
    return lambda: multiclass_knn(bank, tests, labels, of_tests, batch_size=1024)


def serve(root: str, size: dict[str, Any]) -> None:
    """Answer names of parts on standard input with CPU seconds."""
    if not (Path(root) / "src/models/composite/contrastive_model.py").exists():
        raise SystemExit(f"{root} is no checkout of the published code; see benchmarks/published.py")
    sys.path[:0] = [f"{root}/src", f"{root}/site"]
    sys.meta_path.append(Unused())
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "step": lambda: Trial(size, frozen=False).step,
        "warm-up": lambda: Trial(size, frozen=True).step,
        "photographs": lambda: photographs(size, Path(root)),
        "knn": lambda: knn(size),
    }
    parts: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in parts:
            parts[name] = makers[name]()
        start = time.process_time()
        parts[name]()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[3]))
