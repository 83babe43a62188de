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
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import yaml

from mim_refiner.core.processes import started_as
from mim_refiner.errors import InputError, RunFolderError, did_you_mean
from mim_refiner.files import dotted, read_json, read_yaml, reading
from mim_refiner.reporting import NullReporter, Reporter, Tee

P = ParamSpec("P")
T = TypeVar("T")

# name, also that of its extra: modules that must be importable
LOGGERS = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),  # the last two for a file; a server needs mlflow alone
}


class Writer(Protocol):
    """One open logger."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of one step, counted over all phases."""

    def close(self, final: Mapping[str, float]) -> None:
        """Log the numbers of the finished run (none if it was interrupted) and end."""


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
        for module in LOGGERS[name][: 1 if server else None]:
            if find_spec(module) is None:
                raise InputError(f"--log {name}: {module} is not installed; pip install 'mim-refiner[{name}]'")
    if not names or started_as().rank > 0:  # of several processes only the first one logs
        yield reporter
        return
    recorder = _Recorder([_OPENERS[name] for name in dict.fromkeys(names)], Path(out))
    finished = False
    try:
        yield Tee([reporter, recorder])
        finished = True
    finally:
        recorder.close(finished)


def logged(verb: Callable[P, T]) -> Callable[P, T]:
    """For a verb with the arguments ``log``, ``out`` and ``reporter``: what it reports also reaches the loggers."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        given: dict[str, Any] = kwargs
        with logging_to(given.get("log") or (), given.get("out", ""), given.get("reporter") or NullReporter()) as told:
            return verb(*args, **given | {"reporter": told})

    return wrapped


class _Recorder:
    """A reporter that passes training records on; display-only updates (no total_step) are none of its business."""

    def __init__(self, openers: Sequence[Callable[[Path, Mapping[str, Any]], Writer]], out: Path) -> None:
        self.openers, self.out = openers, out
        self.writers: list[Writer] | None = None

    def phase(self, name: str, total: int) -> None:
        """Ignore: records carry their phase."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a training record under its step over all phases."""
        if "total_step" not in metrics:
            return
        if self.writers is None:
            self.writers = [opener(self.out, _recipe(self.out)) for opener in self.openers]
        values = {
            key: float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and key not in ("step", "total_step")
        }
        for writer in self.writers:
            writer.scalars(int(metrics["total_step"]), values)

    def message(self, text: str) -> None:
        """Ignore."""

    def done(self) -> None:
        """Ignore: a display ends often, a log once."""

    def close(self, finished: bool) -> None:
        """Hand the summary's numbers over and close."""
        final = _summary(self.out) if finished else {}
        for writer in self.writers or []:
            writer.close(final)
        self.writers = None


class _TensorBoard:
    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "logs" / "tensorboard"))
        self.writer.add_text("recipe", "    " + yaml.safe_dump(dict(recipe), sort_keys=False).replace("\n", "\n    "))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, final: Mapping[str, float]) -> None:
        for key, value in final.items():
            self.writer.add_scalar(key, value, 0)
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder = out / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mim-refiner"),
            name=out.resolve().name,
            dir=str(folder),
            config=dict(recipe),
            mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),  # wandb checks it
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, final: Mapping[str, float]) -> None:
        self.run.summary.update(dict(final))
        self.run.finish()


class _MLflow:
    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        folder = (out / "logs").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        self.client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mim-refiner")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.run_id = self.client.create_run(experiment, run_name=out.resolve().name).info.run_id
        for key, value in dotted(recipe).items():
            self.client.log_param(self.run_id, key, str(value)[:500])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.client.log_metric(self.run_id, key, value, step=step)

    def close(self, final: Mapping[str, float]) -> None:
        for key, value in final.items():
            self.client.log_metric(self.run_id, key, value)
        self.client.set_terminated(self.run_id, "FINISHED" if final else "KILLED")


_OPENERS: dict[str, Callable[[Path, Mapping[str, Any]], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
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
