"""Whether test images are among the training images: by the bytes of the files, for at most some thousand of each."""

from __future__ import annotations

import hashlib

import numpy as np

from mim_refiner.data.source_base import ImageSource, Shared
from mim_refiner.errors import DataError

_TEST_LIMIT, _TRAIN_LIMIT = 2_000, 20_000  # evenly spaced; a copy of any size is found, a small overlap may not be


def check_overlap(train: ImageSource, test: ImageSource) -> Shared:
    """Compare test with train images and note on ``test`` how many it shares.

    Raises DataError when both are the same images, in any order: a number measured so says nothing.
    """
    shared, same = compare_images(train, test)
    if same:
        raise DataError(
            f"{test.description}: the test images are the training images ({train.description}); give other test images"
        )
    test.shared = shared if shared.count else None
    return shared


def compare_images(train: ImageSource, test: ImageSource) -> tuple[Shared, bool]:
    """How many test images are among the training images, and whether both are the same ones."""
    bank = _digests(train, _TRAIN_LIMIT)
    found = _digests(test, _TEST_LIMIT)
    common = [digest for digest in found if digest in bank]
    example = f"{test.name(found[common[0]])} is {train.name(bank[common[0]])}" if common else ""
    return Shared(len(common), len(found), example), bool(found) and found.keys() == bank.keys()


def _digests(source: ImageSource, limit: int) -> dict[bytes, int]:
    """{hash of the content: number of the first image that has it}; images that cannot be read are passed over."""
    found: dict[bytes, int] = {}
    for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)).tolist():
        try:
            content = source.read(index)
        except Exception:  # as in decoding: counted and listed there
            continue
        raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
        if len(content):
            found.setdefault(hashlib.blake2b(raw, digest_size=16).digest(), index)
    source.close()
    return found
