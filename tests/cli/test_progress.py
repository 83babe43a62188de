"""Progress: what a log file and a terminal show."""

from __future__ import annotations

import io

from rich.console import Console

from mim_refiner.cli.progress import (
    LiveReporter,
    PlainReporter,
    eta_parts,
    head_names,
    make_reporter,
    metric_parts,
    metric_table,
)
from mim_refiner.reporting import NullReporter

VALUES = {
    "loss": 9.0,
    "loss/10": 4.0,
    "loss/9": 5.0,
    "alignment/9": 0.2,
    "alignment/10": 0.4,
    "neighbor_similarity/9": 0.6,
    "images_per_s": 120.4,
    "knn_top1": 0.375,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_reporter_fits_the_stream():
    assert isinstance(make_reporter(Terminal(), quiet=True), NullReporter)
    assert isinstance(make_reporter(Terminal(), quiet=False), LiveReporter)
    assert isinstance(make_reporter(Terminal(), quiet=False, live=False), PlainReporter)
    assert isinstance(make_reporter(io.StringIO(), quiet=False), PlainReporter)


def test_plain_lines_come_at_the_interval_and_at_the_end():
    stream, now = io.StringIO(), [0.0]
    reporter = PlainReporter(stream, interval=10, clock=lambda: now[0])
    reporter.phase("refine", 100)
    for step in range(1, 26):  # one step a second
        now[0] += 1
        reporter.update(step, {"loss": float(step)})
    reporter.done()
    reporter.done()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "refine: 100",
        "refine 10/100  ETA 0:01:30  loss 10.000",
        "refine 20/100  ETA 0:01:20  loss 20.000",
        "refine 25/100  ETA 0:01:15  loss 25.000",
    ]


def test_a_resumed_phase_does_not_count_old_steps_as_speed():
    assert eta_parts((500, 0.0), 510, 520, 10.0) == ["ETA 0:00:10"]
    assert eta_parts((500, 0.0), 500, 520, 0.0) == []
    assert eta_parts(None, 5, 10, 0.0) == []


def test_heads_stand_in_the_order_of_their_blocks():
    assert head_names(VALUES) == ["9", "10"]


def test_metric_parts_name_every_quantity():
    assert metric_parts(VALUES) == [
        "loss 9.000 (9:5.000 10:4.000)",
        "alignment 0.300",
        "neighbour similarity 0.600",
        "knn_top1 37.5 %",
        "120 images/s",
    ]


def test_metric_table_has_a_row_for_each_head():
    console = Console(file=io.StringIO(), width=80)
    console.print(metric_table(VALUES))
    assert [line.split() for line in console.file.getvalue().splitlines()] == [
        ["loss", "alignment", "neighbour", "similarity"],
        ["all", "heads", "9.000", "0.300", "0.600"],
        ["block", "9", "5.000", "0.200", "0.600"],
        ["block", "10", "4.000", "0.400", "-"],
        ["knn_top1", "37.5", "%"],
    ]


def test_live_display_shows_phase_values_and_messages():
    stream = Terminal()
    reporter = LiveReporter(stream)
    reporter.update(1, {"loss": 1.0})  # before any phase: nothing to draw, and no error
    reporter.phase("warm-up", 10)
    reporter.update(5, VALUES)
    reporter.message("half [way]")
    reporter.phase("refine", 0)
    reporter.done()
    reporter.done()
    shown = stream.getvalue()
    for text in ("warm-up", "5/10", "120 images/s", "block 10", "half [way]", "refine"):
        assert text in shown
