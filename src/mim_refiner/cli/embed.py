"""``mim-refiner embed``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mim_refiner.cli.common import (
    DataOption,
    DeviceOption,
    EncoderOption,
    HeadsOption,
    JsonOption,
    KeyMapOption,
    ModelOption,
    OverwriteOption,
    QuietOption,
    execute,
    model_source,
)

FileOption = Annotated[
    str,
    typer.Option(
        "--out", metavar="FILE", help="Features, by ending: .parquet, .npy, .safetensors. The same command resumes."
    ),
]
BlockOption = Annotated[int, typer.Option("--block", help="Encoder block, from 0; -1 is the last.")]
PoolingOption = Annotated[
    Literal["cls", "mean", "patches"] | None,
    typer.Option(
        "--pooling",
        help="Class token, mean of the patch tokens, or all patch tokens. Default: what the encoder's authors pool by.",
        show_default=False,
    ),
]
NormOption = Annotated[bool, typer.Option("--norm/--no-norm", help="Apply the encoder's final norm.")]
ImageSizeOption = Annotated[
    str | None,
    typer.Option("--image-size", metavar="PIXELS", help="A side or HEIGHTxWIDTH; default: the encoder's own."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images a forward pass.")]
PrecisionOption = Annotated[
    Literal["fp32", "bf16", "auto"], typer.Option("--precision", help="Of the forward pass; auto: bf16 on a GPU.")
]
DtypeOption = Annotated[Literal["float32", "float16"], typer.Option("--dtype", help="Of the numbers in the file.")]


def embed(
    model: ModelOption,
    data: DataOption,
    out: FileOption,
    block: BlockOption = -1,
    pooling: PoolingOption = None,
    norm: NormOption = False,
    image_size: ImageSizeOption = None,
    batch_size: BatchOption = 256,
    precision: PrecisionOption = "fp32",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the features of all images of a data set to one file, with a manifest."""
    from mim_refiner.commands.embed import embed as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        data=data,
        out=out,
        block=block,
        pooling=pooling,
        norm=norm,
        image_size=image_size,
        batch_size=batch_size,
        precision=precision,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
    )
