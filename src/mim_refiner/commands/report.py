"""``report``: the HTML page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_refiner.errors import DataError, InputError
from mim_refiner.files import write_json
from mim_refiner.report.page import write_report
from mim_refiner.reporting import Reporter, listener

if TYPE_CHECKING:
    from mim_refiner.core.run import Run
    from mim_refiner.data.decode import ImageSet
    from mim_refiner.models.backbone import Backbone


def report(
    *, runs: str | PathLike[str] | Sequence[str], out: str | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Write report.html for the run folders ``runs`` from their result files; no model is loaded.

    ``out``: the HTML file (default: report.html in the run folder, in the current folder for several runs). Returns
    {"report", "runs", "bytes"}. Raises InputError for a folder without results.
    """
    reporter = listener(reporter)
    runs = list(dict.fromkeys(map(str, [runs] if isinstance(runs, str | PathLike) else runs)))
    if not runs:
        raise InputError("no run given; name at least one run folder, as in: mim-refiner report runs/photos")
    path = Path(out).expanduser() if out is not None else None
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: the report is one HTML file; name it something.html")
    written = write_report(runs, path)
    reporter.done()
    return {"report": str(written), "runs": [str(run) for run in runs], "bytes": written.stat().st_size}


def write_gallery(stages: Mapping[str, Backbone], images: ImageSet, out: Path, *, pooling: str, run: Run) -> None:
    """Measure the report's pictures, evaluation/gallery.json of ``out``; of one or two images there are none: told."""
    from mim_refiner.analysis.gallery import make_gallery  # a report alone needs no torch

    run.reporter.message("gallery: neighbours, clusters and maps for the report")
    try:
        record = make_gallery(stages, images, pooling=pooling, run=run)
    except DataError as error:
        run.reporter.message(f"no gallery: {error}")
        record = {"kind": "no gallery", "reason": str(error)}
    write_json(out / "evaluation" / "gallery.json", record)


def finish_with_report(run: Path, reporter: Reporter) -> None:
    """Write the run's own report. A fault in it never costs a finished run: it is told, and can be repeated."""
    try:
        reporter.message(f"report: {write_report([run])}")
    except Exception as error:
        reporter.warning(f"no report was written ({error}); the run is complete, try: mim-refiner report {run}")
    reporter.done()
