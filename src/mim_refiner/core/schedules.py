"""Learning-rate schedule and the scaling of the base rate with the batch (method section 5)."""

from __future__ import annotations

import math

from mim_refiner.errors import InputError


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, peak: float, end: float = 1e-6) -> float:
    """Return the learning rate of update ``step`` (0-based, of ``total_steps``).

    Linear to ``peak`` over ``warmup_steps`` (neither zero nor the peak itself is used), then half a cosine from the
    peak at step ``warmup_steps`` towards ``end``, which only steps at or past the end would reach.
    Raises InputError for a negative step, or a warm-up longer than the run.
    """
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise InputError(
            f"schedule: step {step}, warmup_steps {warmup_steps} and total_steps {total_steps} do not fit; "
            "need step >= 0 and 0 <= warmup_steps <= total_steps"
        )
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return end
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak + (end - peak) * (1 - math.cos(math.pi * progress)) / 2


def peak_learning_rate(base: float, batch_size: int) -> float:
    """Linear scaling rule: ``base`` is the rate for 256 images a step (all ranks together)."""
    return base * batch_size / 256
