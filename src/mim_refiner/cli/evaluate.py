"""``mim-refiner evaluate``."""

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
    QuietOption,
    SeedOption,
    SetOption,
    TestOption,
    comma_list,
    execute,
    model_source,
)

Suite = Literal["quick", "paper", "dense"]

CompareAllOption = Annotated[
    list[str] | None,
    typer.Option("--compare", metavar="SRC", help="A further encoder; repeatable. Differences are it minus --model."),
]
SuiteOption = Annotated[
    Suite | None,
    typer.Option(
        "--suite",
        help="quick: knn, linear, low_shot, clustering, rank. paper: the paper's protocols and settings (hours). "
        "dense: segmentation.",
    ),
]
ProtocolsOption = Annotated[
    str | None,
    typer.Option(
        "--protocols",
        metavar="NAMES",
        help="Comma-separated: knn, linear, attentive, low_shot, clustering, rank, finetune, long_tail, robustness, "
        "segmentation. Default: knn,linear,clustering.",
    ),
]
BlocksOption = Annotated[
    str, typer.Option("--blocks", metavar="BLOCKS", help="all, or block numbers such as 8,9 or -1 (the last).")
]
PoolingOption = Annotated[
    str | None,
    typer.Option("--pooling", metavar="NAMES", help="Comma-separated: cls, mean. Default: all the encoder has."),
]
NormOption = Annotated[bool, typer.Option("--norm/--no-norm", help="Apply the encoder's final norm to the features.")]
ShiftedOption = Annotated[
    list[str] | None,
    typer.Option("--shifted", metavar="NAME=SRC", help="A test set for robustness (ImageNet-C/A/R ...); repeatable."),
]
TransferOption = Annotated[
    str | None, typer.Option("--transfer", metavar="CSV", help="Further data sets: lines name,train[,test].")
]
ResultsOption = Annotated[
    str | None, typer.Option("--out", metavar="DIR", help="Folder for the results; without it they are only printed.")
]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", metavar="DIR|off", help="Feature cache. Default: $MIM_REFINER_CACHE, or ~/.cache."),
]
CacheSizeOption = Annotated[
    str | None,
    typer.Option("--cache-size", metavar="SIZE", help="Largest size of the cache. [default: 5GB]", show_default=False),
]


def evaluate(
    model: ModelOption,
    data: DataOption,
    test: TestOption = None,
    compare: CompareAllOption = None,
    suite: SuiteOption = None,
    protocols: ProtocolsOption = None,
    blocks: BlocksOption = "-1",
    pooling: PoolingOption = None,
    norm: NormOption = False,
    shifted: ShiftedOption = None,
    transfer: TransferOption = None,
    out: ResultsOption = None,
    cache: CacheOption = None,
    cache_size: CacheSizeOption = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure an encoder by the paper's protocols, or several side by side."""
    protocol_names = comma_list(protocols, "--protocols") if protocols is not None else None
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
        suite=suite,
        protocols=protocol_names,
        blocks=blocks,
        pooling=pooling_names,
        norm=norm,
        shifted=shifted or (),
        transfer=transfer,
        out=out,
        cache=cache,
        cache_size=cache_size,
        settings=settings,
        device=device,
        seed=seed,
    )
