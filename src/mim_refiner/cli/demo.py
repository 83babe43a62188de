"""``mim-refiner demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from mim_refiner.cli.common import DeviceOption, JsonOption, OutOption, QuietOption, SeedOption, execute


def demo(
    out: OutOption = "demo-out",
    minutes: Annotated[
        float, typer.Option("--minutes", metavar="N", help="Time for the demo's own work; more is a better live run.")
    ] = 4.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps only: shows that everything runs.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Refine a small masked autoencoder on real images in minutes, offline, and compare before and after."""
    from mim_refiner.cli.tables import print_first_screen
    from mim_refiner.commands.demo import demo as run

    execute(
        run,
        as_json=as_json,
        quiet=quiet,
        printer=print_first_screen,
        out=out,
        minutes=minutes,
        smoke=smoke,
        device=device,
        seed=seed,
    )
