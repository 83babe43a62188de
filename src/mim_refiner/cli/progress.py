"""Progress on stderr: which reporter fits the stream, and the live display of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from mim_refiner.reporting import (
    KNN,
    PER_HEAD,
    PlainReporter,
    Reporter,
    head_names,
    knn_parts,
    memory_in_use,
    number,
    over_all_heads,
)

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, TaskID
    from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"


def make_reporter(stream: TextIO, *, quiet: bool, live: bool = True) -> Reporter:
    """Choose the reporter: none when quiet, live on a terminal, else plain lines."""
    if quiet:
        return Reporter()
    if live and stream.isatty():
        return LiveReporter(stream)
    return PlainReporter(stream)


class LiveReporter(Reporter):
    """A bar with the time left, and below it a small table: one row a head, one column a quantity."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.console = Console(file=stream)
        self.values: dict[str, float] = {}
        self.live: Live | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.total, self.started = 0, False
        self.knn: list[float] = []  # of the whole run, over its phases

    def phase(self, name: str, total: int) -> None:
        from rich import progress
        from rich.live import Live

        self.done()
        known = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("ETA"),
                 progress.TimeRemainingColumn())  # fmt: skip
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            *(known if total else (progress.SpinnerColumn(), progress.TimeElapsedColumn())),
            progress.TextColumn("{task.fields[rate]}"),
        )
        self.values, self.total, self.started = {}, total, False
        self.task = self.bar.add_task(name, total=total or None, rate="")
        self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self._render)
        self.live.start()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        self.values.update(values)
        if KNN in values:
            self.knn.append(values[KNN])
        if self.bar is None or self.task is None:
            return
        if not self.started:  # a resumed phase starts above 0, which must not count as speed
            self.bar.reset(self.task, total=self.total or None, completed=step)
            self.started = True
        self.bar.update(self.task, completed=step)

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def done(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = self.bar = self.task = None

    def _render(self) -> Table:
        from rich.table import Table

        view = Table.grid()
        if self.bar is not None and self.task is not None:
            rate = self.values.get("images_per_s")
            parts = ["" if rate is None else f"{rate:.0f} images/s", memory_in_use()]
            self.bar.update(self.task, rate="  ".join(part for part in parts if part))
            view.add_row(self.bar)
        view.add_row(metric_table(self.values))
        if len(self.knn) > 1:
            view.add_row(f"k-NN accuracy {sparkline(self.knn)}  {100 * self.knn[0]:.1f} to {100 * self.knn[-1]:.1f} %")
        return view


def metric_table(values: Mapping[str, float]) -> Table:
    """One row for all heads and one a head (narrow enough for twelve); the last k-NN below."""
    from mim_refiner.cli.tables import text_table

    shown = {key: title for key, title in PER_HEAD.items() if over_all_heads(values, key) is not None}
    rows = [["all heads", *(number(over_all_heads(values, key)) for key in shown)]] if shown else []
    rows += [[f"block {head}", *(number(values.get(f"{key}/{head}")) for key in shown)] for head in head_names(values)]
    return text_table("", ("", *shown.values()), rows + [[line] for line in knn_parts(values)])


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw the newest ``width`` values as bars between their lowest and highest."""
    shown = list(values)[-width:]
    low, span = min(shown), max(shown) - min(shown)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in shown)
