"""Optional loggers: TensorBoard, Weights & Biases and MLflow receive what metrics.jsonl gets, when asked for by name.

Nothing is logged anywhere unless ``log`` names it, and then locally: W&B runs offline and MLflow in a file of the run
folder unless the user's own WANDB_MODE or MLFLOW_TRACKING_URI says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import yaml

from mim_refiner.core.processes import started_as
from mim_refiner.errors import InputError, RunFolderError, did_you_mean
from mim_refiner.files import dotted, read_json, read_yaml, reading
from mim_refiner.reporting import NullReporter, Reporter, Tee

P = ParamSpec("P")
T = TypeVar("T")
Numbers = Mapping[str, float]

# (log the numbers of a step, counted over all phases; end with those of the finished run, none if it was interrupted)
Logger = tuple[Callable[[int, Numbers], None], Callable[[Numbers], None]]


@contextlib.contextmanager
def logging_to(names: Sequence[str], out: str, reporter: Reporter) -> Iterator[Reporter]:
    """Give a reporter that feeds ``reporter`` and the named loggers of the run in ``out``.

    Loggers open at the first training record, when the run folder exists. Raises InputError at once for an unknown
    name or a package that is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"--log {name}: unknown logger{did_you_mean(name, LOGGERS)}; use {', '.join(LOGGERS)}")
        server = os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http", "databricks"))
        for module in LOGGERS[name][1][: 1 if server else None]:
            if find_spec(module) is None:
                raise InputError(f"--log {name}: {module} is not installed; pip install 'mim-refiner[{name}]'")
    if not names or started_as().rank > 0:  # of several processes only the first one logs
        yield reporter
        return
    final: Numbers = {}
    recorder = _Recorder(list(dict.fromkeys(names)), Path(out))
    try:
        yield Tee([reporter, recorder])
        final = _summary(Path(out))
    finally:
        for _, end in recorder.loggers or ():
            end(final)


def logged(verb: Callable[P, T]) -> Callable[P, T]:
    """For a verb with the arguments ``log``, ``out`` and ``reporter``: what it reports also reaches the loggers."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        given: dict[str, Any] = kwargs
        names, out = given.get("log") or (), given.get("out", "")
        with logging_to(names, out, given.get("reporter") or NullReporter()) as told:
            return verb(*args, **given | {"reporter": told})

    return wrapped


class _Recorder(NullReporter):
    """A reporter that passes training records on; display-only updates (no total_step) are none of its business."""

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self.names, self.out = names, out
        self.loggers: list[Logger] | None = None

    def update(self, step: int, metrics: Numbers) -> None:
        """Log a training record under its step over all phases."""
        if "total_step" not in metrics:
            return
        if self.loggers is None:
            self.loggers = [LOGGERS[name][0](self.out, _recipe(self.out)) for name in self.names]
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        values = {key: float(value) for key, value in numbers.items() if key not in ("step", "total_step")}
        for log, _ in self.loggers:
            log(int(metrics["total_step"]), values)


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


def _recipe(out: Path) -> dict[str, Any]:
    with reading(out / "recipe.yaml", "use --overwrite to start anew", RunFolderError):
        recipe = read_yaml(out / "recipe.yaml")
    return recipe if isinstance(recipe, dict) else {}


def _summary(out: Path) -> dict[str, float]:
    """The plain numbers of summary.json by dotted name: before/knn_top1, after/knn_top1, seconds/total ..."""
    try:
        numbers = {key.replace(".", "/"): value for key, value in dotted(read_json(out / "summary.json")).items()}
    except Exception:  # a damaged file costs its numbers
        return {}
    return {key: float(value) for key, value in numbers.items() if type(value) in (int, float)}
