"""``mim-refiner evaluate``."""

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
    QuietOption,
    SeedOption,
    SetOption,
    TestOption,
    comma_list,
    execute,
    model_source,
)

ProtocolsOption = Annotated[
    str, typer.Option("--protocols", metavar="NAMES", help="Comma-separated: knn, linear, clustering.")
]
BlocksOption = Annotated[
    str, typer.Option("--blocks", metavar="BLOCKS", help="all, or block numbers such as 8,9 or -1 (the last).")
]
PoolingOption = Annotated[
    str | None,
    typer.Option("--pooling", metavar="NAMES", help="Comma-separated: cls, mean. Default: all the encoder has."),
]
NormOption = Annotated[bool, typer.Option("--norm/--no-norm", help="Apply the encoder's final norm to the features.")]
ResultsOption = Annotated[
    str | None, typer.Option("--out", metavar="DIR", help="Folder for the results; without it they are only printed.")
]


def evaluate(
    model: ModelOption,
    data: DataOption,
    test: TestOption = None,
    compare: CompareOption = None,
    protocols: ProtocolsOption = "knn,linear,clustering",
    blocks: BlocksOption = "-1",
    pooling: PoolingOption = None,
    norm: NormOption = False,
    out: ResultsOption = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure frozen features: k-NN, linear probe and clustering, by block and pooling."""
    protocol_names = comma_list(protocols, "--protocols")
    pooling_names = comma_list(pooling, "--pooling") if pooling is not None else None

    from mim_refiner.commands.evaluate import evaluate as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        data=data,
        test=test,
        compare=compare,
        protocols=protocol_names,
        blocks=blocks,
        pooling=pooling_names,
        norm=norm,
        out=out,
        settings=settings,
        device=device,
        seed=seed,
    )
