"""The cases of checkpoint files: what is right for each, and the check.

Right is: tokens of every block within 1e-5 of the expected ones (of their largest value where that is above 1), or one
true line that says what to do; in loading and in ``inspect`` alike (same verdict, same exit code).
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.checkpoints.options import with_options
from mim_refiner.cli.app import main
from mim_refiner.errors import MimRefinerError
from mim_refiner.models.backbone import Backbone

TOLERANCE = 1e-5
IMAGENET, CLIP = (0.485, 0.456, 0.406), (0.48145466, 0.4578275, 0.40821073)


@dataclass(frozen=True)
class Loads:
    """The file gives the tokens under ``tokens`` in expected.pt; "" = those of common.vit_state()."""

    file: str
    tokens: str = "blocks"
    images: str = "images"
    options: dict[str, Any] = field(default_factory=lambda: {"num_heads": 4})
    facts: dict[str, Any] = field(default_factory=dict)  # of info


@dataclass(frozen=True)
class Refused:
    """The file is refused in one line that the pattern is found in."""

    file: str
    pattern: str
    options: dict[str, Any] = field(default_factory=lambda: {"num_heads": 4})


@dataclass(frozen=True)
class Agrees:
    """No right tokens exist: it loads (always, with facts), or is refused in one line; ``inspect`` says the same."""

    file: str
    options: dict[str, Any] = field(default_factory=lambda: {"num_heads": 4})
    facts: dict[str, Any] = field(default_factory=dict)  # of info


NONE: dict[str, Any] = {}
PRITHVI: dict[str, Any] = {"family": "prithvi", "in_chans": 6, "image_size": (16, 16), "position_rule": "corners"}
EXPECTED: dict[str, list[Loads | Refused | Agrees]] = {
    # The file's own arguments say 32x128; the caller may say it too.
    "01": [
        Loads("maerec.pth"),
        Loads("maerec.pth", options={"num_heads": 4, "image_size": "32x128"}),
        Refused("maerec.pth", r"--num-heads", NONE),
    ],
    # 192 wide is 3 or 12 heads: asked for. TinyMIM's heads differ by block, which a key map can say.
    "02": [
        Refused("mae_lite_tiny.pth.tar", r"3 or 12.*--num-heads", NONE),
        Loads("mae_lite_tiny.pth.tar", "heads12", options={"num_heads": 12}),
        Loads("mae_lite_tiny.pth.tar", "heads3", options={"num_heads": 3}),
        Loads("mae_lite_tiny.pth.tar", "heads6_last12", options={"key_map": "num_heads: [6,6,6,6,6,6,6,6,6,6,6,12]"}),
    ],
    "03": [Loads("scalemae.pth")],
    "04": [Loads("pretrain.pth"), Loads("finetune.pth")],
    "05": [Loads("plain.pth"), Loads("epoch.pth")],
    "06": [Loads(name) for name in ("mae_p4.pth", "mae_p4_legacy.pth", "mae_p3.pth")],
    "07": [Loads(name, options=NONE) for name in ("sharded", "whole", "sharded/model.safetensors.index.json")],
    "08": [Loads("ckpt", "")],
    "09": [
        Loads("mp_rank_00_model_states.pt"),
        Refused("zero_pp_rank_0_mp_rank_00_model_states.pt", r"ZeRO.*zero_to_fp32"),
    ],
    "10": [Loads(name) for name in ("plain.ckpt", "omega.ckpt", "paths.ckpt")],
    "11": [Loads("dtensor.pth", "")],
    "12": [
        Loads(f"cache/models--someone--mae{rest}", options=NONE)
        for rest in ("", "/snapshots/0123abc", "/snapshots/0123abc/vit_l", "/snapshots/0123abc/vit_l/model.safetensors")
    ],
    "13": [Loads("hub_reg4.pth", "reg4"), Loads("hub.pth"), Loads("teacher_checkpoint.pth")],
    "14": [
        Refused("satmae_groups.pth", "SatMAE with groups of channels"),
        Refused("satmae_temporal.pth", "temporal SatMAE"),
        *(Agrees(name, facts=PRITHVI) for name in ("prithvi.pt", "prithvi_100M.pt")),
    ],
    "15": [Loads("beit", "beit", options=NONE), Loads("swin", "swin", options=NONE)],
    "16": [
        Loads("hf_vit", options=NONE, facts={"mean": (0.5,) * 3, "num_heads": 12, "norm_eps": 1e-3}),
        Loads("hf_vit/model.safetensors", options=NONE, facts={"mean": (0.5,) * 3, "num_heads": 12, "norm_eps": 1e-3}),
    ],
    "17": [Agrees("multimae.pth", facts={"family": "multimae", "pooling": "mean", "image_size": (16, 16)})],
    "18": [Refused("vitpose.pth", "ViTPose with patches of 4x4")],
    "19": [Loads("linprobe.pth")],
    "20": [
        Refused("peft", r"LoRA.*facebook/vit-mae-base", NONE),
        Loads("lora.pth", ""),
        Refused("int8.safetensors", r"8-bit"),
    ],
    "21": [Loads("hiera_64", "stages", options=NONE), Agrees("hiera_224", NONE, {"image_size": (224, 224)})],
    "23": [
        Refused("hiera.safetensors", "Hiera"),
        Refused("swin.safetensors", "Swin"),
        Refused("deit.safetensors", "DeiT"),
    ],
    "24": [
        Loads(f"{name}.ckpt", "teacher")
        for name in ("lightly", "solo", "dinov3_lightning", "gram_only", "moco", "emaenc", "avg")
    ],
    "25": [
        *(Agrees(name, NONE, {"pooling": "mean"}) for name in ("timm_beit", "timm_eva02", "beit.pth")),
        Agrees("mae_ft.pth", facts={"pooling": "mean"}),
    ],
    "26": [Loads("cae.pth", "cae", facts={"mean": IMAGENET}), Loads("b13_mae.pth", "b13", "images13")],
    "27": [Refused("cloned", "Git LFS", NONE), Refused("page.pth", "web page", NONE)],
    "28": [
        Refused("audiomae.pth", r"image_size.* 512 positions"),
        Loads("audiomae.pth", "audio", "x", {"num_heads": 4, "image_size": "256x32"}),
        Refused("msm_mae.pth", r"66 entries.*image_size"),
        Loads("msm_mae.pth", "msm", "y", {"num_heads": 4, "image_size": "20x52"}),
    ],
    "29": [Agrees("beit_args.pth", facts={"mean": IMAGENET}), Agrees("eva01.pt", facts={"mean": CLIP})],
    "30": [Loads("eva01.pt", "eva"), Loads("hf_beit", "hf", options=NONE)],
    "31": [
        Agrees(name, NONE, {"num_prefix_tokens": 0})
        for name in ("xcit_nano_12_p16_224", "cait_xxs24_224", "aimv2_large_patch14_224")
    ],
    "32": [Refused("own.pth", "layers.0", {"key_map": "first.yaml"})],
    "34": [
        Refused("module.pth", r"torch\.load\(.*weights_only=False.*state_dict", NONE),
        Refused("script.pt", r"TorchScript.*torch\.jit\.load", NONE),
    ],
}


def check(cases: Path, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Try every case (or those whose names start as given); yields (case, what, fault or "")."""
    for folder in sorted(path for path in cases.iterdir() if (path / "make.py").exists()):
        if names and not folder.name.startswith(tuple(names)):
            continue
        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / folder.name
            _make(folder / "make.py", made)
            for trial in EXPECTED[folder.name.split("-")[0]]:
                shown = " ".join(f"{name}={value}" for name, value in trial.options.items())
                what = f"{type(trial).__name__.lower()} {trial.file} {shown}".strip()
                yield folder.name, what, _fault(made, trial, folder.parent)


def _make(script: Path, target: Path) -> None:
    arguments = sys.argv
    sys.argv = [str(script), str(target)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = arguments


def _fault(made: Path, trial: Loads | Refused | Agrees, cases: Path) -> str:
    source = with_options(str(made / trial.file), **_with_key_map(trial.options, made))
    code, line = _inspect(source)
    try:
        backbone = load_backbone(source)
    except MimRefinerError as error:
        return _fault_of_refusal(str(error), trial, code, line)
    except Exception as error:
        return f"loading ends in {type(error).__name__}: {error}"
    if isinstance(trial, Refused):
        return "is loaded"
    if code:
        return f"is loaded, but inspect ends with {code}: {line}"
    wrong = [f"{n} is {getattr(backbone.info, n)}" for n, v in _facts(trial).items() if getattr(backbone.info, n) != v]
    if wrong:
        return ", ".join(wrong)
    return _fault_of_tokens(backbone, trial, made, cases) if isinstance(trial, Loads) else ""


def _facts(trial: Loads | Refused | Agrees) -> dict[str, Any]:
    return {} if isinstance(trial, Refused) else trial.facts


def _with_key_map(options: dict[str, Any], made: Path) -> dict[str, Any]:
    """A key map given as text is written to a file."""
    text = options.get("key_map")
    if text is None:
        return options
    path = made / str(text)
    if not str(text).endswith(".yaml"):
        path = made / "map.yaml"
        path.write_text(text)
    return {**options, "key_map": path}


def _inspect(source: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["inspect", source])
    return code, err.getvalue().strip()


def _fault_of_refusal(text: str, trial: Loads | Refused | Agrees, code: int, line: str) -> str:
    if isinstance(trial, Loads) or _facts(trial):
        return f"is refused: {text}"
    if code != 2 or len(line.splitlines()) != 1:
        return f"loading refuses it ({text}), inspect ends with {code}: {line}"
    if "\n" in text or line != f"error: {text}":
        return f"inspect says '{line}', loading '{text}'"
    if isinstance(trial, Refused) and not re.search(trial.pattern, text):
        return f"'{trial.pattern}' is not in: {text}"
    return ""


def _fault_of_tokens(backbone: Backbone, trial: Loads, made: Path, cases: Path) -> str:
    if trial.tokens:
        expected = torch.load(made / "expected.pt", weights_only=True)
        images, wanted = expected[trial.images], expected[trial.tokens]
    else:
        common = runpy.run_path(str(cases / "common.py"))
        images = common["images"]()
        wanted = common["vit_tokens"](common["vit_state"](), images, 4)
    with torch.inference_mode():
        blocks = backbone.forward_blocks(images)
    if len(blocks) != len(wanted):
        return f"has {len(blocks)} blocks instead of {len(wanted)}"
    for number, (block, tokens) in enumerate(zip(blocks, wanted, strict=True)):
        got = block.patches
        tolerance = TOLERANCE * max(1.0, tokens.abs().max().item())
        if tokens.ndim == 4:  # NCHW
            tokens = tokens.flatten(2).transpose(1, 2)
        elif tokens.shape[1] > got.shape[1]:
            if block.cls is not None and (block.cls - tokens[:, 0]).abs().max() > tolerance:
                return f"block {number}: the class token is off"
            tokens = tokens[:, tokens.shape[1] - got.shape[1] :]
        difference = (got - tokens).abs().max().item() if got.shape == tokens.shape else float("inf")
        if not difference <= tolerance:
            return f"block {number} is off by {difference:.2g} (shapes {tuple(got.shape)}, {tuple(tokens.shape)})"
    return ""
