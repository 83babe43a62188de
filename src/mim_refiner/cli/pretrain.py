"""``mim-refiner pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from mim_refiner.cli.common import (
    DataOption,
    DeviceOption,
    ExcludeOption,
    JsonOption,
    LogOption,
    MemoryBudgetOption,
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
)


def pretrain(
    data: DataOption,
    out: RunFolderOption,
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="TIMM_NAME", help="A new ViT of timm, by its model name.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="SRC", help="Go on from this ViT instead of a new one.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    exclude: ExcludeOption = None,
    log: LogOption = None,
    memory_budget: MemoryBudgetOption = None,
    plan: PlanOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pre-train a masked autoencoder on images without labels, to refine it afterwards."""
    loggers = comma_list(log, "--log") if log is not None else ()
    check_recipe("pretrain", recipe, settings)

    from mim_refiner.commands.pretrain import pretrain as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        data=data,
        arch=arch,
        model=model,
        out=out,
        recipe=recipe,
        settings=settings,
        device=device,
        seed=seed,
        overwrite=overwrite,
        exclude=exclude,
        log=loggers,
        memory_budget=memory_budget,
        plan=plan,
    )
