"""``mim-refiner analyze``."""

from __future__ import annotations

from typing import Annotated

import typer

from mim_refiner.cli.common import (
    CompareOption,
    DataOption,
    DeviceOption,
    EncoderOption,
    HeadsOption,
    JsonOption,
    KeyMapOption,
    ModelOption,
    OutOption,
    QuietOption,
    SeedOption,
    TestOption,
    comma_list,
    execute,
    model_source,
)

PartsOption = Annotated[
    str,
    typer.Option(
        "--parts", help="atlas, verdict, readout, similarity, reconstruction, heads; comma-separated, or all."
    ),
]
CacheOption = Annotated[
    str | None, typer.Option("--cache", metavar="DIR", help="Folder of the feature cache, or 'off'.")
]


def analyze(
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    compare: CompareOption = None,
    test: TestOption = None,
    parts: PartsOption = "all",
    cache: CacheOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say which block, pooling and norm to use, and with --compare whether the second encoder is better than the first.

    Labels are used when there are any and never needed. Draws k-NN, reconstruction and similarity by block, writes
    JSON beside every figure, and looks at a subset of large data sets (printed).
    """
    from mim_refiner.commands.analyze import PARTS
    from mim_refiner.commands.analyze import analyze as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        data=data,
        out=out,
        compare=compare,
        test=test,
        parts=PARTS if parts == "all" else comma_list(parts, "--parts"),
        cache=cache,
        device=device,
        seed=seed,
    )
