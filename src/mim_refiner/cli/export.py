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
    Literal["timm"],
    typer.Option("--format", help="timm: a folder that timm.create_model loads (config.json, model.safetensors)."),
]
CheckDataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="SRC", help="Images on which the export is compared with the encoder."),
]


def export(
    model: ModelOption,
    out: OutOption,
    format: FormatOption = "timm",  # the contract's name of the option, a builtin's name too
    data: CheckDataOption = None,
    device: DeviceOption = "auto",
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write an encoder in a format that other programs load."""
    from mim_refiner.commands.export import export as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        format=format,
        out=out,
        data=data,
        device=device,
    )
