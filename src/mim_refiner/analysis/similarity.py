"""How alike the features of two blocks are: linear CKA, by the unbiased estimator of its three products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.errors import InputError
from mim_refiner.evaluation.features import Features

KIND = "block_similarity"


@torch.no_grad()
def cka_matrix(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """CKA of every one of ``rows`` [N, D] with every one of ``columns`` [N, E]: float64 [R, C].

    The N images are the same. 1 for features equal up to rotation, scale and shift; about 0 (either sign) for unrelated
    ones; NaN when one side does not vary. Kornblith et al. (ICML 2019) with the unbiased HSIC of Song et al. (JMLR 13,
    2012), so that few images of wide features do not look alike by chance. Raises InputError for different N or fewer
    than 4 images.
    """
    sizes = {len(x) for x in (*rows, *columns)}
    if len(sizes) != 1 or min(sizes) < 4:
        raise InputError(f"CKA compares features of the same images, at least 4; got {sorted(sizes)} of them")
    left = torch.stack([_centred_gram(x) for x in rows]).flatten(1)
    right = left if rows is columns else torch.stack([_centred_gram(x) for x in columns]).flatten(1)
    cross = left @ right.T
    return (cross / left.norm(dim=1)[:, None] / right.norm(dim=1)).double()


def _centred_gram(x: Tensor) -> Tensor:
    """U-centred Gram matrix [N, N] of the features: inner products of such matrices are unbiased HSIC times N (N - 3).

    (Szekely and Rizzo, Annals of Statistics 42, 2014, on kernels with a zero diagonal.)
    """
    n = len(x)
    x = (x - x.mean(0)).double()  # changes nothing in exact arithmetic, and keeps the products small
    gram = (x @ x.T).fill_diagonal_(0)
    sums = gram.sum(0)
    gram = gram - sums[:, None] / (n - 2) - sums / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0).float()


def block_similarity(models: Mapping[str, Features], pooling: str) -> dict[str, Any]:
    """CKA between all blocks of every model, and of the first model's blocks with those of each later one.

    The record names the matrices "<model>" and "<first>/<later>": [blocks of the row model][blocks of the column
    model]. ``change`` holds, for equal depths, 1 - CKA of each block with itself in the later model.
    """
    by_block = {name: [value[key] for key in value.keys if key[1] == pooling] for name, value in models.items()}
    first, *later = models
    matrices = {name: cka_matrix(blocks, blocks) for name, blocks in by_block.items()}
    matrices |= {f"{first}/{name}": cka_matrix(by_block[first], by_block[name]) for name in later}
    change = {
        name: (1 - matrices[f"{first}/{name}"].diagonal()).tolist()
        for name in later
        if len(by_block[name]) == len(by_block[first])
    }
    return {
        "kind": KIND,
        "pooling": pooling,
        "images": len(models[first]),
        "measure": "linear CKA, unbiased HSIC",
        "matrices": {name: matrix.tolist() for name, matrix in matrices.items()},
        "change": change,
        "statements": [_statement(first, name, values) for name, values in change.items()],
        "version": __version__,
    }


def _statement(first: str, name: str, change: Sequence[float]) -> str:
    most = max(range(len(change)), key=lambda block: change[block])
    return (
        f"{first} and {name} are least alike at block {most} (CKA {1 - change[most]:.4g}; 1 is the same); block 0 has "
        f"{1 - change[0]:.4g}, the last block {1 - change[-1]:.4g}."
    )
