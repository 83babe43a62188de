"""Who listens to a job: progress, messages and warnings go to a ``Reporter``.

Metric names follow ``metrics.jsonl``: ``loss``, ``loss/<block>``, ``alignment/<block>``,
``neighbor_similarity/<block>``, ``lr``, ``images_per_s``, ``knn_top1`` (a share, 0-1; shown until the next one comes).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

PER_HEAD = {"loss": "loss", "alignment": "alignment", "neighbor_similarity": "neighbour similarity"}
KNN = "knn_top1"
# What a person reads for a metric; its key is for JSON alone.
TITLES = {
    "knn_top1": "k-NN accuracy", "linear_top1": "linear probe accuracy", "attentive_top1": "attentive probe accuracy",
    "finetune_top1": "fine-tuning accuracy", "cluster_accuracy": "cluster accuracy", "nmi": "cluster NMI",
    "ami": "cluster AMI", "ari": "cluster ARI", "davies_bouldin": "Davies-Bouldin index",
    "rank": "effective rank (RankMe)", "rank_centred": "effective rank, centred",
    "consistency": "neighbour consistency", "probe_top1": "ridge probe accuracy", "miou": "mean IoU",
}  # fmt: skip
_FORMS = (
    (r"(.+)_best", "{}, best on test"),
    (r"(.+)_last1", "{}, last block"),
    (r"(.+)_last(\d+)", "{}, last {} blocks"),
    (r"(.+)_grid", "{}, best of a grid"),
    (r"(.+)_mixture", "{}, mixture of blocks"),
    (r"low_shot_(\w+)_top1", "accuracy from {} labels a class"),
    (r"finetune_(.+)pct_top1", "fine-tuning accuracy, {} % of labels"),
    (r"long_tail_(.+)_top1", "long-tail accuracy, {}"),
    (r"(robustness|shift)_(.+)_top1", "accuracy, {} {}"),
)
UNSCALED = ("rank", "rank_centred", "silhouette", "davies_bouldin")  # all other metrics are shares, shown in percent
LOG_FILE = "log.txt"


def metric_title(metric: str, *, unit: bool = False) -> str:
    """``knn_top1_last3`` in words: "k-NN accuracy, last 3 blocks"; with its ``unit``, " (%)" after shares."""
    if unit:
        return metric_title(metric) + ("" if metric in UNSCALED else " (%)")
    for pattern, words in () if metric in TITLES else _FORMS:
        if match := re.fullmatch(pattern, metric):
            return words.format(*map(metric_title, match.groups()))
    return TITLES.get(metric, metric.replace("_", " "))


_PLURAL = re.compile(
    r"\b(batch(?=es)|block|byte|channel|class(?=es)|column|deviation|epoch|file|folder|GPU|head|image|label|line|mean"
    r"|member|name|process(?=es)|register|row|step|tensor|value|view|worker)e?s\b"
)


def number_of(count: int, what: str) -> str:
    """``count`` and its noun, the first that ``what`` has in the plural: "1 column of the table", "2 columns ..."."""
    return f"{count} {_PLURAL.sub(lambda noun: noun[1], what, count=1) if count == 1 else what}"


def signed(value: float, digits: int = 1) -> str:
    """A difference: with up to two digits more where it would be shown as zero and is none."""
    digits = next((more for more in range(digits, digits + 3) if round(value, more)), digits)
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def in_points(value: float, low: float, high: float) -> str:
    """A difference of shares with its 95 % interval: "+1.2 points (95 % interval +0.3 to +2.1)"."""
    return f"{signed(100 * value)} points (95 % interval {signed(100 * low)} to {signed(100 * high)})"


class Reporter:
    """Receives what a job has to say; this one says nothing. Overwrite what you want to hear.

    Hand one to any verb: ``refine(..., reporter=MyReporter())``. Calls must be cheap: ``progress`` comes on every step.
    Without one a verb is silent, but in a notebook, where it prints lines; ``Reporter()`` silences it there too.
    """

    def phase(self, name: str, total: int) -> None:
        """Begin a phase of ``total`` steps and end the one before it; 0 means that the length is unknown."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Report that ``step`` steps of the phase are done (a resumed phase starts above 0) and the newest values."""

    def message(self, text: str) -> None:
        """Tell the user one line."""

    def warning(self, text: str) -> None:
        """Tell the user one line about something that was left out, lost or may be wrong."""
        self.message(f"warning: {text}")

    def opened(self, folder: Path) -> None:
        """The run folder is there, and this process writes in it."""

    def done(self) -> None:
        """End the display. Safe to call twice."""


@contextlib.contextmanager
def remarks(listen: Callable[[str], None] = lambda text: None, *, unless: str = "") -> Iterator[None]:
    """Inside, a remark of the package (logger "mim_refiner") is passed to ``listen``, and reaches the logger's own
    handlers once, however often it is made; one that holds ``unless`` not at all.
    """
    logger, said = logging.getLogger("mim_refiner"), set[str]()

    def new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in said or (unless and unless in text):
            return False
        said.add(text)
        listen(text)
        return True

    logger.filters.insert(0, new)  # what is left out in here is heard nowhere else
    try:
        yield
    finally:
        logger.removeFilter(new)


def listener(reporter: Reporter | None) -> Reporter:
    """The reporter given; without one, lines on stdout in a notebook, and silence elsewhere."""
    if reporter is not None:
        return reporter
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return PlainReporter(sys.stdout) if shell is not None and hasattr(shell, "kernel") else Reporter()


def _to_all(name: str) -> Any:
    def call(self: Tee, *given: Any) -> None:
        for reporter in self.reporters:
            getattr(reporter, name)(*given)

    return call


class Tee(Reporter):
    """Passes every call on to several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = list(reporters)

    phase, progress, message, warning, opened, done = map(
        _to_all, ("phase", "progress", "message", "warning", "opened", "done")
    )


class PlainReporter(Reporter):
    """Writes a line at the start of a phase, then at most one every ``interval`` seconds, and one at its end."""

    def __init__(self, stream: TextIO, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.interval, self.clock = stream, interval, clock
        self.name, self.total = "", 0
        self.values: dict[str, float] = {}
        self.first: tuple[int, float] | None = None  # step and time of the phase's first update
        self.step, self.printed_step, self.printed_at = 0, -1, 0.0

    def phase(self, name: str, total: int) -> None:
        self.done()
        self.name, self.total, self.values, self.first = name, total, {}, None
        self.step, self.printed_step, self.printed_at = 0, -1, self.clock()
        self.message(f"{name}: {total}" if total else name)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        self.step = step
        self.values.update(values)
        now = self.clock()
        if self.first is None:
            self.first = (step, now)
        if now - self.printed_at >= self.interval or step == self.total > 0:
            self._line(now)

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def done(self) -> None:
        if self.values and self.step != self.printed_step:
            self._line(self.clock())

    def _line(self, now: float) -> None:
        progress = f"{self.name} {self.step}/{self.total}" if self.total else f"{self.name} {self.step}"
        parts = [progress, *eta_parts(self.first, self.step, self.total, now), *metric_parts(self.values)]
        if self.values:
            parts.append(memory_in_use())
        self.message("  ".join(filter(None, parts)))
        self.printed_step, self.printed_at = self.step, now


class LogFile(PlainReporter):
    """``log.txt`` of a run folder: what the screen said, a time before each line; kept in mind until there is a folder.

    A later run in the same folder adds to it. A file that cannot be written costs nothing but itself.
    """

    def __init__(self, header: str) -> None:
        super().__init__(sys.stderr, interval=60.0)
        self.path: Path | None = None
        self._waiting: list[str] = []
        self.message(header)

    def message(self, text: str) -> None:
        self._waiting.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(self._waiting))  # whole lines at once
        except OSError:
            pass
        self._waiting.clear()

    def opened(self, folder: Path) -> None:
        self.path = folder / LOG_FILE
        self.message(f"run folder: {folder}")


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


def memory_in_use() -> str:
    """Memory of the GPU where one is in use, else of this process; empty where neither can be told."""
    torch = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    held = resident_bytes()
    return f"{held / 1e9:.1f} GB" if held else ""


def resident_bytes() -> int:
    """What this process holds of the host's memory; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # not Linux
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


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
    return [f"{TITLES[KNN]} {100 * values[KNN]:.1f} %" + (f" ({detail})" if detail else "")]


def number(value: float | None) -> str:
    """Format with three decimals, or a dash for a missing value."""
    return "-" if value is None else f"{value:.3f}"
