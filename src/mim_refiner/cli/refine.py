"""``mim-refiner refine``."""

from __future__ import annotations

from typing import Annotated

import typer

from mim_refiner.cli.common import (
    DataOption,
    DeviceOption,
    EncoderOption,
    ExcludeOption,
    HeadsOption,
    JsonOption,
    KeyMapOption,
    LogOption,
    MemoryBudgetOption,
    ModelOption,
    OverwriteOption,
    PlanOption,
    QuietOption,
    RecipeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    check_recipe,
    comma_list,
    execute,
    model_source,
)

EvalDataOption = Annotated[
    str | None,
    typer.Option(
        "--eval-data",
        metavar="SRC",
        help="Labelled images to measure on; without them a tenth of labelled data is held out.",
    ),
]
EvalTestOption = Annotated[
    str | None,
    typer.Option("--eval-test", metavar="SRC", help="Labelled test images that go with --eval-data."),
]
HeadBlocksOption = Annotated[
    str | None,
    typer.Option(
        "--head-blocks",
        metavar="auto|last_third|8,9",
        help="Blocks that get a head; auto measures every block of the encoder first. Default: the recipe's.",
    ),
]


def refine(
    data: DataOption,
    model: ModelOption,
    out: RunFolderOption,
    recipe: RecipeOption = None,
    eval_data: EvalDataOption = None,
    eval_test: EvalTestOption = None,
    head_blocks: HeadBlocksOption = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    exclude: ExcludeOption = None,
    log: LogOption = None,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    key_map: KeyMapOption = None,
    memory_budget: MemoryBudgetOption = None,
    plan: PlanOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Refine an encoder: warm up the heads on the frozen encoder, then train everything."""
    loggers = comma_list(log, "--log") if log is not None else ()
    check_recipe("refine", recipe, settings)

    from mim_refiner.commands.refine import refine as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        data=data,
        model=model_source(model, encoder=encoder, num_heads=num_heads, key_map=key_map),
        out=out,
        recipe=recipe,
        eval_data=eval_data,
        eval_test=eval_test,
        head_blocks=head_blocks,
        settings=settings,
        device=device,
        seed=seed,
        overwrite=overwrite,
        exclude=exclude,
        log=loggers,
        memory_budget=memory_budget,
        plan=plan,
    )
