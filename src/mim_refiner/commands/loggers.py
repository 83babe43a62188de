"""Optional loggers: TensorBoard, Weights & Biases and MLflow receive what metrics.jsonl gets, when asked for by name.

Nothing is logged anywhere unless ``log`` names it, and then locally: W&B runs offline and MLflow in a file of the run
folder unless the user's own WANDB_MODE or MLFLOW_TRACKING_URI says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import yaml

from mim_refiner._version import __version__
from mim_refiner.core.processes import started_as
from mim_refiner.errors import InputError, RunFolderError, did_you_mean, install, same_command
from mim_refiner.files import dotted, read_mapping, read_yaml, reading
from mim_refiner.reporting import LogFile, Reporter, Tee, listener, remarks
from mim_refiner.settings import as_list

P = ParamSpec("P")
T = TypeVar("T")
Numbers = Mapping[str, float]

# (log the numbers of a step, counted over all phases; end with those of the finished run, none if it was interrupted)
Logger = tuple[Callable[[int, Numbers], None], Callable[[Numbers], None]]


@contextlib.contextmanager
def logging_to(names: Sequence[str], reporter: Reporter, verb: str, *, overwrite: bool = False) -> Iterator[Reporter]:
    """Give a reporter that feeds ``reporter`` and, once the run folder is there, its log.txt and the named loggers.

    Raises InputError at once for an unknown name or a package that is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"--log {name}: unknown logger{did_you_mean(name, LOGGERS)}; use {', '.join(LOGGERS)}")
        server = os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http", "databricks"))
        for module in LOGGERS[name][1][: 1 if server else None]:
            if find_spec(module) is None:
                raise InputError(f"--log {name}: {module} is not installed; install it: {install(name)}")
    if started_as().rank > 0:  # of several processes only the first one logs
        yield reporter
        return
    torch = getattr(sys.modules.get("torch"), "__version__", "none yet")
    versions = f"mim-refiner {__version__}, Python {platform.python_version()}, torch {torch}"
    log = LogFile(f"{verb}: {versions}, process {os.getpid()} on {platform.node()}")
    recorder, summary = _Recorder(list(dict.fromkeys(names))), dict[str, Any]()
    try:
        with remarks(log.warning):
            yield Tee([reporter, log, recorder])
        summary = read_mapping(recorder.out / "summary.json") if recorder.out else {}
        ended = "finished" + "".join(f"; {text.rstrip('.')}" for text in _words(summary))
    except BaseException as error:
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt) and recorder.out:
            newest = (recorder.out / "checkpoints" / "last").resolve().name.removeprefix("step-")
            if newest.isdecimal() and (steps := int(newest)):
                reporter.done()
                text = f"{recorder.out} holds the run up to step {steps}; {same_command(overwrite)} goes on from there"
                reporter.message(text)
        raise
    finally:
        log.done()
        log.message(ended)
        recorder.close(summary)


def logged(verb: Callable[P, T]) -> Callable[P, T]:
    """For a verb with a run folder: what it reports also reaches log.txt there, and the loggers that ``log`` names."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        given: dict[str, Any] = kwargs
        names, reporter = as_list(given.get("log") or ()), listener(given.get("reporter"))
        with logging_to(names, reporter, verb.__name__, overwrite=bool(given.get("overwrite"))) as told:
            return verb(*args, **given | {"reporter": told})

    return wrapped


class _Recorder(Reporter):
    """Passes training records on; display-only progress (no total_step) is none of its business."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.loggers = names, list[Logger]()
        self.out: Path | None = None

    def opened(self, folder: Path) -> None:
        """Open the loggers of the run in ``folder``."""
        self.out = folder
        if not self.names:
            return
        with reading(folder / "recipe.yaml", "use --overwrite to start anew", RunFolderError):
            recipe = dict(read_yaml(folder / "recipe.yaml"))
        self.loggers = [LOGGERS[name][0](folder, recipe) for name in self.names]

    def progress(self, step: int, values: Numbers) -> None:
        """Log a training record under its step over all phases."""
        if "total_step" not in values:
            return
        shown = {key: float(value) for key, value in values.items()
                 if isinstance(value, int | float) and key not in ("step", "total_step")}  # fmt: skip
        for log, _ in self.loggers:
            log(int(values["total_step"]), shown)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Hand the summary's numbers over and close."""
        numbers = {key.replace(".", "/"): value for key, value in dotted(summary).items()}
        for _, end in self.loggers:
            end({key: float(value) for key, value in numbers.items() if type(value) in (int, float)})


def _tensorboard(out: Path, recipe: Mapping[str, Any]) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "logs" / "tensorboard"))
    writer.add_text("recipe", "    " + yaml.safe_dump(dict(recipe), sort_keys=False).replace("\n", "\n    "))

    def log(step: int, values: Numbers) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    def end(final: Numbers) -> None:
        log(0, final)
        writer.close()

    return log, end


def _weights_and_biases(out: Path, recipe: Mapping[str, Any]) -> Logger:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    folder = out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "mim-refiner"),
        name=out.resolve().name,
        dir=str(folder),
        config=dict(recipe),
        mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),  # wandb checks it
        settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
    )

    def end(final: Numbers) -> None:
        run.summary.update(dict(final))
        run.finish()

    return lambda step, values: run.log(dict(values), step=step), end


def _mlflow(out: Path, recipe: Mapping[str, Any]) -> Logger:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    folder = (out / "logs").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"))
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mim-refiner")
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    run = client.create_run(experiment, run_name=out.resolve().name).info.run_id
    for key, value in dotted(recipe).items():
        client.log_param(run, key, str(value)[:500])

    def log(step: int | None, values: Numbers) -> None:
        for key, value in values.items():
            client.log_metric(run, key, value, step=step)

    def end(final: Numbers) -> None:
        log(None, final)
        client.set_terminated(run, "FINISHED" if final else "KILLED")

    return log, end


# name, also that of its extra: what opens it, and the modules that must be importable
LOGGERS: dict[str, tuple[Callable[[Path, Mapping[str, Any]], Logger], tuple[str, ...]]] = {
    "tensorboard": (_tensorboard, ("tensorboard",)),
    "wandb": (_weights_and_biases, ("wandb",)),
    "mlflow": (_mlflow, ("mlflow", "sqlalchemy", "alembic")),  # the last two for a file; a server needs mlflow alone
}


def _words(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the screen has from the result, after the verb."""
    for key in ("verdict", "recommendation"):
        found = summary.get(key)
        if isinstance(found, Mapping) and found.get("reason"):
            yield f"{key}: {found[key]}. {found['reason']}" if key in found else f"{key}: {found['reason']}"
