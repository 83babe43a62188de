"""``mim-refiner inspect``."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Annotated, Any, TextIO

import typer

from mim_refiner.cli.common import EncoderOption, HeadsOption, JsonOption, KeyMapOption, show
from mim_refiner.cli.tables import text_table, write_parts
from mim_refiner.errors import CheckpointError
from mim_refiner.reporting import number_of
from mim_refiner.types import CheckpointReport

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="Checkpoint file, timm or Hugging Face folder.")]
TensorsOption = Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the ones left out.")]
SizeOption = Annotated[
    str | None, typer.Option("--image-size", metavar="H[xW]", help="Pixels in training, where the table does not tell.")
]
_LISTED = 30  # tensors left out that are shown without --tensors


def inspect(
    file: FileArgument,
    tensors: TensorsOption = False,
    encoder: EncoderOption = None,
    num_heads: HeadsOption = None,
    image_size: SizeOption = None,
    key_map: KeyMapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is, and what becomes of every tensor in it.

    Exit code 2, with the line that every verb ends with, when it cannot be loaded as asked.
    """
    from mim_refiner.checkpoints.load import inspect_checkpoint
    from mim_refiner.checkpoints.options import parse_size

    size = None if image_size is None else parse_size(image_size)
    report = inspect_checkpoint(file, encoder=encoder, num_heads=num_heads, image_size=size, key_map=key_map)
    if as_json:
        show(report, as_json=True)
    else:
        print_report(report, every_tensor=tensors, file=sys.stdout)
    if report.problem:
        raise CheckpointError(report.problem)


def print_report(report: CheckpointReport, *, every_tensor: bool, file: TextIO) -> None:
    """Print the encoder's facts, then the tensors that need attention (or all of them)."""
    listed = [tensor for tensor in report.tensors if every_tensor or tensor.status == "dropped"]
    shown = listed if every_tensor else listed[:_LISTED]
    rows = [[each.name, "x".join(map(str, each.shape)), each.status, each.target or "-", each.reason] for each in shown]
    tensors = text_table("", ("tensor", "shape", "status", "goes to", "reason"), rows, names=5)
    more = f"... and {len(listed) - len(shown)} more left out; --tensors lists all"
    parts: list[Any] = [text_table("", (), [*map(list, _facts(report).items())]), *(["", tensors] if shown else [])]
    parts += [more] if len(listed) > len(shown) else []
    parts += [f"missing: {name}" for name in report.missing] + [f"note: {note}" for note in report.notes]
    write_parts(file, parts)


def _facts(report: CheckpointReport) -> dict[str, str]:
    heads = number_of(report.num_heads, "attention heads") if report.num_heads else "attention heads not told"
    channels = number_of(report.in_chans, "channels")
    size, patch = ("x".join(map(str, pair)) for pair in (report.image_size, report.patch_size))
    mean, std = (f"({' '.join(f'{value:g}' for value in values)})" for values in (report.mean, report.std))
    counts = Counter(tensor.status for tensor in report.tensors)
    class_token = "class token" if report.has_cls else "no class token"
    count = report.num_prefix_tokens - report.has_cls
    registers = f", {number_of(count, 'registers')}" if count else ""
    return {
        "file": report.source,
        "family": report.family,
        "architecture": report.architecture,
        "encoder": f"{report.encoder}: {number_of(report.depth, 'blocks')}, width {report.embed_dim}, {heads}",
        "image": f"{size} px, patches of {patch} px, {channels}",
        "tokens": f"{class_token}{registers}; pooling {report.pooling}",
        "mean, std": f"{mean}, {std}",
        "licence": report.licence,
        "coverage": f"{100 * report.coverage:.1f} % of the encoder's tensors",
        "tensors": ", ".join(f"{count} {status}" for status, count in counts.items()) or "none",
    }
