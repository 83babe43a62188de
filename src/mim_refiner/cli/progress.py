"""Progress on stderr: a live display on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mim_refiner.reporting import NullReporter, Reporter

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, TaskID
    from rich.table import Table

PER_HEAD = {"loss": "loss", "alignment": "alignment", "neighbor_similarity": "neighbour similarity"}
KNN = "knn_top1"
BARS = "▁▂▃▄▅▆▇█"


def make_reporter(stream: TextIO, *, quiet: bool, live: bool = True) -> Reporter:
    """Choose the reporter: none when quiet, live on a terminal, else plain lines."""
    if quiet:
        return NullReporter()
    if live and stream.isatty():
        return LiveReporter(stream)
    return PlainReporter(stream)


class PlainReporter:
    """Writes a line at the start of a phase, then at most one every ``interval`` seconds, and one at its end."""

    def __init__(
        self,
        stream: TextIO,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], str] | None = None,
    ) -> None:
        self.stream, self.interval, self.clock = stream, interval, clock
        self.memory = memory or memory_in_use
        self.name, self.total = "", 0
        self.values: dict[str, float] = {}
        self.first: tuple[int, float] | None = None  # step and time of the phase's first update
        self.step, self.printed_step, self.printed_at = 0, -1, 0.0

    def phase(self, name: str, total: int) -> None:
        """Begin a phase; the newest values of the one before are written if they were not."""
        self.done()
        self.name, self.total, self.values, self.first = name, total, {}, None
        self.step, self.printed_step, self.printed_at = 0, -1, self.clock()
        self.message(f"{name}: {total}" if total else name)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the newest values; write a line when the last one is ``interval`` seconds old."""
        self.step = step
        self.values.update(metrics)
        now = self.clock()
        if self.first is None:
            self.first = (step, now)
        if now - self.printed_at >= self.interval or step == self.total:
            self._line(now)

    def message(self, text: str) -> None:
        """Write the text."""
        print(text, file=self.stream, flush=True)

    def done(self) -> None:
        """Write the newest values if they were not written yet."""
        if self.values and self.step != self.printed_step:
            self._line(self.clock())

    def _line(self, now: float) -> None:
        progress = f"{self.name} {self.step}/{self.total}" if self.total else f"{self.name} {self.step}"
        parts = [progress, *eta_parts(self.first, self.step, self.total, now), *metric_parts(self.values)]
        if self.values:
            parts += [part for part in [self.memory()] if part]
        self.message("  ".join(parts))
        self.printed_step, self.printed_at = self.step, now


class LiveReporter:
    """A bar with the time left, and below it a small table: one row a head, one column a quantity."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.console = Console(file=stream)
        self.values: dict[str, float] = {}
        self.live: Live | None = None
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.total, self.started = 0, False
        self.knn: list[float] = []  # of the whole run, over its phases

    def phase(self, name: str, total: int) -> None:
        """Begin a phase below the finished display of the one before."""
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.done()
        rate = TextColumn("{task.fields[rate]}")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            rate,
        )
        self.values, self.total, self.started = {}, total, False
        self.task = self.progress.add_task(name, total=total or None, rate="")
        self.live = Live(console=self.console, refresh_per_second=2, get_renderable=self._render)
        self.live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the newest values; the display redraws by itself."""
        self.values.update(metrics)
        if KNN in metrics:
            self.knn.append(metrics[KNN])
        if self.progress is None or self.task is None:
            return
        if not self.started:  # a resumed phase starts above 0, which must not count as speed
            self.progress.reset(self.task, total=self.total or None, completed=step)
            self.started = True
        rate = self.values.get("images_per_s")
        parts = ["" if rate is None else f"{rate:.0f} images/s", memory_in_use()]
        self.progress.update(self.task, completed=step, rate="  ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """Write the text above the display."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def done(self) -> None:
        """Leave the last state on the screen."""
        if self.live is not None:
            self.live.stop()
        self.live = self.progress = self.task = None

    def _render(self) -> Table:
        from rich.table import Table

        view = Table.grid()
        if self.progress is not None:
            view.add_row(self.progress)
        view.add_row(metric_table(self.values))
        if len(self.knn) > 1:
            view.add_row(f"k-NN so far {sparkline(self.knn)}  {100 * self.knn[0]:.1f} to {100 * self.knn[-1]:.1f} %")
        return view


def metric_table(values: Mapping[str, float]) -> Table:
    """One row for all heads and one a head (narrow enough for twelve); the last k-NN below."""
    from rich.table import Table

    shown = {key: title for key, title in PER_HEAD.items() if over_all_heads(values, key) is not None}
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in shown.values():
        table.add_column(title, justify="right")
    if shown:
        table.add_row("all heads", *(number(over_all_heads(values, key)) for key in shown))
    for head in head_names(values):
        table.add_row(f"block {head}", *(number(values.get(f"{key}/{head}")) for key in shown))
    for line in knn_parts(values):
        table.add_row(line)
    return table


def metric_parts(values: Mapping[str, float]) -> list[str]:
    """Return the values as short texts for one line; the loss of every head stands in brackets."""
    parts = []
    heads = head_names(values)
    for key, title in PER_HEAD.items():
        overall = over_all_heads(values, key)
        if overall is None:
            continue
        detail = " ".join(f"{head}:{number(values.get(f'{key}/{head}'))}" for head in heads) if key == "loss" else ""
        parts.append(f"{title} {overall:.3f}" + (f" ({detail})" if detail else ""))
    parts += knn_parts(values)
    if "images_per_s" in values:
        parts.append(f"{values['images_per_s']:.0f} images/s")
    return parts


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw the newest ``width`` values as bars between their lowest and highest."""
    shown = list(values)[-width:]
    low, span = min(shown), max(shown) - min(shown)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in shown)


def memory_in_use() -> str:
    """Memory of the GPU where one is in use, else of this process; empty where neither can be told."""
    torch = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return ""
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


def eta_parts(first: tuple[int, float] | None, step: int, total: int, now: float) -> list[str]:
    """Return the time left, from the speed since the phase's first update; nothing while it is unknown."""
    if first is None or step <= first[0] or not total or step >= total:
        return []
    seconds = round((total - step) * (now - first[1]) / (step - first[0]))
    return [f"ETA {seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"]


def head_names(values: Iterable[str]) -> list[str]:
    """Return the heads named in keys such as ``loss/6``, in the order of their blocks."""
    names = {key.split("/", 1)[1] for key in values if key.split("/", 1)[0] in PER_HEAD and "/" in key}
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def over_all_heads(values: Mapping[str, float], key: str) -> float | None:
    """Return the value itself where it is given (the loss: a sum over heads), else the mean of ``key/<head>``."""
    if key in values:
        return values[key]
    each = [value for name, value in values.items() if name.startswith(f"{key}/")]
    return sum(each) / len(each) if each else None


def knn_parts(values: Mapping[str, float]) -> list[str]:
    """Return the k-NN accuracy with those of single blocks in brackets, as at most one text."""
    if KNN not in values:
        return []
    blocks = sorted(int(key.split("/")[1]) for key in values if key.startswith(f"{KNN}/"))
    detail = " ".join(f"{block}:{100 * values[f'{KNN}/{block}']:.1f}" for block in blocks)
    return [f"{KNN} {100 * values[KNN]:.1f} %" + (f" ({detail})" if detail else "")]


def number(value: float | None) -> str:
    """Format with three decimals, or a dash for a missing value."""
    return "-" if value is None else f"{value:.3f}"
