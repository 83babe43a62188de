"""What goes on around the steps of pre-training and refinement: resume, log, watch, save, stop.

Every random draw of a step is a function of (seed, phase, step), so a run resumed from a checkpoint repeats an
uninterrupted one to the bit on the CPU: nothing but weights, optimizer state and the position is stored.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from mim_refiner.core.collectives import decide_on_rank_0, end_together
from mim_refiner.core.run import Run
from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.core.sharding import load_full_optimizer_state
from mim_refiner.core.threads import pace_of, threads_kept
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.errors import DataError, NonFiniteLossError, WorkerError
from mim_refiner.reporting import number_of
from mim_refiner.training.guard import Guard
from mim_refiner.training.metric_log import MetricLog
from mim_refiner.training.recipe import Phase, Recipe
from mim_refiner.training.state import Position, RunFolder
from mim_refiner.training.view_pool import ViewPool

WORKER_RESTARTS = 3  # without a batch in between
# SLURM sends SIGTERM at the time limit, and before it what --signal asked for (USR1 or USR2, by habit).
STOP_SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")]


class Monitor(Protocol):
    """Online k-NN on ``size`` test images; measures "knn_top1" and more."""

    size: int

    def __call__(self) -> dict[str, float]: ...

    def warmed_up(self, folder: Path) -> None: ...  # the heads are; the run folder's log says how


@dataclass
class Loop:
    """One run in its folder. Stop signals are noted, and obeyed after the step they fall into.

    ``modules`` {file name: module} and the optimizer of the running phase are what checkpoints hold. ``monitor``
    measures at ends of epochs, ``guard`` looks at the encoder while it moves.
    """

    folder: RunFolder
    run: Run
    recipe: Recipe
    loader: TrainLoader
    modules: Mapping[str, nn.Module]
    monitor: Monitor | None = None
    guard: Guard | None = None
    finished: bool = False
    signals: list[int] = field(default_factory=list)  # that ask for a stop

    # --- the run

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Resume, and after the block the run is ``finished``. A loss in it that is not finite gets one retry in the
        life of a run: back to the last checkpoint, without that batch. Then NonFiniteLossError; KeyboardInterrupt
        for a signal after the last step.
        """
        with stops_cleanly(lambda received, frame: self.signals.append(received)), threads_kept():
            try:
                self.resume()
                yield
                end_together(bool(self.signals))
                self.finished = True
                self.run.reporter.done()
            except NonFiniteLossError as error:
                if self.folder.skipped or error.batch is None:
                    raise
                self.folder.skip(*error.batch)
                self.run.reporter.warning(f"{error}; going back to the last checkpoint once, without this batch")

    def resume(self) -> None:
        """Go to the newest whole checkpoint: ``position`` says which phase is to run, and from which step."""
        self.position, self._optimizer_state = self.folder.restore(self.modules)
        if self.position.total_step:
            self.run.reporter.message(f"resuming after step {self.position.total_step}")
        elif not decide_on_rank_0(self.folder.last.exists):
            self.folder.save(self.position, self.modules, None)  # what a first step that fails goes back to
        if self.guard:
            self.guard.begin(self.position.total_step)
        for note in self.folder.notes:
            self.run.reporter.warning(note)
        self.folder.notes.clear()

    # --- a phase

    def begin(
        self,
        number: int,
        name: str,
        phase: Phase,
        optimizer: Optimizer,
        *,
        moves_encoder: bool = True,
        spent: float = 0.0,
    ) -> None:
        """Begin phase ``number``, or go on in it with the optimizer's state. A frozen encoder's features stay the
        START's, so there the guard has nothing to look at. ``spent``: seconds of the phase's time that are gone.
        """
        self.number, self.name, self.phase, self.optimizer = number, name, phase, optimizer
        self.steps = phase.epochs * self.loader.steps_per_epoch
        self.first = self.position.step if self.position.phase == number else 0
        self.base = self.position.total_step - self.first  # steps of the phases before
        if self._optimizer_state is not None:
            load_full_optimizer_state(optimizer, self._optimizer_state)
            self._optimizer_state = None
        self.run.reporter.phase(name, self.steps)
        self.rate = partial(learning_rate, phase, self.recipe.batch_size, self.loader.steps_per_epoch)
        self.watched = self.guard if moves_encoder else None
        if self.watched and self.monitor and self.first == 0:
            self.watched.note_start_knn(self.monitor)
        self.log = MetricLog(self.run.device)
        self.began, self.left_out = monotonic(), 0
        self.limit = None if phase.max_seconds is None else max(0.0, phase.max_seconds - spent)
        self.run.reporter.progress(self.first, {})  # the speed counts from here

    def batches(self, source: ViewPool | None = None) -> Generator[tuple[int, ViewBatch], None, None]:
        """(step, batch) of the rest of the phase, from ``source`` or else from the loader. A stop signal to any rank,
        or a batch that any of them cannot have, ends all with a checkpoint.
        """
        pace = pace_of(self.phase.max_seconds, self.run.device)
        with closing(self.stream(self.base + self.first, self.base + self.steps, source)) as stream:
            for step in range(self.first, self.steps):
                problem: DataError | None = None
                try:
                    batch = next(stream)
                except DataError as error:
                    problem = error
                try:  # the one exchange about it in a step: a signal from here on waits for the next
                    end_together(bool(self.signals), problem)
                except (DataError, KeyboardInterrupt):
                    self._save_before(step)
                    raise
                late = self._late(step)
                self.left_out += late
                if late or (self.number, step) in self.folder.skipped:
                    with self.update(step):
                        continue  # no update
                started = monotonic()
                yield step, batch
                pace.note(monotonic() - started)
        pace.end()
        if self.left_out:
            self.run.reporter.warning(
                f"{self.name}: {self.left_out} of {number_of(self.steps - self.first, 'steps')} were left out to end "
                f"within {self.phase.max_seconds:.0f} s: the machine is slower than planned"
            )

    def _late(self, step: int) -> bool:
        """Whether this step's share of a limited time has passed; it is left out, so that the schedule ends in time."""
        if self.limit is None:
            return False
        ends = self.began + (step + 1 - self.first) * self.limit / self.steps
        return decide_on_rank_0(lambda: monotonic() > ends)

    def stream(self, step: int, stop: int, source: ViewPool | None = None) -> Generator[ViewBatch, None, None]:
        """Batches of the run's steps ``step`` to ``stop`` - 1, counted over all phases: each sees different crops. Dead
        or hanging loader processes are replaced: a batch is a function of its place, so nothing is lost.
        """
        restarts = 0
        while step < stop:
            epoch, start = divmod(step, self.loader.steps_per_epoch)
            try:
                for batch in (source or self.loader).epoch(epoch, start):
                    yield batch
                    step, restarts = step + 1, 0
            except WorkerError as error:
                if restarts == WORKER_RESTARTS:
                    raise
                restarts += 1
                self.run.reporter.warning(f"{error}; starting the loader anew")
                self.loader.restart()

    # --- a step

    @contextmanager
    def update(self, step: int) -> Iterator[float]:
        """Around the update of the weights, by the learning rate given. After it, where they are due: k-NN, the guard's
        look, the log line, the checkpoint.

        Before it the losses so far are asked for, in steps that something of this follows, the same on every device and
        rank; in between nobody waits for the device. Raises NonFiniteLossError, and GuardStopError.
        """
        total, last = self.base + step + 1, step + 1 == self.steps
        saves = last or (step + 1) % self.recipe.checkpoint_every == 0
        logs = last or (step + 1) % self.recipe.log_every == 0
        epoch, within = divmod(step + 1, self.loader.steps_per_epoch)
        every = self.recipe.knn_every
        monitor = self.monitor if every and within == 0 and (last or epoch % every == 0) else None
        looks = self.watched is not None and (monitor is not None or last or total % self.watched.every == 0)
        if saves or logs or monitor or looks:
            self._refuse_non_finite()
        rate = self.rate(step)
        yield rate
        if self.watched and looks:
            self.log.seen |= self.watched.check(total, monitor)
        elif monitor:
            self.log.seen |= monitor()
            if self.guard:
                self.guard.note_start_knn(lambda: self.log.seen)
        record: dict[str, Any] = {}
        if logs or monitor:
            record = {
                "phase": self.name,
                "epoch": round((step + 1) / self.loader.steps_per_epoch, 4),
                "step": step + 1,
                "total_step": total,
                **self.log.means(),
                "lr": rate,
                "images_per_s": self.log.images_per_second(),
                **self.log.seen,
            }
            self.folder.log(record)
            self.log.reset()
        self.run.reporter.progress(step + 1, record)
        if saves:
            self._save(Position(self.number + last, 0 if last else step + 1, total))

    def _save(self, position: Position) -> None:
        self.folder.save(position, self.modules, self.optimizer if position.phase == self.number else None)
        self.position = position

    def _save_before(self, step: int) -> None:
        """A checkpoint of the steps so far, if there is none: the run ends before this one."""
        if self.base + step > self.position.total_step:
            self._refuse_non_finite()
            self._save(Position(self.number, step, self.base + step))

    def _refuse_non_finite(self) -> None:
        first = self.log.first_non_finite()
        if first is None:
            return
        last = decide_on_rank_0(lambda: self.folder.last.resolve().name if self.folder.last.exists() else "none yet")
        raise NonFiniteLossError(
            f"{self.folder.path}: non-finite loss at step {first} of {self.name} (learning rate "
            f"{self.rate(first):.3g}, last good checkpoint: {last}); lower base_lr or use "
            "--set precision=fp32, with another --out",
            batch=(self.number, first),
        )


def learning_rate(phase: Phase, batch_size: int, steps_per_epoch: int, step: int) -> float:
    """Linear warm-up, then cosine to ``end_lr``; ``step`` steps of the phase are finished."""
    total = phase.epochs * steps_per_epoch
    warmup = min(round(phase.warmup_epochs * steps_per_epoch), total)
    peak = peak_learning_rate(phase.base_lr, batch_size)
    return warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=peak, end=phase.end_lr)


def step_generator(seed: int, phase: int, step: int) -> torch.Generator:
    """Generator for all draws of one step; also seeds torch's global one (drop-path, dropout)."""
    value = int(np.random.SeedSequence([seed, phase, step]).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(value)
    return torch.Generator().manual_seed(value)


@contextmanager
def stops_cleanly(handler: Callable[[int, Any], Any] = signal.default_int_handler) -> Iterator[None]:
    """Stop signals inside go to ``handler``; else each is what Ctrl-C is, KeyboardInterrupt, exit code 130."""
    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are left to the caller
        previous |= {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
