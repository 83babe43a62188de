"""The verbs: what each one takes; ``commands`` has what they do, ``tables`` how they print it."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer
import yaml

from mim_refiner.cli.common import (
    CacheOption,
    DataOption,
    DeviceOption,
    EncoderOption,
    HeadsOption,
    JsonOption,
    KeyMapOption,
    ModelOption,
    NormOption,
    OutOption,
    OverwriteOption,
    RecipeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    TestOption,
    names,
    option,
    show,
    verb,
)
from mim_refiner.cli.tables import catalogue_parts, print_findings, print_first_screen, print_report, write_parts
from mim_refiner.errors import CheckpointError


@verb(print_first_screen)
def demo(
    out: OutOption = "demo-out",
    minutes: Annotated[float, option("N", "Time for the demo's own work; more is a better live run.")] = 4.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps only: shows that everything runs.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Refine a small masked autoencoder on real images in minutes, offline, and compare before and after."""


@verb(trains=True)
def pretrain(
    data: DataOption,
    out: RunFolderOption,
    arch: Annotated[str | None, option("TIMM_NAME", "A new ViT of timm, by its model name.")] = None,
    model: Annotated[str | None, option("SRC", "Go on from this ViT instead of a new one.")] = None,
) -> None:
    """Pre-train a masked autoencoder on images without labels, to refine it afterwards."""


@verb(trains=True)
def refine(
    data: DataOption,
    model: ModelOption,
    out: RunFolderOption,
    eval_data: Annotated[
        str | None, option("SRC", "Labelled images to measure on; without them a tenth of labelled data is held out.")
    ] = None,
    eval_test: Annotated[str | None, option("SRC", "Labelled test images that go with --eval-data.")] = None,
    head_blocks: Annotated[
        str | None,
        option(
            "auto|last_third|8,9",
            "Blocks that get a head; auto measures every block of the encoder first. Default: the recipe's.",
        ),
    ] = None,
) -> None:
    """Refine an encoder: warm up the heads on the frozen encoder, then train everything."""


@verb()
def evaluate(
    model: ModelOption,
    data: DataOption,
    test: TestOption = None,
    compare: Annotated[
        list[str] | None, option("SRC", "A further encoder; repeatable. Differences are it minus --model.")
    ] = None,
    suite: Annotated[
        Literal["quick", "paper", "dense"] | None,
        option(
            None,
            "quick: knn, linear, low_shot, clustering, rank. paper: the paper's protocols and settings (hours). "
            "dense: segmentation.",
        ),
    ] = None,
    protocols: Annotated[
        str | None,
        option(
            "NAMES",
            "Comma-separated: knn, linear, attentive, low_shot, clustering, rank, finetune, long_tail, "
            "robustness, segmentation. Default: knn,linear,clustering.",
            callback=names,
        ),
    ] = None,
    blocks: Annotated[str, option("BLOCKS", "all, or block numbers such as 8,9 or -1 (the last).")] = "-1",
    pooling: Annotated[
        str | None, option("NAMES", "Comma-separated: cls, mean. Default: all the encoder has.", callback=names)
    ] = None,
    norm: NormOption = False,
    shifted: Annotated[
        list[str] | None, option("NAME=SRC", "A test set for robustness (ImageNet-C/A/R ...); repeatable.")
    ] = None,
    transfer: Annotated[str | None, option("CSV", "Further data sets: lines name,train[,test].")] = None,
    out: Annotated[str | None, option("DIR", "Folder for the results; without it they are only printed.")] = None,
    cache: CacheOption = None,
    cache_size: Annotated[str | None, option("SIZE", "Largest size of the cache. Default: 5GB.")] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Measure an encoder by the paper's protocols, or several side by side."""


@verb()
def analyze(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    compare: Annotated[
        str | None, option("SRC", "A second encoder (after --model); differences are second minus first.")
    ] = None,
    test: TestOption = None,
    parts: Annotated[
        str,
        option(
            None, "atlas, verdict, readout, similarity, reconstruction, heads; comma-separated, or all.", callback=names
        ),
    ] = "all",
    cache: CacheOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Say which block, pooling and norm to use, and with --compare whether the second encoder is better than the first.

    Labels are used when there are any and never needed. Draws k-NN, reconstruction and similarity by block, writes
    JSON beside every figure, and looks at a subset of large data sets (printed).
    """


@verb()
def embed(
    model: ModelOption,
    data: DataOption,
    out: Annotated[str, option("FILE", "Features, by ending: .parquet, .npy, .safetensors. The same command resumes.")],
    block: Annotated[int, option(None, "Encoder block, from 0; -1 is the last.")] = -1,
    pooling: Annotated[
        Literal["cls", "mean", "patches"] | None,
        option(
            None,
            "Class token, mean of the patch tokens, or all patch tokens. Default: what the encoder's authors pool by.",
            show_default=False,
        ),
    ] = None,
    norm: NormOption = False,
    image_size: Annotated[str | None, option("PIXELS", "A side or HEIGHTxWIDTH; default: the encoder's own.")] = None,
    batch_size: Annotated[int, option(None, "Images a forward pass.", min=1)] = 256,
    precision: Annotated[
        Literal["fp32", "bf16", "auto"], option(None, "Of the forward pass; auto: bf16 on a GPU.")
    ] = "fp32",
    dtype: Annotated[Literal["float32", "float16"], option(None, "Of the numbers in the file.")] = "float32",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Write the features of all images of a data set to one file, with a manifest."""


@verb()
def export(
    model: ModelOption,
    out: OutOption,
    format: Annotated[  # the contract's name of the option, a builtin's name too
        Literal["timm", "hf", "onnx", "refiner"],
        option(
            None,
            "timm: a folder that timm.create_model loads. hf: one for transformers' AutoModel. onnx: a graph for "
            "onnxruntime. refiner: the state dict of the published MIM-Refiner checkpoints.",
        ),
    ] = "timm",
    block: Annotated[
        int | None, option(None, "Block that the card recommends and an ONNX graph ends at; -1 is the last.")
    ] = None,
    pooling: Annotated[
        Literal["cls", "mean", "tokens"] | None,
        option(None, "Class token, mean of the patch tokens, or (onnx) all tokens, prefix tokens first."),
    ] = None,
    norm: Annotated[
        bool | None, typer.Option("--norm/--no-norm", help="With the final norm.", show_default=False)
    ] = None,
    batch: Annotated[str, option("dynamic|N", "Images a run of an ONNX graph: any number, or exactly N.")] = "dynamic",
    image_size: Annotated[int | None, option("PIXELS", "Resize the position table to this size.", min=1)] = None,
    data: Annotated[
        str | None, option("SRC", "Images on which the export is compared with the encoder. Default: built-in ones.")
    ] = None,
    push_to_hub: Annotated[str | None, option("OWNER/NAME", "Upload the folder to the Hugging Face Hub.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A repository made by --push-to-hub is not public.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Write an encoder in a format that other programs load, with a model card and a measured difference."""


@verb(print_findings)
def doctor(
    data: DataOption,
    model: Annotated[str | None, option("SRC", "Encoder to check too: coverage, memory, disk, time.")] = None,
    test: Annotated[str | None, option("SRC", "Test images: none of them may be among --data.")] = None,
    out: Annotated[str | None, option("DIR", "Folder for doctor.json and exclude.txt (for refine --exclude).")] = None,
    recipe: RecipeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Check images (and an encoder) before a run: damaged, odd, duplicate and leaked images, classes, cost."""


@verb()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; several are compared on one page.")],
    out: Annotated[str | None, option("FILE", "The HTML file. Default: report.html in the run folder.")] = None,
) -> None:
    """Write one offline HTML page of a run, or of several side by side, from their result files."""


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Checkpoint file, timm or Hugging Face folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the ones left out.")] = False,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    image_size: Annotated[str | None, option("H[xW]", "Pixels in training, where the table does not tell.")] = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is, and what becomes of every tensor in it.

    Exit code 2, with the line that every verb ends with, when it cannot be loaded as asked.
    """
    from mim_refiner.checkpoints.load import inspect_checkpoint
    from mim_refiner.checkpoints.options import parse_size

    size = None if image_size is None else parse_size(image_size)
    report = inspect_checkpoint(file, encoder=encoder, num_heads=num_heads, image_size=size, key_map=key_map)
    if as_json:
        show(report, as_json=True)
    else:
        print_report(report, sys.stdout, every_tensor=tensors)
    if report.problem:
        raise CheckpointError(report.problem)


def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this model in full.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List published encoders that --model takes by name, with what they learned from and their licence."""
    from mim_refiner.commands.models import models as list_models

    found = list_models(name=name)
    if as_json:
        show(found, as_json=True)
    elif name is None:
        write_parts(sys.stdout, catalogue_parts(found["models"]))
    else:  # a size or hash that nobody states is not shown
        known = {key: value for key, value in found.items() if value != "unknown" or key == "licence"}
        show(known, as_json=False)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show all settings of this recipe.")] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="KEY", help="Explain this setting.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes, print one (as YAML, to change and give to --recipe), or explain a setting."""
    from mim_refiner.commands.recipes import recipes as list_recipes

    found = list_recipes(name=name, key=key)
    if "settings" in found and not as_json:
        print(yaml.safe_dump(found["settings"], sort_keys=False, width=64), end="")
        return
    if "values" in found and not as_json:
        having: dict[str, list[str]] = {}
        for recipe, value in found["values"].items():
            having.setdefault(str(value), []).append(recipe)
        found["values"] = [f"{value} in {', '.join(recipes)}" for value, recipes in having.items()]
    show(found, as_json=as_json)
