"""Published masked-image-model encoders by name: where they are, what they are, under which licence; their download.

Facts come from the authors' repositories and model pages (``page``). What is not stated there is left empty: a size
or hash is given only where the publisher gives one. Weights trained by others carry their own licence.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mim_refiner._version import __version__
from mim_refiner.errors import CheckpointError, one_line
from mim_refiner.files import CACHE_VARIABLE, cache_folder, errors_as, read_mapping, write_json

UNKNOWN_LICENCE = "unknown"
_OFFLINE_VARIABLES = ("MIM_REFINER_OFFLINE", "HF_HUB_OFFLINE")
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the attempts, which are one more
_TIMEOUT = 30.0  # seconds without a byte
_LOCK_TIMEOUT = 3600.0  # another process may be downloading the same file
_CHUNK = 2**20
_SPARE_BYTES = 64 * 2**20  # left free on the disk


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
    image_size: str  # "224", or "512x128" where it is no square
    data: str
    licence: str
    address: str
    page: str
    size: str = ""
    sha256: str = ""
    hash_start: str = ""


_TABLE = files("mim_refiner").joinpath("assets/catalogue.csv").read_text(encoding="utf-8")
CATALOGUE = {row["name"]: Entry(**row) for row in csv.DictReader(_TABLE.splitlines())}


def family_licence(family: str) -> str:
    """Licence of the weights that the family's authors published: that of its first entry, 'unknown' without one."""
    name = family.lower().removeprefix("hf_").replace("vitmae", "mae")
    return next((e.licence for e in CATALOGUE.values() if e.family == name != "mim_refiner"), UNKNOWN_LICENCE)


def record(entry: Entry) -> dict[str, Any]:
    """The entry as a flat mapping; what nobody states is "unknown"."""
    facts = asdict(entry)
    if entry.image_size.isdigit():
        facts["image_size"] = int(entry.image_size)
    for key in ("size", "sha256"):
        facts[key] = facts[key] or "unknown"
    algorithm, _, digits = facts.pop("hash_start").partition(":")
    if digits:
        facts[f"{algorithm} starts with"] = f"{digits} (only these digits are published)"
    facts["address"] = entry.address or f"none for programs; see {entry.page}"
    return facts


# --- download into the cache: resumed, verified, complete or absent


class _TryAgainError(Exception):
    """The transfer broke; another attempt may get further."""


def cached_path(entry: Entry) -> Path:
    """Where the file of ``entry`` is, or would be after a download."""
    return cache_folder() / entry.name / entry.address.rpartition("/")[2]


def fetch(entry: Entry) -> Path:
    """Path of the entry's file, downloaded on the first call.

    An interrupted transfer goes on where it stopped, if the server still has the same file. The file gets its name
    only when its length and (where known) its hash are right. Raises CheckpointError in one line that says how to get
    the file by hand: offline, server gone after a few attempts, wrong hash (the file is removed), disk full.
    """
    path = cached_path(entry)
    if path.is_file():
        return path
    if not entry.address.startswith(("http://", "https://")):
        raise CheckpointError(f"'{entry.name}' is not for programs; get the file from {entry.page}, pass its path")
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE_VARIABLES):
        raise _by_hand(entry, path, "offline mode is on")
    problem, remedy = f"cannot write to the cache {path.parent}", f"choose another folder with {CACHE_VARIABLE}"
    with errors_as(CheckpointError, f"'{entry.name}': {problem}", remedy, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_TIMEOUT):
                if not path.is_file():
                    _download(entry, path)
        except Timeout as error:
            raise _by_hand(entry, path, "another process has been downloading it for an hour") from error
    return path


def _by_hand(entry: Entry, path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"'{entry.name}': cannot download {entry.address} ({reason}); download it elsewhere and pass its path, or put "
        f"it at {path}"
    )


def _download(entry: Entry, path: Path) -> None:
    part, notes = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    for wait in (*_WAITS, None):
        try:
            _transfer(entry, path, part, notes)
            break
        except _TryAgainError as error:
            if wait is None:
                kept = part.stat().st_size if part.exists() else 0
                so_far = f", {kept} bytes are kept and the next call goes on" if kept else ""
                raise _by_hand(entry, path, f"{error} after {len(_WAITS) + 1} attempts{so_far}") from error
            time.sleep(wait)
    _verify(entry, part, notes)
    part.replace(path)
    notes.unlink(missing_ok=True)


def _transfer(entry: Entry, path: Path, part: Path, notes: Path) -> None:
    """Fetch what is missing of ``part``; raises _TryAgainError when the connection fails or ends early."""
    known = read_mapping(notes)
    usable = known.get("address") == entry.address and known.get("validator")
    have = part.stat().st_size if part.exists() and usable else 0
    headers = {"User-Agent": f"mim-refiner/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": str(usable)}
    try:
        with urllib.request.urlopen(urllib.request.Request(entry.address, headers=headers), timeout=_TIMEOUT) as answer:
            start, length = 0, answer.headers.get("Content-Length", "")
            if answer.status == 206:  # of the rest, or of a part of it
                match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
                if not match or int(match[1]) != have:
                    raise _TryAgainError("the server sent another part than asked for")
                start, length = have, match[2]
            total = int(length) if length.isdigit() else None
            validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            if validator.startswith("W/"):
                validator = ""  # a weak tag does not promise the same bytes
            needed, free = (total or 0) - start, shutil.disk_usage(path.parent).free
            if needed + _SPARE_BYTES > free:
                raise CheckpointError(
                    f"'{entry.name}': needs {needed / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} GB free; make "
                    f"room or choose another folder with {CACHE_VARIABLE}"
                )
            write_json(notes, {"address": entry.address, "validator": validator})
            with part.open("r+b" if start else "wb") as file:
                file.seek(start)
                file.truncate()
                shutil.copyfileobj(answer, file, _CHUNK)  # no more than the length that was announced
                done = file.tell()
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # our part is longer than the file: begin anew
            part.unlink(missing_ok=True)
            raise _TryAgainError("the server has another file now") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _TryAgainError(f"the server answers {error.code} {error.reason}") from error
        raise _by_hand(entry, path, f"the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise _TryAgainError(one_line(getattr(reason, "strerror", None) or reason or type(reason).__name__)) from error
    if total is not None and done != total:
        raise _TryAgainError(f"the connection ended at {done} of {total} bytes")


def _verify(entry: Entry, part: Path, notes: Path) -> None:
    """Compare the whole file with the catalogue's hash; a wrong file is removed."""
    for told in (f"sha256:{entry.sha256}", entry.hash_start):
        algorithm, _, expected = told.partition(":")
        if not expected:
            continue
        with part.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(expected):
            part.unlink()
            notes.unlink(missing_ok=True)
            raise CheckpointError(
                f"'{entry.name}': {entry.address} has {algorithm.upper()} {found[: len(expected)]} and not {expected} "
                "as published, so it was removed; try again, and do not use a copy with this hash"
            )
