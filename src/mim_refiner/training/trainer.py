"""THE training loop, used by pre-training and by both phases of refinement.

Every random draw of a step is a function of (seed, phase, step), so a run resumed from a checkpoint repeats an
uninterrupted one to the bit on the CPU: nothing but weights, optimizer state and the position is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mim_refiner.core.collectives import agree, average_gradients, broadcast_state, world_size
from mim_refiner.core.sharding import load_full_optimizer_state
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.errors import DataError, NonFiniteLossError, WorkerError
from mim_refiner.reporting import Reporter
from mim_refiner.training.guard import Guard
from mim_refiner.training.signals import interrupt_flag
from mim_refiner.training.state import Position, RunFolder

WORKER_RESTARTS = 3  # without a batch in between


@dataclass(frozen=True)
class StepOutput:
    """What a step that left its gradients in the parameters has to tell: the loss, and scalars to log."""

    loss: Tensor  # without graph
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPhase:
    """What the loop needs to know of a phase."""

    name: str
    epochs: int
    loader: TrainLoader
    learning_rate: Callable[[int], float]  # of the finished steps; groups scale it by their "lr_scale"
    begin: Callable[[], torch.optim.Optimizer]  # freezes and unfreezes, builds the optimizer
    step: Callable[[ViewBatch, torch.Generator], StepOutput]  # forward and backward pass
    after_step: Callable[[], None] = lambda: None
    moves_encoder: bool = True  # else its features stay those of the start

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
    guard: Guard | None = None,
) -> None:
    """Run the phases in order from wherever ``run`` stands. ``monitor`` gives metrics at epoch ends (online k-NN).

    A loss that is not finite gets one retry in the life of a run: back to the last checkpoint, without that batch.
    Raises NonFiniteLossError the second time; GuardStopError; DataError, with a checkpoint written; KeyboardInterrupt
    after a stop signal, with a checkpoint written.
    """
    loop = _Loop(phases, modules, run, settings, reporter, monitor, guard)
    with interrupt_flag() as interrupted:
        while True:
            try:
                loop.go_on(interrupted)
                break
            except NonFiniteLossError as error:
                if run.skipped or error.batch is None:
                    raise
                run.skip(*error.batch)
                reporter.message(f"{error}; going back to the last checkpoint once, without this batch")
    reporter.done()


class _Loop:
    def __init__(
        self,
        phases: Sequence[TrainingPhase],
        modules: Mapping[str, nn.Module],
        run: RunFolder,
        settings: LoopSettings,
        reporter: Reporter,
        monitor: Callable[[], dict[str, float]] | None,
        guard: Guard | None,
    ) -> None:
        self.phases, self.modules, self.run, self.settings = phases, modules, run, settings
        self.reporter, self.monitor, self.guard = reporter, monitor, guard

    def go_on(self, interrupted: Callable[[], bool]) -> None:
        """From the newest whole checkpoint to the end."""
        position, optimizer_state, notes = self.run.restore(self.modules)
        broadcast_state(self.modules.values())
        for note in notes:
            self.reporter.message(note)
        if position.total_step:
            self.reporter.message(f"resuming after step {position.total_step}")
        elif not self.run.last.exists():
            self.run.save(position, self.modules, None)  # what a first step that fails goes back to
        if self.guard:
            self.guard.begin(position.total_step)
        for index, phase in enumerate(self.phases):
            if index >= position.phase:
                optimizer = phase.begin()
                if optimizer_state is not None:
                    load_full_optimizer_state(optimizer, optimizer_state)
                    optimizer_state = None
                position = self.one_phase(index, position, optimizer, interrupted)
        if any_rank(interrupted()):  # after the last step's checkpoint
            raise KeyboardInterrupt

    def one_phase(
        self, index: int, position: Position, optimizer: torch.optim.Optimizer, interrupted: Callable[[], bool]
    ) -> Position:
        phase, settings = self.phases[index], self.settings
        self.reporter.phase(phase.name, phase.steps)
        first = position.step if index == position.phase else 0
        base = position.total_step - first  # steps of the phases before
        if self.guard and self.monitor and phase.moves_encoder and first == 0 and self.guard.needs_start_knn:
            self.guard.note_start_knn(self.monitor()["knn_top1"])
        log = MetricLog(phase, self.run, self.reporter, settings)
        log.show(first)
        losses = FiniteLosses(index, phase.name, self.run, settings.device)
        saved = position.total_step
        epochs_before = sum(earlier.epochs for earlier in self.phases[:index])  # phases see different crops
        with closing(batches(phase, first, epochs_before, self.reporter)) as stream:
            for step in range(first, phase.steps):
                try:
                    batch = next(stream)
                except DataError:
                    if step + base > saved:
                        self.run.save(Position(index, step, base + step), self.modules, optimizer)
                    raise
                rate = phase.learning_rate(step)
                set_learning_rate(optimizer, rate)
                optimizer.zero_grad(set_to_none=True)
                skipped = (index, step) in self.run.skipped
                if not skipped:
                    output = phase.step(batch, step_generator(settings.seed, index, step))
                    average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
                    log.add(output, len(batch.sample_ids) * world_size())
                    losses.add(output.loss, step, rate)
                # asked once: a signal from here on waits for the next step and its checkpoint
                stop = any_rank(interrupted())
                finished = step + 1 == phase.steps
                due = (step + 1) % settings.checkpoint_every == 0 or stop or finished
                if due or settings.device.type == "cpu" or (step + 1) % settings.log_every == 0:
                    losses.check()
                if not skipped:
                    optimizer.step()
                    phase.after_step()

                measured = self.measure(phase, step, base, finished, log)
                if measured or (step + 1) % settings.log_every == 0 or finished:
                    log.flush(step, base + step + 1, rate)
                if due:
                    position = Position(index + finished, 0 if finished else step + 1, base + step + 1)
                    self.run.save(position, self.modules, None if finished else optimizer)
                    saved = position.total_step
                if stop:
                    raise KeyboardInterrupt
        return Position(index + 1, 0, base + phase.steps)

    def measure(self, phase: TrainingPhase, step: int, base: int, finished: bool, log: MetricLog) -> bool:
        """Online k-NN at the ends of epochs and the guard's look at the features, for the next line of ``log``.

        Returns whether k-NN was measured, which makes a line due.
        """
        epoch, within = divmod(step + 1, phase.loader.steps_per_epoch)
        knn_due = self.settings.knn_every and within == 0 and epoch % self.settings.knn_every == 0
        monitor = self.monitor if knn_due else None
        total_step = base + step + 1
        if self.guard and phase.moves_encoder:
            if monitor or self.guard.due(total_step, phase_end=finished):
                log.seen.update(self.guard.check(total_step, monitor))
        elif monitor:
            log.seen.update(monitor())
            if self.guard:
                self.guard.note_start_knn(log.seen["knn_top1"])
        return monitor is not None


def batches(
    phase: TrainingPhase, first: int, epochs_before: int, reporter: Reporter
) -> Generator[ViewBatch, None, None]:
    """All batches of a phase from step ``first`` on; epochs are numbered on from the phases before.

    Dead or hanging loader processes are replaced: a batch is a function of its place, so nothing is lost.
    """
    step, restarts = first, 0
    while step < phase.steps:
        epoch, start = divmod(step, phase.loader.steps_per_epoch)
        try:
            for batch in phase.loader.epoch(epochs_before + epoch, start):
                yield batch
                step, restarts = step + 1, 0
        except WorkerError as error:
            if restarts == WORKER_RESTARTS:
                raise
            restarts += 1
            reporter.message(f"{error}; starting the loader anew")
            phase.loader.restart()


def step_generator(seed: int, phase: int, step: int) -> torch.Generator:
    """Generator for all draws of one step; also seeds torch's global one (drop-path, dropout)."""
    value = int(np.random.SeedSequence([seed, phase, step]).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(value)
    return torch.Generator().manual_seed(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Layer decay: each group's rate is the schedule's value times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: a signal rarely reaches all of them within one step."""
    return bool(agree(float(flag)))


class FiniteLosses:
    """Remembers the first step whose loss was not finite without making the device wait for the question."""

    def __init__(self, index: int, phase: str, run: RunFolder, device: torch.device) -> None:
        self.index, self.phase, self.run = index, phase, run
        self.first = torch.full((), torch.inf, device=device)
        self.rate = 0.0

    def add(self, loss: Tensor, step: int, rate: float) -> None:
        here = torch.where(torch.isfinite(loss), torch.inf, float(step)).to(self.first)
        self.first = torch.minimum(self.first, here)
        self.rate = rate

    def check(self) -> None:
        """Raise NonFiniteLossError; on a CPU before the weights take the step."""
        first = agree(self.first.item(), largest=False)
        if first == torch.inf:
            return
        last = self.run.last.resolve().name if self.run.last.exists() else "none yet"
        raise NonFiniteLossError(
            f"{self.run.path}: non-finite loss at step {int(first)} of {self.phase} (learning rate {self.rate:.3g}, "
            f"last good checkpoint: {last}); lower base_lr or use --set precision=fp32",
            batch=(self.index, int(first)),
        )


class MetricLog:
    """Averages scalars between log lines without forcing the device to wait, and measures images/s."""

    def __init__(self, phase: TrainingPhase, run: RunFolder, reporter: Reporter, settings: LoopSettings) -> None:
        self.phase, self.run, self.reporter, self.settings = phase, run, reporter, settings
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.images = 0
        self.seen: dict[str, float] = {}  # k-NN and the guard's measures since the last line
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

    def flush(self, step: int, total_step: int, rate: float) -> None:
        seconds = time.perf_counter() - self.since
        means = {key: (value / self.steps).item() for key, value in self.sums.items()}
        record: dict[str, Any] = {
            "phase": self.phase.name,
            "epoch": round((step + 1) / self.phase.loader.steps_per_epoch, 4),
            "step": step + 1,
            "total_step": total_step,
            **mean_over_ranks(means),
            "lr": rate,
            "images_per_s": round(self.images / seconds, 1),
            **self.seen,
        }
        self.run.log(record)
        self.reporter.update(step + 1, record)
        self._reset()


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of every number over ranks; all ranks hold the same names."""
    if world_size() == 1:
        return dict(values)
    summed = torch.tensor(list(values.values()), dtype=torch.float64)
    torch.distributed.all_reduce(summed)
    return dict(zip(values, (summed / world_size()).tolist(), strict=True))
