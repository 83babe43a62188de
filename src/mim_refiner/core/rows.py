"""Which rows of a step's batch a forward pass holds, so that random draws do not depend on how the batch is cut.

Every draw of a step is made for the whole batch of all processes; a micro-batch or a process takes its rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from mim_refiner.core.collectives import rank, world_size


@dataclass(frozen=True)
class Rows:
    """Samples ``start`` to ``stop - 1`` of a step's ``total`` samples (of all processes together)."""

    start: int
    stop: int
    total: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.count == self.total

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop - 1`` of these."""
        return Rows(self.start + start, self.start + stop, self.total)

    def take(self, drawn: Tensor) -> Tensor:
        """These rows [views*count, ...] of ``drawn`` [views*total, ...], view-major."""
        by_view = drawn.view(-1, self.total, *drawn.shape[1:])
        return by_view[:, self.start : self.stop].flatten(0, 1)


def process_rows(batch: int) -> Rows:
    """The rows of this process, of which every process has ``batch``."""
    return Rows(rank() * batch, (rank() + 1) * batch, world_size() * batch)


# Not a context variable: recomputation of activations happens in the threads of the backward pass.
_current: list[Rows | None] = [None]


def current_rows() -> Rows | None:
    """The rows that the running forward or backward pass holds; None: the whole batch."""
    return _current[0]


@contextmanager
def use_rows(rows: Rows) -> Iterator[None]:
    """Let random layers inside the block draw for the whole batch and take ``rows``."""
    before, _current[0] = _current[0], rows
    try:
        yield
    finally:
        _current[0] = before
