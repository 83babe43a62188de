"""``mim-refiner inspect``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from mim_refiner.cli.common import JsonOption, show

if TYPE_CHECKING:
    from mim_refiner.types import CheckpointReport

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="Checkpoint file or timm folder.")]
TensorsOption = Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the ones left out.")]


def inspect(file: FileArgument, tensors: TensorsOption = False, as_json: JsonOption = False) -> None:
    """Say what a checkpoint is, and what becomes of every tensor in it."""
    from mim_refiner.checkpoints.load import inspect_checkpoint

    report = inspect_checkpoint(file)
    if as_json:
        show(report, as_json=True, file=sys.stdout)
    else:
        print_report(report, every_tensor=tensors, file=sys.stdout)


def print_report(report: CheckpointReport, *, every_tensor: bool, file: TextIO) -> None:
    """Print the encoder's facts, then the tensors that need attention (or all of them)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(report).items():
        facts.add_row(name, value)
    console.print(facts)

    listed = [tensor for tensor in report.tensors if every_tensor or tensor.status == "dropped"]
    if listed:
        table = Table(box=None, pad_edge=False)
        for column in ("tensor", "shape", "status", "goes to", "reason"):
            table.add_column(column)
        for tensor in listed:
            shape = "x".join(map(str, tensor.shape))
            table.add_row(tensor.name, shape, tensor.status, tensor.target or "-", tensor.reason)
        console.print(table)
    for name in report.missing:
        console.print(f"missing: {name}", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


def _facts(report: CheckpointReport) -> dict[str, str]:
    counts: dict[str, int] = {}
    for tensor in report.tensors:
        counts[tensor.status] = counts.get(tensor.status, 0) + 1
    return {
        "file": report.source,
        "family": report.family,
        "architecture": report.architecture,
        "encoder": f"{report.depth} blocks, width {report.embed_dim}, {report.num_heads} attention heads",
        "image": f"{_size(report.image_size)} px, patches of {_size(report.patch_size)} px",
        "prefix tokens": str(report.num_prefix_tokens),
        "licence": report.licence,
        "coverage": f"{100 * report.coverage:.1f} % of the encoder's tensors",
        "tensors": ", ".join(f"{count} {status}" for status, count in counts.items()) or "none",
    }


def _size(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
