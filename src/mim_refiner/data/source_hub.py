"""Data sets of the Hugging Face hub, ``hf:owner/name``: their parquet or tar files, kept in the hub's cache.

huggingface_hub does the download (verified, resumed, cached); the files are then read like local ones, so no data set
script ever runs and the ``datasets`` package is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from mim_refiner.errors import DataError

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_CONVERTED = "refs/convert/parquet"  # the hub's own conversion of most data sets to parquet
_KINDS = (".parquet", ".tar")
_OPEN_KINDS = (*_KINDS, ".jpg", ".jpeg", ".png", ".webp")


def download_dataset(text: str, split: str | None) -> Path:
    """Folder with the data files of ``hf:owner/name[@revision]``; with ``split`` only that part is fetched.

    Raises DataError in one line for a malformed name, a data set that is not there or not public, one without files
    that can be read, and when there is no network and nothing in the cache.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise DataError(f"{text[:200]}: is no data set name; write hf:owner/name, with @revision and #split if needed")
    repository, revision = match["repository"], match["revision"]
    patterns = [f"*{split}*{kind}" if split else f"*{kind}" for kind in _KINDS]
    if split:
        patterns += [f"{split}/*", f"*/{split}/*"]
    else:
        patterns += [f"*{kind}" for kind in _OPEN_KINDS]
    for each in [revision] if revision else [None, _CONVERTED]:
        folder = _snapshot(text, repository, each, patterns)
        if folder is not None and any(path.suffix.lower() in _OPEN_KINDS for path in folder.rglob("*")):
            return folder
    part = f" for the split '{split}'" if split else ""
    raise DataError(f"{text}: has no parquet, tar or image files{part}; download it by another way and give the folder")


def _snapshot(text: str, repository: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The downloaded folder; None where this revision does not exist."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        return None
    except Exception as error:  # the hub's client raises its own, httpx's and OSError; all mean: not available
        if revision == _CONVERTED:
            return None
        reason = " ".join(str(error).split())[:100]
        raise DataError(
            f"{text}: cannot be downloaded ({type(error).__name__}: {reason}); check name and network, or download the "
            "data set elsewhere and give its folder"
        ) from None
