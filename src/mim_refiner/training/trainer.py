"""THE training loop, used by pre-training and by both phases of refinement.

Every random draw of a step is a function of (seed, phase, step), so a run resumed from a checkpoint repeats an
uninterrupted one to the bit on the CPU: nothing but weights, optimizer state and the position is stored.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.errors import NonFiniteLossError
from mim_refiner.reporting import Reporter
from mim_refiner.training.state import Position, RunFolder


@dataclass(frozen=True)
class StepOutput:
    """Loss to descend, and scalars to log."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPhase:
    """What the loop needs to know of a phase."""

    name: str
    epochs: int
    loader: TrainLoader
    learning_rate: Callable[[int], float]  # of the finished steps; groups scale it by their "lr_scale"
    begin: Callable[[], torch.optim.Optimizer]  # freezes and unfreezes, builds the optimizer
    step: Callable[[ViewBatch, torch.Generator], StepOutput]
    after_step: Callable[[], None] = lambda: None

    @property
    def steps(self) -> int:
        return self.epochs * self.loader.steps_per_epoch


@dataclass(frozen=True)
class LoopSettings:
    seed: int
    device: torch.device
    log_every: int
    checkpoint_every: int
    knn_every: int = 0


def fit(
    phases: Sequence[TrainingPhase],
    modules: Mapping[str, nn.Module],
    run: RunFolder,
    settings: LoopSettings,
    reporter: Reporter,
    monitor: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Run the phases in order from wherever ``run`` stands. ``monitor`` gives metrics at epoch ends (online k-NN).

    Raises NonFiniteLossError; KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written.
    """
    position, optimizer_state, notes = run.restore(modules)
    for note in notes:
        reporter.message(note)
    if position.total_step:
        reporter.message(f"resuming after step {position.total_step}")
    with interrupt_flag() as interrupted:
        for index, phase in enumerate(phases):
            if index < position.phase:
                continue
            optimizer = phase.begin()
            if optimizer_state is not None:
                optimizer.load_state_dict(optimizer_state)
                optimizer_state = None
            reporter.phase(phase.name, phase.steps)
            first = position.step if index == position.phase else 0
            base = position.total_step - first  # steps of the phases before
            log = MetricLog(phase, run, reporter, settings)
            log.show(first)
            epochs_before = sum(earlier.epochs for earlier in phases[:index])  # phases see different crops
            for step, batch in enumerate(batches(phase, first, epochs_before), start=first):
                rate = phase.learning_rate(step)
                set_learning_rate(optimizer, rate)
                output = phase.step(batch, step_generator(settings.seed, index, step))
                optimizer.zero_grad(set_to_none=True)
                output.loss.backward()
                log.add(output, len(batch.sample_ids))
                stop = interrupted()  # asked once: a signal from here on waits for the next step and its checkpoint
                due = (step + 1) % settings.checkpoint_every == 0 or stop or step + 1 == phase.steps
                if due or settings.device.type == "cpu" or (step + 1) % settings.log_every == 0:
                    refuse_non_finite(output.loss, phase.name, step, rate, run)
                optimizer.step()
                phase.after_step()

                epoch_end = (step + 1) % phase.loader.steps_per_epoch == 0
                extra = {}
                if (
                    epoch_end
                    and monitor
                    and settings.knn_every
                    and ((step + 1) // phase.loader.steps_per_epoch) % settings.knn_every == 0
                ):
                    extra = monitor()
                if extra or (step + 1) % settings.log_every == 0 or step + 1 == phase.steps:
                    log.flush(step, base + step + 1, rate, extra)
                if due:
                    finished = step + 1 == phase.steps
                    position = Position(index + finished, 0 if finished else step + 1, base + step + 1)
                    run.save(position, modules, None if finished else optimizer)
                if stop:
                    raise KeyboardInterrupt
            position = Position(index + 1, 0, base + phase.steps)
        if interrupted():  # after the last step's checkpoint
            raise KeyboardInterrupt
    reporter.done()


def batches(phase: TrainingPhase, first: int, epochs_before: int) -> Iterator[ViewBatch]:
    """All batches of a phase from step ``first`` on; epochs are numbered on from the phases before."""
    first_epoch, start = divmod(first, phase.loader.steps_per_epoch)
    for epoch in range(first_epoch, phase.epochs):
        yield from phase.loader.epoch(epochs_before + epoch, start if epoch == first_epoch else 0)


def step_generator(seed: int, phase: int, step: int) -> torch.Generator:
    """Generator for all draws of one step; also seeds torch's global one (drop-path, dropout)."""
    value = int(np.random.SeedSequence([seed, phase, step]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(value)
    return torch.Generator().manual_seed(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Layer decay: each group's rate is the schedule's value times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def refuse_non_finite(loss: Tensor, phase: str, step: int, rate: float, run: RunFolder) -> None:
    """Raise NonFiniteLossError before the weights take the step."""
    if not math.isfinite(loss.item()):
        last = run.last.resolve().name if run.last.exists() else "none yet"
        raise NonFiniteLossError(
            f"{run.path}: loss is {loss.item()} at step {step} of {phase} (learning rate {rate:.3g}, last good "
            f"checkpoint: {last}); lower base_lr or use --set precision=fp32"
        )


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM set a flag, read between steps, instead of tearing a step apart."""
    seen: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda received, frame: seen.append(received))
    except ValueError:  # not in the main thread: leave signals to the caller
        previous = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MetricLog:
    """Averages scalars between log lines without forcing the device to wait, and measures images/s."""

    def __init__(self, phase: TrainingPhase, run: RunFolder, reporter: Reporter, settings: LoopSettings) -> None:
        self.phase, self.run, self.reporter, self.settings = phase, run, reporter, settings
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.images = 0
        self.since = time.perf_counter()

    def show(self, step: int) -> None:
        if step:
            self.reporter.update(step, {})

    def add(self, output: StepOutput, images: int) -> None:
        for key, value in {"loss": output.loss, **output.metrics}.items():
            value = value.detach()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.steps += 1
        self.images += images

    def flush(self, step: int, total_step: int, rate: float, extra: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self.since
        means = {key: (value / self.steps).item() for key, value in self.sums.items()}
        record: dict[str, Any] = {
            "phase": self.phase.name,
            "epoch": round((step + 1) / self.phase.loader.steps_per_epoch, 4),
            "step": step + 1,
            "total_step": total_step,
            **means,
            "lr": rate,
            "images_per_s": round(self.images / seconds, 1),
            **extra,
        }
        self.run.log(record)
        self.reporter.update(step + 1, record)
        self._reset()
