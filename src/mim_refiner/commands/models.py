"""The verb ``models``: what the catalogue knows."""

from __future__ import annotations

from typing import Any

from mim_refiner.checkpoints.catalog import CATALOGUE, cached_path, record
from mim_refiner.errors import InputError, did_you_mean


def models(*, name: str | None = None) -> dict[str, Any]:
    """Facts of one catalogue entry, or {"models": a record for each}.

    Size and hash are "unknown" where the publisher states none. Raises InputError for a name that is not there.
    """
    if name is None:
        return {"models": [record(entry) for entry in CATALOGUE.values()]}
    if name not in CATALOGUE:
        close = did_you_mean(name, CATALOGUE)
        raise InputError(f"no model '{name}' in the catalogue{close}; mim-refiner models lists them")
    entry = CATALOGUE[name]
    here = cached_path(entry) if entry.address else None
    return record(entry) | {"downloaded": str(here) if here is not None and here.is_file() else "no"}
