"""What a run folder holds, read without a model. Every part may be missing: a run may have stopped early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim_refiner.errors import InputError, reason_of
from mim_refiner.files import read_json, read_yaml
from mim_refiner.report.figures import read_metrics

Json = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The parsed files of one run folder; ``results`` is {file stem: record} of single numbers in evaluation/."""

    path: Path
    name: str
    summary: Json = field(default_factory=dict)
    metrics: list[Json] = field(default_factory=list)
    results: dict[str, Json] = field(default_factory=dict)
    records: dict[str, Json] = field(default_factory=dict)  # {file stem: record with a "kind"}
    recipe: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)  # of the exported encoder
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # files left out, with the reason

    def of_kind(self, kind: str) -> dict[str, Json]:
        """{where: record} of every record of a kind, at the top of a file or inside one."""
        found: dict[str, Json] = {}
        for stem, record in self.records.items():
            _collect(record, kind, stem, found)
        return found


def read_run(path: str | Path) -> RunFiles:
    """Read a run folder (of refine, demo, pretrain, evaluate --out or analyze --out).

    A damaged file is left out and listed in ``damaged``. Raises InputError when the folder is missing or holds nothing
    to report.
    """
    path = Path(path).expanduser()
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder; give the --out folder of refine, demo or evaluate")
    results: dict[str, Json] = {}
    records: dict[str, Json] = {}
    damaged: list[str] = []

    def mapping(name: str, read: Callable[[Path], Any] = read_json) -> Json:
        try:
            value = read(path / name)
            return value if isinstance(value, dict) else {}
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever is wrong with a file costs that file
            damaged.append(f"{name}: {reason_of(error)}")
            return {}

    for file in _json_files(path):
        record = mapping(str(file.relative_to(path)))
        if "metric" in record and "value" in record:
            results[file.stem] = record
        else:
            records[file.stem] = record
    metrics = path / "metrics.jsonl"
    skipped = path / "skipped_images.txt"
    run = RunFiles(
        path=path,
        name=path.resolve().name,
        summary=mapping("summary.json"),
        metrics=read_metrics(metrics) if metrics.is_file() else [],
        results=results,
        records=records,
        recipe=mapping("recipe.yaml", read_yaml),
        environment=mapping("environment.json"),
        config=mapping("export/config.json"),
        skipped=skipped.read_text(encoding="utf-8", errors="replace").splitlines() if skipped.is_file() else [],
        damaged=damaged,
    )
    if not (run.summary or run.metrics or run.results or run.records):
        lost = f" (damaged: {'; '.join(damaged[:3])})" if damaged else ""
        raise InputError(f"{path}: holds no results to report{lost}; give the --out folder of refine, demo or evaluate")
    return run


def _collect(value: Any, kind: str, where: str, found: dict[str, Json]) -> None:
    if not isinstance(value, dict):
        return
    if value.get("kind") == kind:
        found[where] = value
        return
    for key, item in value.items():
        _collect(item, kind, key, found)


def _json_files(path: Path) -> Iterator[Path]:
    """Result files of the folder itself (analyze --out) and of evaluation/ below it."""
    for folder in (path, path / "evaluation"):
        if folder.is_dir():
            named = ("summary.json", "environment.json")
            yield from (file for file in sorted(folder.glob("*.json")) if file.name not in named)
