"""Exact nearest neighbours by cosine in bounded memory: a fast search for candidates, then their exact order.

The search may run in 8-bit integers, whose products cost a CPU a fifth of float32's (a half without VNNI). Its error is
bounded rigorously (from the rounding of the vectors at hand), every row that could still be among the k nearest is kept
as a candidate, and the candidates are ranked in full precision.
All products have fixed shapes, so no result depends on how many queries are handled at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_refiner.core.device import in_float64

_ROWS = 256  # queries a matrix product
_COLUMNS = 16384  # bank rows a matrix product
_GROUP = 64  # at most so many columns share one running maximum
_CANDIDATES = 1024  # a query, on average over a tile; more means that very many rows are equally near
_CACHED_ROWS = 512  # vectors prepared at once: they stay in a CPU's cache
_RANKED_PAIRS = 128  # and pairs ranked at once


@dataclass
class Bank:
    """Features [N, D], standardised and L2-normalised on the fly, a part at a time: in float64, or else in float32."""

    features: Tensor
    mean: Tensor | None
    std: Tensor | None
    lengths: Tensor = field(init=False)  # [N], of the standardised rows; found when they are first prepared

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.features.dtype, torch.float32)
        self.lengths = self.features.new_empty(len(self.features), dtype=dtype)

    @classmethod
    def of(cls, features: Tensor, standardize: bool) -> Bank:
        """With ``standardize``: mean and unbiased standard deviation + 1e-6 of ``features``, found in two passes."""
        if not standardize:
            return cls(features, None, None)
        dtype = torch.promote_types(features.dtype, torch.float32)
        parts = features.split(_CACHED_ROWS)
        total = sum((in_float64(part.to(dtype).sum(0)) for part in parts), torch.zeros(()))
        mean = (total / len(features)).to(dtype).to(features.device)
        squares = sum((in_float64((part.to(dtype) - mean).square_().sum(0)) for part in parts), torch.zeros(()))
        std = (squares / max(1, len(features) - 1)).sqrt().to(dtype).to(features.device)
        return cls(features, mean, std + 1e-6)

    def prepare(self, rows: Tensor) -> Tensor:
        """Rows [R, D] as they are compared: standardised like the bank, of length 1."""
        return F.normalize(self._standardized(rows), dim=1)

    def prepared(self, numbers: Tensor) -> Tensor:
        """The bank's own rows of these numbers, prepared; remembers their lengths."""
        rows = self._standardized(self.features.index_select(0, numbers))
        lengths = rows.norm(dim=1).clamp_(min=1e-12)
        self.lengths[numbers] = lengths
        return rows.div_(lengths[:, None])

    def _standardized(self, rows: Tensor) -> Tensor:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows if self.mean is None or self.std is None else (rows - self.mean).div_(self.std)

    def cosines(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Of pairs of a prepared query and a bank row, whose numbers are ``query`` and ``row`` [P]."""
        weighted = queries if self.std is None else queries / self.std
        found = []
        for q, r in zip(query.split(_RANKED_PAIRS), row.split(_RANKED_PAIRS), strict=True):
            rows = self.features.index_select(0, r).to(queries.dtype)
            rows = rows if self.mean is None else rows.sub_(self.mean)
            found.append(rows.mul_(weighted.index_select(0, q)).sum(1))
        return torch.cat(found) / self.lengths[row]


def search_dtype(features: Tensor) -> torch.dtype:
    """In which candidates are found: int8 on a CPU, but full precision for float64 and on GPUs."""
    full = torch.promote_types(features.dtype, torch.float32)
    able = features.device.type == "cpu" and full == torch.float32 and features.shape[1] < 2**17  # sums fit 32 bits
    return torch.int8 if able else full


class _Rough(NamedTuple):
    """Vectors [R, D] as the search sees them: ``values`` times ``scale`` [R, 1], off by ``error`` [R] in length."""

    values: Tensor
    scale: Tensor
    error: Tensor

    @classmethod
    def of(cls, exact: Tensor, dtype: torch.dtype) -> _Rough:
        if dtype == exact.dtype:
            return cls(exact, exact.new_ones(len(exact), 1), exact.new_zeros(len(exact)))
        scale = (exact.abs().amax(1, keepdim=True) / 127).clamp_(min=torch.finfo(exact.dtype).tiny)
        rounded = (exact / scale).round_()
        return cls(rounded.to(dtype), scale, rounded.mul_(scale).sub_(exact).norm(dim=1))

    def products(self, other: _Rough) -> Tensor:
        """Cosines [R, C] of all pairs, but for the scale of these vectors; integers are summed without rounding."""
        if self.values.dtype != torch.int8:
            return self.values @ other.values.T
        return torch._int_mm(self.values, other.values.T).to(other.scale.dtype).mul_(other.scale.T)


@torch.no_grad()
def nearest(bank: Bank, queries: Tensor, k: int, *, dtype: torch.dtype, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of every query [M, D]: indices [M, k] and cosines [M, k], nearest first.

    Equally near rows are ordered by index. ``chunk_size`` queries share one pass over the bank. Needs memory for the
    two inputs, 6 bytes a number of ``chunk_size`` queries, and a tile of 256 x 16,384 cosines.
    """
    count = len(bank.features)
    group = 2 ** max(0, min(int(math.log2(_GROUP)), int(math.log2(max(1, count // (8 * k))))))
    found: list[tuple[Tensor, Tensor]] = []
    rows = max(1, chunk_size // _ROWS) * _ROWS
    for start in range(0, len(queries), rows):
        parts = [_Tile(bank.prepare(part), k, dtype) for part in queries[start : start + rows].split(_ROWS)]
        _pass_over(bank, parts, group)
        crowded = [number for number, part in enumerate(parts) if part.crowded and dtype != part.queries.dtype]
        for number in crowded:  # too many rows that rounding cannot tell apart
            parts[number] = _Tile(parts[number].queries, k, parts[number].queries.dtype)
        _pass_over(bank, [parts[number] for number in crowded], group)
        found += [part.ranked(bank) for part in parts]
    indices, cosines = map(torch.cat, zip(*found, strict=True))
    return indices, cosines


def _pass_over(bank: Bank, parts: list[_Tile], group: int) -> None:
    for first in range(0, len(bank.features), _COLUMNS) if parts else ():
        count = min(_COLUMNS, len(bank.features) - first)
        order = _spread(count, group, bank.features.device).clamp_(max=count - 1)
        exact = [bank.prepared(numbers) for numbers in (first + order).split(_CACHED_ROWS)]
        for dtype in {part.dtype for part in parts}:
            rough = _Rough(*map(torch.cat, zip(*(_Rough.of(x, dtype) for x in exact), strict=True)))
            for part in parts:
                if part.dtype == dtype:
                    part.offer(rough, first, count, group)


@dataclass
class _Tile:
    """Up to 256 queries on their way through the bank."""

    queries: Tensor  # [Q, D], full precision
    k: int
    dtype: torch.dtype
    found: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # query, bank row, rough cosine
    crowded: bool = False

    def __post_init__(self) -> None:
        self.rough = _Rough.of(self.queries, self.dtype)
        self.peaks = self.queries.new_full((len(self.queries), self.k), -math.inf)
        self.error = torch.zeros((), dtype=self.queries.dtype, device=self.queries.device)

    def offer(self, rows: _Rough, first: int, count: int, group: int) -> None:
        """Take the candidates among ``count`` bank rows from ``first`` on, in the order of :func:`_spread`."""
        cosines = self.rough.products(rows)
        if count % group:
            cosines[:, _spread(count, group, cosines.device) >= count] = -math.inf
        grouped = cosines.view(len(cosines), -1, group)
        peaks = grouped.amax(2) * self.rough.scale
        self.peaks = torch.cat([self.peaks, peaks], dim=1).topk(self.k).values
        # |rough cosine - cosine| of unit vectors: rounding of both vectors and of the sum
        row_error, sum_error = rows.error.max(), (self.queries.shape[1] + 2) * torch.finfo(self.queries.dtype).eps
        self.error = torch.maximum(self.error, self.rough.error * (1 + row_error) + row_error + sum_error)
        least = self._threshold()
        query, column = (peaks >= least[:, None]).nonzero(as_tuple=True)
        members = grouped.flatten(0, 1).index_select(0, query * grouped.shape[1] + column)  # [H, group]
        if self.dtype == torch.int8:
            members = members * self.rough.scale[query]
        near = (members >= least[query, None]) & (members > -math.inf)
        hit, place = near.nonzero(as_tuple=True)
        self.found.append((query[hit], first + place * grouped.shape[1] + column[hit], members[hit, place]))
        self._compact()

    def ranked(self, bank: Bank) -> tuple[Tensor, Tensor]:
        self._compact(always=True)
        query, row, rough = self.found[0]
        if self.dtype != self.queries.dtype:  # the k that look best tell exactly how near a row must be at least
            best = _best(query, rough, self.k, len(self.queries))
            least = bank.cosines(self.queries, query[best], row[best]).view(len(self.queries), self.k).amin(1)
            kept = rough >= (least - self.error)[query]
            query, row = query[kept], row[kept]
        order = (query * len(bank.features) + row).argsort()
        query, row = query[order], row[order]
        exact = bank.cosines(self.queries, query, row)
        place = _position_in_run(query, len(self.queries))
        shape = (len(self.queries), int(place.max()) + 1)
        cosines = exact.new_full(shape, -math.inf).index_put_((query, place), exact)
        rows = row.new_zeros(shape).index_put_((query, place), row)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        return rows.gather(1, order[:, : self.k]), cosines[:, : self.k]

    def _threshold(self) -> Tensor:
        """A rough cosine below it belongs to none of the k nearest: k rows are better by more than both errors."""
        return self.peaks[:, -1] - 2 * self.error

    def _compact(self, *, always: bool = False) -> None:
        """Drop candidates that have fallen behind; beyond the limit keep the best of each query."""
        limit = _CANDIDATES * len(self.queries)
        if not always and sum(len(part[0]) for part in self.found) <= limit:
            return
        query, row, cosine = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        kept = cosine >= self._threshold()[query]
        query, row, cosine = query[kept], row[kept], cosine[kept]
        if len(query) > limit:
            self.crowded = True
            best = _best(query, cosine, max(self.k, _CANDIDATES // 2), len(self.queries))
            query, row, cosine = query[best], row[best], cosine[best]
        self.found = [(query, row, cosine)]


def _spread(count: int, group: int, device: torch.device) -> Tensor:
    """``count`` numbers (and some more, to whole groups) so ordered that each ``group`` in a row comes from all over:
    rows of one class often stand together, and of a group the largest cosine alone raises the threshold.
    """
    return torch.arange(-(-count // group) * group, device=device).view(group, -1).T.reshape(-1)


def _best(query: Tensor, cosine: Tensor, most: int, count: int) -> Tensor:
    """Places of the ``most`` largest cosines (of size 2 at most) of each query, one query behind the other."""
    order = _by_query(query, cosine)
    return order[_position_in_run(query[order], count) < most]


def _by_query(query: Tensor, cosine: Tensor) -> Tensor:
    """Order by query, and from the largest cosine down within it."""
    return (in_float64(query) * 4 - in_float64(cosine)).argsort(stable=True).to(query.device)


def _position_in_run(numbers: Tensor, count: int) -> Tensor:
    """0, 1, 2, ... within each run of equal ``numbers`` (sorted, below ``count``)."""
    lengths = torch.bincount(numbers, minlength=count)
    return torch.arange(len(numbers), device=numbers.device) - (lengths.cumsum(0) - lengths)[numbers]
