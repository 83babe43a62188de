"""What the verbs share: option definitions, and the way a result reaches the user.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TextIO

import typer

from mim_refiner.cli.progress import make_reporter
from mim_refiner.cli.tables import print_result
from mim_refiner.core.processes import started_as
from mim_refiner.errors import InputError
from mim_refiner.files import json_value
from mim_refiner.reporting import remarks

IN_MANY_PROCESSES = ("demo", "evaluate", "pretrain", "refine")  # share their work; of another verb one process does all

SOURCES = "folder, .txt/.csv list, .parquet file(s), .tar shards, .npz/.npy arrays, hf:owner/name; #split, \\[a:b]"
MODELS = "checkpoint file, timm folder or timm model name"


def broken(text: str, stream: TextIO) -> str:
    """One line, broken at spaces where ``stream`` is a terminal."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False) if width > 0 else text


def names(of: typer.CallbackParam, text: str | None) -> tuple[str, ...] | None:
    """Callback of the options that take names separated by commas; raises InputError when one is empty."""
    found = tuple(name.strip() for name in (text or "").split(","))
    if text is not None and not all(found):
        raise InputError(f"{of.opts[0]} is {text!r}, which has an empty name; give names separated by single commas")
    return None if text is None else found


def option(metavar: str | None, help: str, **more: Any) -> Any:
    """What typer has to know of an option whose name is that of its parameter."""
    return typer.Option(metavar=metavar, help=help, **more)


DataOption = Annotated[str, option("SRC", f"Images: {SOURCES}.")]
ModelOption = Annotated[str, option("SRC", f"Encoder: {MODELS}.")]
EncoderOption = Annotated[str | None, option("NAME", "Which of several encoders, such as student or teacher.")]
HeadsOption = Annotated[int | None, option(None, "Attention heads, where the weights do not tell them.", min=1)]
KeyMapOption = Annotated[str | None, option("FILE", "YAML file that names the tensors of your own encoder.")]
TestOption = Annotated[str | None, option("SRC", "Test images; without it a part of --data is held out.")]
RunFolderOption = Annotated[str, option("DIR", "Run folder. The same command on the same folder resumes.")]
OutOption = Annotated[str, option("DIR", "Folder for the results.")]
RecipeOption = Annotated[str | None, option("NAME|FILE", "Recipe by name, or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; repeatable.")
]
DeviceOption = Annotated[str, option("auto|cpu|cuda|cuda:N|mps", "auto takes the CUDA GPU if there is one.")]
SeedOption = Annotated[int, option(None, "Seed of every random choice.", min=0, max=2**32 - 1)]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Start anew in a folder that holds another run; its files are replaced.")
]
ExcludeOption = Annotated[str | None, option("FILE", "Images to leave out: the list that doctor writes.")]
LogOption = Annotated[
    str | None, option("NAMES", "Further loggers, comma-separated: tensorboard, wandb, mlflow.", callback=names)
]
MemoryBudgetOption = Annotated[
    str | None,
    option(
        "SIZE|auto",
        "Memory for a step, such as 24GB; the micro-batch is chosen so that it fits. Default: what is free.",
    ),
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Only print what the run will cost: hours, memory, advice.")]
NormOption = Annotated[bool, typer.Option("--norm/--no-norm", help="Apply the encoder's final norm to the features.")]
CacheOption = Annotated[str | None, option("DIR|off", "Feature cache. Default: $MIM_REFINER_CACHE, or ~/.cache.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")]

_OF_ENCODERS = {"encoder": EncoderOption, "num_heads": HeadsOption, "key_map": KeyMapOption}
_OF_TRAINING = {
    "recipe": RecipeOption, "settings": SetOption, "device": DeviceOption, "seed": SeedOption,
    "overwrite": OverwriteOption, "exclude": ExcludeOption, "log": LogOption, "memory_budget": MemoryBudgetOption,
    "plan": PlanOption,
}  # fmt: skip
_OF_ALL = {"as_json": JsonOption, "quiet": QuietOption}
_DEFAULTS = {"device": "auto", "seed": 0, **dict.fromkeys(("overwrite", "plan", *_OF_ALL), False)}  # None for others

Declared = Callable[..., None]
Printer = Callable[[Any, TextIO], None]


def verb(printer: Printer = print_result, *, trains: bool = False) -> Callable[[Declared], Declared]:
    """Make a verb of a function that declares its options: it runs the function of the same name in ``commands``.

    The declaring function's own body comes first; it refuses what can be refused before anything slow is loaded.
    Options that many verbs share are added: those of a training (``trains``), whose recipe is checked first, those of
    how an encoder is read, where ``model`` names one, and those of all verbs. ``printer`` as of :func:`execute`.
    """

    def made(declared: Declared) -> Declared:
        name, signature = declared.__name__, inspect.signature(declared, eval_str=True)
        own = signature.parameters
        shared = _OF_TRAINING if trains else {}
        reads = _OF_ENCODERS if "model" in own and own["model"].annotation == ModelOption else {}

        @functools.wraps(declared)
        def command(*, as_json: bool, quiet: bool, **given: Any) -> None:
            arguments = {key: given[key] for key in (*own, *shared)}
            declared(**{key: given[key] for key in own})
            if trains:
                from mim_refiner.training import recipes  # mistyped ones, before timm, images and weights are loaded

                getattr(recipes, f"{name}_recipe")(given["recipe"], given["settings"] or [], image_size=0)
            run = getattr(importlib.import_module(f"mim_refiner.commands.{name}"), name)
            if reads:
                from mim_refiner.checkpoints.options import with_options

                arguments["model"] = with_options(given["model"], **{key: given[key] for key in reads})
            execute(run, as_json=as_json, quiet=quiet, printer=printer, **arguments)

        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(key), annotation=of)
            for key, of in {**shared, **reads, **_OF_ALL}.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own.values(), *added])  # type: ignore[attr-defined]
        return command

    return made


def example(*lines: str) -> str:
    """Return a help epilog that shows the lines one below the other."""
    return "\n\n".join(("Example:", *(f"  {line}" for line in lines)))


def execute(
    run: Callable[..., Any], *, as_json: bool, quiet: bool, printer: Printer = print_result, **arguments: Any
) -> None:
    """Call a verb's function ``run`` with a reporter, and print its result.

    With ``as_json`` stdout carries the JSON object alone: whatever else prints during the run goes to stderr.
    """
    place = started_as()
    speaks = place.rank == 0  # of several processes only the first one
    if place.world_size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the end of a process is told in a line of ours
        if run.__name__ not in IN_MANY_PROCESSES and not speaks:
            return  # the first one does the work, and writes
    reporter = make_reporter(sys.stderr, quiet=quiet or not speaks, live=not as_json)
    with silenced(quiet), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            result = run(**arguments, reporter=reporter)
        finally:
            reporter.done()
    if speaks:
        show(result, as_json=as_json, printer=printer)


@contextlib.contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """Keep the package's remarks (what was guessed, what counts as missed) off stderr inside the block when quiet."""
    logger = logging.getLogger("mim_refiner")
    before, logger.disabled = logger.disabled, quiet or logger.disabled
    try:
        with remarks():  # of several loads of one encoder once
            yield
    finally:
        logger.disabled = before


def show(result: Any, *, as_json: bool, printer: Printer = print_result) -> None:
    """Print a result on stdout, as JSON or as tables."""
    value = json_value(result, nonfinite=lambda _: None)
    if as_json:
        print(json.dumps(value, allow_nan=False), flush=True)
    else:
        printer(value, sys.stdout)
