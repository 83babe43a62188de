"""``mim-refiner export``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mim_refiner.cli.common import (
    DeviceOption,
    EncoderOption,
    HeadsOption,
    JsonOption,
    KeyMapOption,
    ModelOption,
    OutOption,
    QuietOption,
    execute,
    model_source,
)

FormatOption = Annotated[
    Literal["timm", "hf", "onnx", "refiner"],
    typer.Option(
        "--format",
        help="timm: a folder that timm.create_model loads. hf: one for transformers' AutoModel. onnx: a graph for "
        "onnxruntime. refiner: the state dict of the published MIM-Refiner checkpoints.",
    ),
]
BlockOption = Annotated[
    int | None,
    typer.Option("--block", help="Block that the card recommends and an ONNX graph ends at; -1 is the last."),
]
PoolingOption = Annotated[
    Literal["cls", "mean", "tokens"] | None,
    typer.Option("--pooling", help="Class token, mean of the patch tokens, or (onnx) all tokens, prefix tokens first."),
]
NormOption = Annotated[bool | None, typer.Option("--norm/--no-norm", help="With the final norm.", show_default=False)]
BatchOption = Annotated[
    str, typer.Option("--batch", metavar="dynamic|N", help="Images a run of an ONNX graph: any number, or exactly N.")
]
ImageSizeOption = Annotated[
    int | None, typer.Option("--image-size", min=1, metavar="PIXELS", help="Resize the position table to this size.")
]
CheckDataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SRC", help="Images on which the export is compared with the encoder. Default: built-in ones."
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload the folder to the Hugging Face Hub."),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="A repository made by --push-to-hub is not public.")]


def export(
    model: ModelOption,
    out: OutOption,
    format: FormatOption = "timm",  # the contract's name of the option, a builtin's name too
    block: BlockOption = None,
    pooling: PoolingOption = None,
    norm: NormOption = None,
    batch: BatchOption = "dynamic",
    image_size: ImageSizeOption = None,
    data: CheckDataOption = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    device: DeviceOption = "auto",
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write an encoder in a format that other programs load, with a model card and a measured difference."""
    from mim_refiner.commands.export import export as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        format=format,
        out=out,
        block=block,
        pooling=pooling,
        norm=norm,
        batch=batch,
        image_size=image_size,
        data=data,
        push_to_hub=push_to_hub,
        private=private,
        device=device,
    )
