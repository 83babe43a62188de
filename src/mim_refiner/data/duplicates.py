"""Exact and near duplicates, within one set of images and across two.

Near means: 16x16 thumbnails, less their mean and at unit length, have a cosine of at least ``NEAR``. That forgives
re-encoding, brightness, contrast and small shifts. Of the CIFAR-10 test set exactly 9 of 50 million pairs reach 0.97;
all of them (and the 6 down to 0.95) show the same photograph to the eye.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mim_refiner.data.source_base import ImageSource, Shared, evenly
from mim_refiner.errors import DataError

NEAR = 0.97
_DIMENSIONS = 64
_SAMPLE = 4000  # thumbnails that the projection is fitted to
_CHUNK = 2048
_FLAT = 3.0  # of 255: thumbnails with less contrast are too plain to compare

Pairs = list[tuple[int, int]]  # (earlier or test row, row)


def exact_matches(digests: Sequence[bytes], others: Sequence[bytes]) -> Pairs:
    """(row of others, row) of every digest that occurs in ``others``; the first such row."""
    where = {digest: row for row, digest in reversed(list(enumerate(others)))}
    return [(where[digest], row) for row, digest in enumerate(digests) if digest in where]


def exact_duplicates(digests: Sequence[bytes]) -> Pairs:
    """(first row, row) of every row whose digest occurred before."""
    return [(first, row) for first, row in exact_matches(digests, digests) if first != row]


def near_duplicates(thumbs: NDArray[np.uint8]) -> Pairs:
    """(first of its group, row) for thumbnails uint8 [N, S, S, 3]; groups are joined by near pairs."""
    found = list(_close(thumbs))
    if not found:
        return []
    graph = coo_matrix((np.ones(len(found)), np.transpose(found)), shape=(len(thumbs),) * 2)
    _, group = connected_components(graph, directed=False)
    _, first, of = np.unique(group, return_index=True, return_inverse=True)
    return [(one, row) for row, one in enumerate(first[of].tolist()) if one != row]


def near_matches(thumbs: NDArray[np.uint8], others: NDArray[np.uint8]) -> Pairs:
    """(row of others, row) for every thumbnail that has a near duplicate in ``others``; the first such row."""
    first = {row: other for other, row in reversed(list(_close(others, thumbs)))}
    return [(other, row) for row, other in sorted(first.items())]


def _unit_vectors(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails less their mean, at unit length [N, 3 S S]; zero for those that are too plain to compare."""
    vectors = thumbs.reshape(len(thumbs), int(np.prod(thumbs.shape[1:]))).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    plain = length[:, 0] < _FLAT * vectors.shape[1] ** 0.5
    vectors /= np.maximum(length, 1e-6)
    vectors[plain] = 0
    return vectors


def _close(thumbs: NDArray[np.uint8], others: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, int]]:
    """(row, row of others) of all pairs with a product of at least ``NEAR``; of a set with itself, ascending only.

    Every pair is compared: in 64 directions with an upper bound on the rest, then exactly.
    """
    a = _unit_vectors(thumbs)
    b = a if others is None else _unit_vectors(others)
    if not len(a) or not len(b):
        return
    sample = np.concatenate([x[:: -(-len(x) // _SAMPLE)] for x in (a, b)])
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :_DIMENSIONS]  # that hold most of the length

    def bounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Products of these bound the true products above: the last number is the length of what is left out."""
        short = x @ directions
        rest = np.maximum((x**2).sum(1) - (short**2).sum(1), 0) ** 0.5
        return np.concatenate([short, rest[:, None]], axis=1)

    bounded_a = bounded(a)
    bounded_b = bounded_a if others is None else bounded(b)
    for start in range(0, len(a), _CHUNK):
        for begin in range(start if others is None else 0, len(b), _CHUNK):
            bound = bounded_a[start : start + _CHUNK] @ bounded_b[begin : begin + _CHUNK].T
            rows, columns = np.nonzero(bound >= NEAR - 1e-4)
            rows, columns = rows + start, columns + begin
            kept = (rows < columns) | (others is not None)
            rows, columns = rows[kept], columns[kept]
            near = np.einsum("nd,nd->n", a[rows], b[columns]) >= NEAR
            yield from zip(rows[near].tolist(), columns[near].tolist(), strict=True)


_TEST_LIMIT, _TRAIN_LIMIT = 2_000, 20_000  # evenly spaced; a copy of any size is found, a small overlap may not be


def check_overlap(train: ImageSource, test: ImageSource) -> Shared:
    """Note on ``test`` how many images it shares with train; DataError when both are the same, in any order."""
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
    for index in evenly(len(source), limit).tolist():
        try:
            content = source.read(index)
        except Exception:  # as in decoding: counted and listed there
            continue
        raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
        if len(content):
            found.setdefault(hashlib.blake2b(raw, digest_size=16).digest(), index)
    source.close()
    return found
