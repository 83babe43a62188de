"""``--set sweep.temperatures=[...]``: choose the heads' temperature on the frozen encoder, before anything else."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from mim_refiner.commands.inputs import train_loader
from mim_refiner.core.collectives import decide_on_rank_0, from_rank_0
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.files import read_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import view_specs
from mim_refiner.training.sweep import sweep_temperatures

FILE = "temperature_sweep.json"


def sweep_in_recipe(
    recipe: RefineRecipe, backbone: Backbone, images: ImageSet, run: Run, out: Path | None
) -> dict[str, Any] | None:
    """Set ``heads.temperature`` of the resolved ``recipe`` to the best of its sweep; None without one.

    What the run folder ``out`` holds is used again, so that a run resumes with the temperature it began with.
    """
    if not recipe.sweep.temperatures:
        return None
    record = decide_on_rank_0(lambda: _kept(out, recipe))
    if record is None:
        with closing(train_loader(images, view_specs(recipe), recipe, run)) as loader:
            record = from_rank_0(sweep_temperatures(recipe, backbone, loader, run))
    recipe.heads.temperature = record["temperature"]
    run.reporter.message(record["reason"])
    return record


def _kept(out: Path | None, recipe: RefineRecipe) -> dict[str, Any] | None:
    try:
        found = read_json(out / FILE) if out else None
        return found if found and found["temperature"] in recipe.sweep.temperatures else None
    except Exception:  # measured again, whatever is wrong with it
        return None
