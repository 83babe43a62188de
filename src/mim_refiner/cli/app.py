"""The command ``mim-refiner``: its verbs, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mim_refiner._version import __version__
from mim_refiner.cli import verbs
from mim_refiner.cli.common import broken, example
from mim_refiner.errors import MimRefinerError, did_you_mean

PROGRAM = "mim-refiner"
DEBUG_VARIABLE = "MIM_REFINER_DEBUG"

EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 1  # silently, as Python itself and typer do

# The machine's refusals, not bugs of ours: no permission, disk full, read-only disk, quota used up.
REFUSALS = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT}

_ALLOCATION = re.compile(r"can't allocate memory|Unable to allocate|Storage size calculation overflowed")
_FULL = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)|PytorchStreamWriter failed")

app = typer.Typer(
    name=PROGRAM,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=example(
        f"{PROGRAM} demo", f"{PROGRAM} refine --data photos/ --model mae_pretrain_vit_base.pth --out runs/photos"
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Refine masked-image-model encoders with nearest-neighbour alignment, and measure what it brought."""


_EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    verbs.demo: ("--out demo-out",),
    verbs.pretrain: ("--data photos/ --arch vit_small_patch16_224 --out runs/mae",),
    verbs.refine: (
        "--data photos/ --model mae_pretrain_vit_base.pth --out runs/photos",
        "--data train.parquet --model runs/mae/export --out runs/b --eval-data train.parquet",
    ),
    verbs.evaluate: (
        "--model runs/b/export --data train.parquet --test test.parquet",
        "--model runs/mae/export --compare runs/b/export --data train.parquet --blocks all",
    ),
    verbs.analyze: ("--model runs/mae/export --compare runs/b/export --data train.parquet --out curves",),
    verbs.embed: (
        "--model runs/photos --data photos/ --out features.parquet",
        "--model runs/photos --data photos/ --out patches.safetensors --block 8 --pooling patches",
    ),
    verbs.export: (
        "--model runs/photos --format timm --out photos-timm",
        "--model runs/photos --format onnx --block 8 --pooling mean --out photos-onnx",
    ),
    verbs.doctor: (
        "--data photos/ --model mae_pretrain_vit_base.pth --out checked",
        "--data train.parquet --test test.parquet",
    ),
    verbs.report: ("runs/photos", "runs/a runs/b --out comparison.html"),
    verbs.inspect: ("mae_pretrain_vit_base.pth",),
    verbs.recipes: ("", "tiny", "--key heads.queue_size"),
    verbs.models: ("", "mae_l16"),
}
EXAMPLES = {verb: [f"{PROGRAM} {verb.__name__} {line}".rstrip() for line in lines] for verb, lines in _EXAMPLES.items()}
for verb, lines in EXAMPLES.items():
    app.command(epilog=example(*lines))(verb)


@functools.cache
def parser() -> Any:
    """The verbs as click commands; typer takes a tenth of a second to make them from the signatures."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; expected failures print one line on stderr."""
    words, said = list(sys.argv[1:] if arguments is None else arguments) or ["--help"], ""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may be no UTF-8; stderr does so by itself
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = parser()(words, prog_name=PROGRAM, standalone_mode=False)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has gone; without this the interpreter complains once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except (KeyboardInterrupt, typer.Abort):
            code = EXIT_INTERRUPTED
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                traceback.print_exception(error, file=sys.stderr)
            code, text = _explain(error)
            said = f"error: {' '.join(text.split())}"
    if said or code == EXIT_INTERRUPTED:
        print(broken(said or "interrupted", sys.stderr), file=sys.stderr)
    return int(code or 0)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Ours in one line; those of libraries are no user's to mend (MIM_REFINER_DEBUG=1 shows them)."""
    if category.__module__.startswith("mim_refiner") or os.environ.get(DEBUG_VARIABLE):
        print(broken(f"warning: {' '.join(str(message).split())}", sys.stderr), file=sys.stderr)


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, MimRefinerError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):  # the parser's usage errors, whichever click typer stands on
        return EXIT_BAD_INPUT, _usage_line(error)
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in REFUSALS):
        where = f" {os.fsdecode(error.filename)!r}" if isinstance(error.filename, str | bytes) else " a file"
        return EXIT_BAD_INPUT, f"the system refused to use{where}: {error.strerror}"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return EXIT_BAD_INPUT, "there is no home folder that ~ could stand for; write the path out"
    torch = sys.modules.get("torch")  # never imported for this: without torch there is no such error
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return EXIT_BAD_INPUT, "the GPU is out of memory; use a smaller batch (--set batch_size=...) or --device cpu"
    if _FULL.search(str(error)):  # as libraries wrap the system's refusal
        again = "run the same command again (a training goes on without --overwrite)"
        return EXIT_BAD_INPUT, f"the disk is full or its quota used up; free space, then {again}"
    if isinstance(error, MemoryError) or _ALLOCATION.search(str(error)):
        asked = re.search(r"allocate (\d+) bytes", str(error))
        how = f" ({int(asked[1]) / 1e9:.1f} GB asked for at once)" if asked else ""
        return EXIT_BAD_INPUT, f"this needs more memory than the machine gives{how}; lower the sizes or give less data"
    text = f"{type(error).__name__}: {error}"
    return EXIT_BUG, f"{text} (this is a bug of {PROGRAM}; set {DEBUG_VARIABLE}=1 for the traceback)"


def _usage_line(error: Any) -> str:
    """Word a usage error in one line, with the nearest valid option or verb where one was mistyped."""
    context = getattr(error, "ctx", None)
    help_hint = f" (see {context.command_path} --help)" if context else ""
    if context and hasattr(error, "option_name"):
        known = [name for parameter in context.command.params for name in parameter.opts]
        return f"no option '{error.option_name}'{did_you_mean(error.option_name, known)}{help_hint}"
    if context and context.parent is None and "No such command" in error.message:
        typed = error.message.split("'")[1]
        return f"no verb '{typed}'{did_you_mean(typed, context.command.commands)}{help_hint}"
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    return message[:1].lower() + message[1:] + help_hint
