"""Progress on stderr: which reporter fits the stream, and the live display of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import progress
from rich.console import Console
from rich.live import Live
from rich.table import Table

from mim_refiner import reporting
from mim_refiner.cli.tables import text_table
from mim_refiner.reporting import KNN, PER_HEAD, PlainReporter, Reporter, number, over_all_heads

BARS = "▁▂▃▄▅▆▇█"


def make_reporter(stream: TextIO, *, quiet: bool, live: bool = True) -> Reporter:
    """Choose the reporter: none when quiet, live on a terminal, else plain lines."""
    if quiet:
        return Reporter()
    return LiveReporter(stream) if live and stream.isatty() else PlainReporter(stream)


class LiveReporter(Reporter):
    """A bar with the time left, and below it a small table: one row a head, one column a quantity."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream)
        self.values: dict[str, float] = {}
        self.live: Live | None = None
        self.bar, self.started = progress.Progress(), False
        self.knn: list[float] = []  # of the whole run, over its phases

    def phase(self, name: str, total: int) -> None:
        self.done()
        known = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("ETA"),
                 progress.TimeRemainingColumn())  # fmt: skip
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            *(known if total else (progress.SpinnerColumn(), progress.TimeElapsedColumn())),
            progress.TextColumn("{task.fields[rate]}"),
        )
        self.values, self.started = {}, False
        self.bar.add_task(name, total=total or None, rate="")
        self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self._render)
        self.live.start()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        self.values.update(values)
        if KNN in values:
            self.knn.append(values[KNN])
        for task in self.bar.task_ids:  # none before the first phase
            if not self.started:  # a resumed phase starts above 0, which must not count as speed
                self.bar.reset(task, completed=step)
                self.started = True
            self.bar.update(task, completed=step)

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def done(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = None

    def _render(self) -> Table:
        view = Table.grid()
        rate = self.values.get("images_per_s")
        parts = ["" if rate is None else f"{rate:.0f} images/s", reporting.memory_in_use()]
        for task in self.bar.task_ids:
            self.bar.update(task, rate="  ".join(filter(None, parts)))
        view.add_row(self.bar)
        view.add_row(metric_table(self.values))
        if len(self.knn) > 1:
            view.add_row(f"k-NN accuracy {sparkline(self.knn)}  {100 * self.knn[0]:.1f} to {100 * self.knn[-1]:.1f} %")
        return view


def metric_table(values: Mapping[str, float]) -> Table:
    """One row for all heads and one a head (narrow enough for twelve); the last k-NN below."""
    shown = {key: title for key, title in PER_HEAD.items() if over_all_heads(values, key) is not None}
    rows = [["all heads", *(number(over_all_heads(values, key)) for key in shown)]] if shown else []
    for head in reporting.head_names(values):
        rows.append([f"block {head}", *(number(values.get(f"{key}/{head}")) for key in shown)])
    return text_table("", ("", *shown.values()), rows + [[line] for line in reporting.knn_parts(values)])


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw the newest ``width`` values as bars between their lowest and highest."""
    shown = list(values)[-width:]
    low, span = min(shown), max(shown) - min(shown)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in shown)
