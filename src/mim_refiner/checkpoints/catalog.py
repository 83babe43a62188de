"""Published masked-image-model encoders by name: where they are, what they are, and under which licence.

Facts come from the authors' repositories and model pages (``page``). What is not stated there is left empty: a size
or hash is given only where the publisher gives one. Weights trained by others carry their own licence.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class Entry:
    """One published encoder.

    ``address``: a file to download, or "hf-hub:owner/name". Empty where the authors offer only a page for browsers
    (``page``). ``size``: as the publisher states it, "" = unknown. ``sha256`` is whole or "", ``hash_start`` the first
    digits of a hash as the publisher gives them ("md5:8cad7c"; OpenMMLab and torch's hub put SHA-256's in names).
    """

    name: str
    family: str
    architecture: str
    image_size: int | str  # "512x128" where it is no square
    data: str
    licence: str
    address: str
    page: str
    size: str = ""
    sha256: str = ""
    hash_start: str = ""

    @property
    def file_name(self) -> str:
        """Name of the file in the cache: that of the address."""
        return self.address.rpartition("/")[2]


def _read_table() -> dict[str, Entry]:
    """The entries of assets/catalogue.csv, a line an encoder."""
    table = files("mim_refiner").joinpath("assets/catalogue.csv").read_text(encoding="utf-8")
    rows = [dict[str, Any](row) for row in csv.DictReader(table.splitlines())]
    for row in rows:
        row["image_size"] = int(row["image_size"]) if row["image_size"].isdigit() else row["image_size"]
    return {row["name"]: Entry(**row) for row in rows}


CATALOGUE = _read_table()


def family_licence(family: str) -> str:
    """Licence of the weights that the family's authors published: that of its first entry, "unknown" without one.

    Not of our code, nor of weights that others trained, nor of those that inherit another's.
    """
    name = family.lower().removeprefix("hf_").replace("vitmae", "mae")
    return next((e.licence for e in CATALOGUE.values() if e.family == name != "mim_refiner"), UNKNOWN_LICENCE)


def record(entry: Entry) -> dict[str, Any]:
    """The entry as a flat mapping; what nobody states is "unknown"."""
    facts = asdict(entry)
    for key in ("size", "sha256"):
        facts[key] = facts[key] or "unknown"
    algorithm, _, digits = facts.pop("hash_start").partition(":")
    if digits:
        facts[f"{algorithm} starts with"] = f"{digits} (only these digits are published)"
    facts["address"] = entry.address or f"none for programs; see {entry.page}"
    return facts
