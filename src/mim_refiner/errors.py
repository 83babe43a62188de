"""The error tree. Every message is one line: what is wrong, where, and what to do about it.

The command line prints the message alone (no traceback) and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder


class MimRefinerError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 2


class InputError(MimRefinerError):
    """An argument or option is unusable."""


class DataError(MimRefinerError):
    """A data source is missing, empty, unreadable or too damaged to use."""


class WorkerError(DataError):
    """A loader process was killed, or gives no batch any more."""


class CheckpointError(MimRefinerError):
    """A checkpoint cannot be read safely, is of an unknown family, or does not cover the encoder."""


class RecipeError(MimRefinerError):
    """A recipe has an unknown key, a value out of range, or settings that contradict each other."""


class RunFolderError(MimRefinerError):
    """A run folder cannot be written, or belongs to another recipe."""


class OtherProcessError(MimRefinerError):
    """Another of a run's processes failed, or is gone; ``text`` and ``exit_code`` are those that all end with."""

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class GuardStopError(MimRefinerError):
    """The do-no-harm guard stopped the run; the best state is kept."""

    exit_code = 3


class NonFiniteLossError(MimRefinerError):
    """The loss became NaN or infinite; the message names the step, the rate and the last good checkpoint.

    ``batch``: (phase number, step) of the batch whose loss it was.
    """

    def __init__(self, text: str, batch: tuple[int, int] | None = None) -> None:
        super().__init__(text)
        self.batch = batch


def one_line(text: object, limit: int = 160) -> str:
    """The start of a text or of an error's, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def reason_of(error: Exception) -> str:
    """What went wrong, in a few words of one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = {MemoryError: "needs more memory than there is", RecursionError: "nested too deeply"}
    return known.get(type(error)) or one_line(error) or type(error).__name__


def install(extra: str) -> str:
    """The command that installs an extra into this Python: with pip where it has that, else (made by uv) with uv."""
    python = shlex.quote(sys.executable)
    # PathFinder: a look for pip through importlib.util turns setuptools' distutils off, and torch.compile needs it
    command = f"{python} -m pip install" if PathFinder.find_spec("pip") else f"uv pip install --python {python}"
    return f"{command} 'mim-refiner[{extra}]'"


def same_command(overwrite: bool) -> str:
    """What goes on with a run; with --overwrite the command that began it would delete what is kept."""
    return "the same command without --overwrite" if overwrite else "the same command"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    if len(name) > 200:  # the comparison would take minutes
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def nearest_path(text: str) -> str:
    """Return ``"; did you mean 'runs/mae'?"`` for a path that is one mistyped part away from one that exists.

    The first part that does not exist is compared with what its folder holds; an empty string when nothing is close.
    """
    parent, rest = os.path.split(os.path.expanduser(text.rstrip("/\\")))
    missing = [rest]
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
        missing.insert(0, name)
        if not name:
            return ""
    try:
        names = os.listdir(parent or ".")
    except OSError:
        return ""
    close = difflib.get_close_matches(missing[0], names, n=1, cutoff=0.6)
    guess = os.path.join(parent, *close, *missing[1:]) if close else ""
    return f"; did you mean '{guess}'?" if guess and os.path.exists(guess) else ""
