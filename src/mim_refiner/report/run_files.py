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
        return dict(_of_kind(self.records, kind))


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
    results, records = dict[str, Json](), dict[str, Json]()
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

    for file in (*sorted(path.glob("*.json")), *sorted((path / "evaluation").glob("*.json"))):
        if file.name not in ("summary.json", "environment.json"):
            record = mapping(str(file.relative_to(path)))
            (results if {"metric", "value"} <= record.keys() else records)[file.stem] = record
    metrics, skipped = path / "metrics.jsonl", path / "skipped_images.txt"
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


def _of_kind(records: Json, kind: str) -> Iterator[tuple[str, Json]]:
    for key, item in records.items():
        if isinstance(item, dict):
            yield from [(key, item)] if item.get("kind") == kind else _of_kind(item, kind)
