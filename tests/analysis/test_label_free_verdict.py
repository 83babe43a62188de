"""The three words of the label-free verdict, from features made by hand, over seeds."""

from __future__ import annotations

import numpy as np
import torch

from mim_refiner.analysis.label_free import label_free_measures


def measures(noise, seed, count=150, directions=12):
    """Images are points; views are noisy copies of them. ``directions`` of 12 carry the variance."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(12) < directions, 1.0, 1e-3)
    clean = rng.normal(size=(count, 12)) * scale
    made = [torch.from_numpy(clean + s * noise * scale * rng.normal(size=clean.shape)).float() for s in (0, 1, 1)]
    return label_free_measures(*made, seed=seed, pairs=3)
