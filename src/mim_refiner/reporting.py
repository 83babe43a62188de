"""How long jobs report progress without knowing who listens.

Training and evaluation take a ``Reporter``; the command line passes one that draws on the terminal, a Python caller
usually passes nothing and gets ``NullReporter``.

Metric names follow ``metrics.jsonl``: ``loss``, ``loss/<block>``, ``alignment/<block>``,
``neighbor_similarity/<block>``, ``lr``, ``images_per_s``, ``knn_top1`` (a share, 0-1; shown until the next one comes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Reporter(Protocol):
    """Receiver of progress. Calls must be cheap: a training loop may call ``update`` on every step."""

    def phase(self, name: str, total: int) -> None:
        """Begin a phase of ``total`` steps and end the one before it; 0 means that the length is unknown."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that ``step`` steps of the phase are done (a resumed phase starts above 0) and the newest values."""

    def message(self, text: str) -> None:
        """Tell the user one line."""

    def done(self) -> None:
        """End the display. Safe to call twice."""


class NullReporter:
    """A reporter that says nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignore."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ignore."""

    def message(self, text: str) -> None:
        """Ignore."""

    def done(self) -> None:
        """Ignore."""


class Tee:
    """Passes every call on to several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = list(reporters)

    def phase(self, name: str, total: int) -> None:
        """Begin the phase everywhere."""
        for reporter in self.reporters:
            reporter.phase(name, total)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the newest values to all."""
        for reporter in self.reporters:
            reporter.update(step, metrics)

    def message(self, text: str) -> None:
        """Tell all."""
        for reporter in self.reporters:
            reporter.message(text)

    def done(self) -> None:
        """End every display."""
        for reporter in self.reporters:
            reporter.done()
