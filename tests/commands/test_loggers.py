"""Optional loggers: what reaches them, offline, and what happens where a package is missing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mim_refiner import __version__
from mim_refiner.commands import loggers
from mim_refiner.commands.loggers import logging_to
from mim_refiner.errors import InputError
from mim_refiner.reporting import Reporter


class Heard(Reporter):
    """Remembers what the display was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def phase(self, name, total):
        self.calls.append(("phase", name, total))

    def progress(self, step, metrics):
        self.calls.append(("update", step))

    def message(self, text):
        self.calls.append(("message", text))

    def done(self):
        self.calls.append(("done",))


def pretend_run(name: str, out: Path) -> Heard:
    """Log a run of two records and a summary."""
    heard = Heard()
    with logging_to([name], heard, "refine") as reporter:
        reporter.phase("warmup", 2)
        reporter.progress(1, {})  # a display's update, not a record
        assert not out.exists()  # nothing is written before the run folder is there
        out.mkdir()
        (out / "recipe.yaml").write_text("name: tiny\nheads:\n  out_dim: 8\n")
        reporter.opened(out)
        for step in (10, 20):
            record = {"phase": "warmup", "step": step, "total_step": step, "loss": 5.0 / step, "loss/2": 1.0}
            reporter.progress(step, record)
        reporter.done()
        (out / "summary.json").write_text(
            json.dumps({"after": {"knn_top1": 0.5}, "verdict": {"verdict": "better", "reason": "it rose"}})
        )
    assert heard.calls == [("phase", "warmup", 2), ("update", 1), ("update", 10), ("update", 20), ("done",)]
    log = (out / "log.txt").read_text()
    assert f"refine: mim-refiner {__version__}, Python " in log
    assert "warmup 1" not in log  # what came before the folder is kept, progress within a minute is not
    assert log.rstrip().endswith("finished; verdict: better. it rose")
    return heard


def test_without_a_run_folder_the_reporter_alone_hears(tmp_path):
    heard = Heard()
    with logging_to([], heard, "refine") as reporter:
        reporter.message("data: photos")
    assert heard.calls == [("message", "data: photos")]
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_loggers_are_refused_at_once(tmp_path, monkeypatch):
    with (
        pytest.raises(InputError, match=r"unknown logger; did you mean 'tensorboard'\?"),
        logging_to(["tensorbord"], Heard(), "refine"),
    ):
        pass
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match=r"not installed; install it: .* 'mim-refiner\[wandb\]'"),
        logging_to(["wandb"], Heard(), "refine"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_the_file_of_mlflow_needs_more_than_mlflow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "sqlalchemy" else object())
    with (
        pytest.raises(InputError, match=r"sqlalchemy is not installed; install it: .* 'mim-refiner\[mlflow\]'"),
        logging_to(["mlflow"], Heard(), "refine"),
    ):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a server keeps the records itself
    with logging_to(["mlflow"], Heard(), "refine"):
        pass


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pretend_run("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert events.Scalars("after/knn_top1")[0].value == 0.5
    assert "step" not in events.Tags()["scalars"]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pretend_run("wandb", tmp_path / "run")
    import wandb

    wandb.teardown()  # its process may write the file at its end only
    runs = list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert next(iter(runs[0].glob("*.wandb"))).stat().st_size > 0


def test_mlflow_in_a_local_file(tmp_path, monkeypatch):
    for module in ("mlflow", "sqlalchemy", "alembic"):  # mlflow-skinny alone has no file store
        pytest.importorskip(module, reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pretend_run("mlflow", tmp_path / "run")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'logs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mim-refiner")
    run = client.search_runs([experiment.experiment_id])[0]
    assert run.data.params["heads.out_dim"] == "8"
    assert run.data.metrics["after/knn_top1"] == 0.5
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")] == [
        (10, 0.5),
        (20, 0.25),
    ]


def test_the_log_has_remarks_and_how_a_run_ended(tmp_path):
    for error, said in ((InputError("no such file"), "InputError: no such file"), (KeyboardInterrupt(), "interrupted")):

        def run(error: BaseException = error) -> None:
            with logging_to([], Heard(), "refine") as reporter:
                reporter.opened(tmp_path)
                logging.getLogger("mim_refiner").warning("note: heads guessed")
                raise error

        with pytest.raises(type(error)):
            run()
        lines = (tmp_path / "log.txt").read_text().splitlines()
        assert lines[-2].endswith("  warning: note: heads guessed")
        assert lines[-1].endswith(f"  {said}")
    logging.getLogger("mim_refiner").warning("of no run")
    assert (tmp_path / "log.txt").read_text().splitlines() == lines


@pytest.mark.parametrize(("newest", "steps"), [("step-000120", 120), ("step-000000", 0), (None, 0)])
def test_an_interrupted_run_says_what_is_kept_of_it(tmp_path: Path, newest: str | None, steps: int) -> None:
    heard = Heard()
    if newest:
        (tmp_path / "checkpoints" / newest).mkdir(parents=True)
        (tmp_path / "checkpoints" / "last").symlink_to(newest)

    def stopped() -> None:
        with logging_to([], heard, "refine") as reporter:
            reporter.opened(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    kept = f"{tmp_path} holds the run up to step {steps}; the same command goes on from there"
    said = [call for call in heard.calls if call[0] == "message"]
    assert said == ([("message", kept)] if steps else [])


def test_an_interrupted_overwrite_goes_on_without_it(tmp_path: Path) -> None:
    """The very same command would delete what it is told to go on from."""
    heard = Heard()
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").symlink_to("step-000003")

    @loggers.logged
    def refine(*, overwrite: bool, reporter: Reporter) -> None:
        reporter.opened(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(overwrite=True, reporter=heard)
    said = [call[1] for call in heard.calls if call[0] == "message"]
    assert said == [f"{tmp_path} holds the run up to step 3; the same command without --overwrite goes on from there"]
