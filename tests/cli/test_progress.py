"""Progress: what a log file and a terminal show."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

from rich.console import Console

from mim_refiner import reporting
from mim_refiner.cli.progress import LiveReporter, make_reporter, metric_table, sparkline
from mim_refiner.reporting import (
    LogFile,
    PlainReporter,
    Reporter,
    Tee,
    eta_parts,
    head_names,
    listener,
    memory_in_use,
    metric_parts,
)

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
    assert type(make_reporter(Terminal(), quiet=True)) is Reporter
    assert isinstance(make_reporter(Terminal(), quiet=False), LiveReporter)
    assert isinstance(make_reporter(Terminal(), quiet=False, live=False), PlainReporter)
    assert isinstance(make_reporter(io.StringIO(), quiet=False), PlainReporter)


def test_plain_lines_come_at_the_interval_and_at_the_end(monkeypatch):
    monkeypatch.setattr(reporting, "memory_in_use", lambda: "1.5 GB")
    stream, now = io.StringIO(), [0.0]
    reporter = PlainReporter(stream, interval=10, clock=lambda: now[0])
    reporter.phase("refine", 100)
    for step in range(1, 26):  # one step a second
        now[0] += 1
        reporter.progress(step, {"loss": float(step)})
    reporter.done()
    reporter.done()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "refine: 100",
        "refine 10/100  ETA 0:01:30  loss 10.000  1.5 GB",
        "refine 20/100  ETA 0:01:20  loss 20.000  1.5 GB",
        "refine 25/100  ETA 0:01:15  loss 25.000  1.5 GB",
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
        "k-NN accuracy 37.5 %",
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
        ["k-NN", "accuracy", "37.5", "%"],
    ]


def test_live_display_shows_phase_values_and_messages():
    stream = Terminal()
    reporter = LiveReporter(stream)
    reporter.progress(1, {"loss": 1.0})  # before any phase: nothing to draw, and no error
    reporter.phase("warm-up", 10)
    reporter.progress(5, VALUES)
    reporter.message("half [way]")
    reporter.phase("refine", 0)
    reporter.done()
    reporter.done()
    shown = stream.getvalue()
    for text in ("warm-up", "5/10", "120 images/s", "block 10", "half [way]", "refine"):
        assert text in shown


def test_the_sparkline_goes_from_lowest_to_highest():
    assert sparkline([0.1, 0.2, 0.3]) == "▁▅█"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert len(sparkline(list(range(100)))) == 40


def test_memory_is_told_in_gigabytes():
    assert memory_in_use().endswith(" GB") or memory_in_use() == ""


def test_the_live_display_shows_every_quantity():
    terminal = Terminal()
    reporter = LiveReporter(terminal)
    reporter.console.width = 120
    reporter.phase("refinement", 20)
    reporter.progress(10, {"loss": 3.0, "loss/9": 3.0, "alignment/9": 0.4, "images_per_s": 88.0, "knn_top1": 0.41})
    reporter.progress(20, {"loss": 2.0, "loss/9": 2.0, "knn_top1": 0.45})
    reporter.done()
    shown = terminal.getvalue()
    for words in (
        "refinement",
        "20/20",
        "ETA",
        "88 images/s",
        "GB",
        "block 9",
        "alignment",
        "k-NN accuracy ",
        "41.0 to 45.0 %",
    ):
        assert words in shown, words


def test_calls_reach_every_reporter(monkeypatch):
    monkeypatch.setattr(reporting, "memory_in_use", lambda: "")
    heard = [PlainReporter(io.StringIO()) for _ in range(2)]
    tee = Tee(heard)
    tee.phase("a", 2)
    tee.progress(2, {"loss": 1.0})
    tee.message("hello")
    tee.done()
    assert [reporter.stream.getvalue().splitlines() for reporter in heard] == [
        ["a: 2", "a 2/2  loss 1.000", "hello"]
    ] * 2


def test_progress_moves_with_every_step_also_before_the_first_values_come():
    stream, now = io.StringIO(), [0.0]
    reporter = PlainReporter(stream, interval=10, clock=lambda: now[0])
    reporter.phase("warm-up", 4)
    reporter.progress(0, {})
    for step in (1, 2, 3):  # slow steps, no log line yet
        now[0] += 15
        reporter.progress(step, {})
    assert stream.getvalue().splitlines()[1:] == [
        "warm-up 1/4  ETA 0:00:45",
        "warm-up 2/4  ETA 0:00:30",
        "warm-up 3/4  ETA 0:00:15",
    ]


def test_a_log_file_waits_for_its_folder_and_is_added_to(tmp_path):
    for begin in ("refine: version 1", "refine: version 2"):
        log = LogFile(begin)
        log.message("data: photos")
        assert (tmp_path / "log.txt").exists() == (begin == "refine: version 2")
        log.opened(tmp_path)
        log.phase("warm-up", 2)
        log.progress(2, {"loss": 1.0})
        log.warning("one image is left out \ud800")
        log.done()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 12
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in lines)
    said = [line[21:] for line in lines[6:]]
    assert said[:2] == ["refine: version 2", "data: photos"]
    assert said[3:5] == ["warm-up: 2", said[4]]
    assert said[4].startswith("warm-up 2/2  loss 1.000")
    assert said[5] == "warning: one image is left out \\ud800"


def test_a_log_that_cannot_be_written_costs_nothing_else(tmp_path):
    log = LogFile("refine")
    log.opened(tmp_path / "gone")
    log.message("data: photos")


def test_notebooks_hear_progress_and_programs_do_not(monkeypatch):
    own = Reporter()
    assert listener(own) is own
    assert type(listener(None)) is Reporter
    for kernel, heard in ((True, PlainReporter), (False, Reporter)):
        shell = SimpleNamespace(kernel=None) if kernel else SimpleNamespace()
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert type(listener(None)) is heard
