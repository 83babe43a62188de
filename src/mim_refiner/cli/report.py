"""``mim-refiner report``."""

from __future__ import annotations

from typing import Annotated

import typer

from mim_refiner.cli.common import JsonOption, QuietOption, execute

RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run folders; several are compared on one page.")
]
PageOption = Annotated[
    str | None,
    typer.Option("--out", metavar="FILE", help="The HTML file. Default: report.html in the run folder."),
]


def report(runs: RunsArgument, out: PageOption = None, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Write one offline HTML page of a run, or of several side by side, from their result files."""
    from mim_refiner.commands.report import report as run

    execute(run, as_json=as_json, quiet=quiet, runs=runs, out=out)
