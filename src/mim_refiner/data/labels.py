"""The classes of a data set: numbered 0..C-1 once, when labels are read, with the names or ids they stand for.

Every source makes one :class:`Labels`. Sets are matched by what their classes are called. What cannot be used raises
:class:`LabelProblem`, whose text the source keeps as the reason for having no labels.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.reporting import number_of

CANDIDATES = ("labels", "class", "target", "targets", "category", "fine_label", "coarse_label", "label_name", "y",
              "class_name", "class_id", "label_id", "classes", "cls", "species", "y_train", "train_labels")  # fmt: skip
# An empty cell, and how data frames, databases and spreadsheets write one.
MISSING = frozenset({"", "nan", "NaN", "<NA>", "NULL", "null", "#N/A"})
_WHOLE = re.compile(r"[0-9]{1,40}")
_NUMBER = re.compile(r"(-?[0-9]{1,40})(\.[0-9]+)?")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_NAME = 500  # characters; longer is no class name


class LabelProblem(Exception):  # noqa: N818 - no failure: the images are used without labels
    """Why labels cannot be used, and what to do about it."""


def printable(text: str) -> str:
    """One line of valid UTF-8: bytes that are no UTF-8 and control characters become escapes such as ``\\xfc``."""
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(match[0])[1:-1]


def clean_name(text: str) -> str:
    """A class name in the one form that names are compared in: composed (NFC), printable, without blanks around."""
    return unicodedata.normalize("NFC", printable(text).strip())


@dataclass(frozen=True, eq=False)
class Labels:
    """Class ``numbers`` int64 [N] in 0..C-1 (all occur); ``names`` and, where the data has numbers, ``ids`` [C]."""

    numbers: NDArray[np.int64]
    names: tuple[str, ...]
    ids: tuple[int, ...] | None
    absent: int = 0  # class names that were given and have no image

    @property
    def named(self) -> bool:
        """Whether the classes have names of their own, not only their ids written out."""
        return self.ids is None or not all(_WHOLE.fullmatch(name) for name in self.names)

    @classmethod
    def of_texts(
        cls, values: Iterable[str], *, where: Callable[[int], str] = "row {}".format, folders: bool = False
    ) -> Labels:
        """Labels written as text, one a row. Plain decimals alone are ids; anything else is names.

        ``where``: what messages call a row by its number. ``folders``: names of folders, which may mix the two.
        Raises LabelProblem for missing labels, negative numbers, fractions, and numbers with a few texts among them.
        """
        index: dict[str, int] = {}
        numbers = np.fromiter((index.setdefault(value, len(index)) for value in values), dtype=np.int64)
        names = [clean_name(text) for text in index]

        def place(wrong: Callable[[str], object]) -> tuple[int, str, str]:
            """(rows, the first, its label) of the classes whose name is ``wrong``."""
            rows = np.flatnonzero(np.isin(numbers, [number for number, name in enumerate(names) if wrong(name)]))
            return len(rows), where(int(rows[0])), names[numbers[rows[0]]]

        if not folders and not MISSING.isdisjoint(names):
            count, first, _ = place(MISSING.__contains__)
            raise LabelProblem(f"{first} has no label ({count} of {len(numbers)} have none); fill it in")
        if any(len(name) > _MAX_NAME for name in names):
            _, first, _ = place(lambda name: len(name) > _MAX_NAME)
            raise LabelProblem(f"{first} has a label of more than {_MAX_NAME} characters; write class names")
        numeric = [bool(_NUMBER.fullmatch(name)) for name in names]
        if not folders and any(numeric) and not all(numeric):
            share = float(np.asarray(numeric)[numbers].mean())
            if share > 0.5:
                count, first, label = place(lambda name: not _NUMBER.fullmatch(name))
                raise LabelProblem(
                    f"{first} has the label '{label}', and {len(numbers) - count} others have numbers; "
                    "write all as names or all as whole numbers"
                )
        ids = None
        if all(numeric) and not folders:
            for pattern, what in ((r"-.*", "negative"), (r".*\.0*[1-9][0-9]*", "a fraction")):
                if any(re.fullmatch(pattern, name) for name in names):
                    _, first, label = place(re.compile(pattern).fullmatch)
                    raise _no_class(label, first, what, all(name.startswith("-1") for name in names))
            names = [name.partition(".")[0] for name in names]
            spelled: dict[int, str] = {}
            if twice := [name for name in names if spelled.setdefault(int(name), name) != name]:
                raise LabelProblem(f"the labels '{spelled[int(twice[0])]}' and '{twice[0]}' are one number in two "
                                   "spellings; write it one way, or give names")  # fmt: skip
        if all(_WHOLE.fullmatch(name) for name in names) and len({int(name) for name in names}) == len(set(names)):
            ids = [int(name) for name in names]
        return _numbered(numbers, names, ids)

    @classmethod
    def of_numbers(cls, values: NDArray[Any], names: Sequence[str] | None = None) -> Labels:
        """Labels that are numbers [N] of any kind; ``names[i]``: name of class i. LabelProblem for other values."""
        if values.dtype.kind == "f":
            values = values.astype(np.float64)
            if len(rows := np.flatnonzero(~np.isfinite(values))):
                raise LabelProblem(f"row {rows[0]} has no label ({len(rows)} of {len(values)} have none); fill it in")
            if len(rows := np.flatnonzero(values != np.floor(values))):
                raise _no_class(values[rows[0]], f"row {rows[0]}", "a fraction")
            values = values.astype(object if np.abs(values).max(initial=0) >= 2**62 else np.int64)
        elif values.dtype.kind == "b":
            values, names = values.astype(np.int64), names or ("False", "True")
        if len(rows := np.flatnonzero(values < 0)):
            raise _no_class(values[rows[0]], f"row {rows[0]}", "negative", bool((values == -1).all()))
        if names is not None and len(rows := np.flatnonzero(values >= len(names))):
            there = f"there {'is' if len(names) == 1 else 'are'} only {number_of(len(names), 'class names')}"
            raise LabelProblem(f"row {rows[0]} has the label {values[rows[0]]}, but {there}; correct one of the two")
        found, numbers = np.unique(values, return_inverse=True)
        ids = [int(value) for value in found]
        if names is None:
            return _numbered(numbers, [str(value) for value in ids], ids)
        given = [clean_name(name) for name in names]
        if len(set(given)) < len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise LabelProblem(f"the class name '{twice}' is given to two numbers; correct the names")
        chosen = [given[value] for value in ids]
        if all(_WHOLE.fullmatch(name) for name in given):
            ids = [int(name) for name in chosen]
        return Labels(numbers.astype(np.int64), tuple(chosen), tuple(ids), absent=len(given) - len(chosen))

    def take(self, selection: slice | NDArray[np.int64]) -> Labels:
        """The labels of some images, numbered anew: only classes that they have."""
        found, numbers = np.unique(self.numbers[selection], return_inverse=True)
        ids = None if self.ids is None else tuple(self.ids[number] for number in found)
        names = tuple(self.names[number] for number in found)
        return Labels(numbers.astype(np.int64), names, ids, absent=len(self.names) - len(names))

    @classmethod
    def join(cls, parts: Sequence[Labels]) -> Labels:
        """The labels of sets one after the other as one list of classes; LabelProblem where only some have names."""
        if (keys := _common_keys(parts)) is None:
            raise LabelProblem("some parts name their classes, others number them; write all labels the same way")
        index: dict[Hashable, int] = {}
        facts: list[tuple[str, int | None]] = []
        numbers = []
        for part, known in zip(parts, keys, strict=True):
            for number, key in enumerate(known):
                if key not in index:
                    index[key] = len(index)
                    facts.append((part.names[number], None if part.ids is None else part.ids[number]))
            numbers.append(np.array([index[key] for key in known], dtype=np.int64)[part.numbers])
        all_ids = [identity for _, identity in facts if identity is not None]
        ids = all_ids if len(set(all_ids)) == len(facts) else None
        return _numbered(np.concatenate(numbers), [name for name, _ in facts], ids)

    def numbers_in(self, other: Labels) -> tuple[NDArray[np.int64], list[str]]:
        """Number in ``other`` of each of these classes [C] (-1: it lacks it), and the names of those it lacks."""
        keys = _common_keys([self, other]) or (self.names, other.names)
        where = {key: number for number, key in enumerate(keys[1])}
        numbers = np.array([where.get(key, -1) for key in keys[0]], dtype=np.int64)
        return numbers, [name for name, number in zip(self.names, numbers, strict=True) if number < 0]


def shown_names(names: Sequence[str], limit: int = 5) -> str:
    """``'a', 'b' and 7 more``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more


def names_in_metadata(metadata: dict[bytes, bytes] | None, column: str = "label") -> list[str] | None:
    """Class names in a parquet file: the key ``class_names`` (a JSON list), or the Hugging Face feature description."""
    try:
        if metadata and b"class_names" in metadata:
            names = json.loads(metadata[b"class_names"])
        elif metadata and b"huggingface" in metadata:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
        else:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def candidates(columns: Iterable[str], verb: str = "rename it to 'label'") -> str:
    """A hint at columns that look like labels under another name, or an empty string."""
    if not (found := [name for name in columns if name.lower() in CANDIDATES]):
        return ""
    what = f"column '{found[0]}' is" if len(found) == 1 else f"columns {shown_names(found)} are"
    return f"{what} not read as labels; {verb if len(found) == 1 else verb.replace('it', 'the right one', 1)}"


def _numbered(numbers: NDArray[np.int64], names: Sequence[str], ids: Sequence[int] | None) -> Labels:
    """Sort the classes, by id or else by name, join those of one name, and number the images by them."""
    order = sorted({(name if ids is None else ids[place], name) for place, name in enumerate(names)})
    where = {name: number for number, (_, name) in enumerate(order)}
    again = np.array([where[name] for name in names], dtype=np.int64)
    sorted_ids = None if ids is None else tuple(int(key) for key, _ in order)
    return Labels(again[numbers], tuple(name for _, name in order), sorted_ids)


def _common_keys(parts: Sequence[Labels]) -> list[Sequence[Hashable]] | None:
    """What the classes of several sets are matched by: names where all have them, else ids; None for a mixture."""
    if all(part.named for part in parts):
        return [part.names for part in parts]
    if all(part.ids is not None for part in parts):
        return [part.ids or () for part in parts]
    known = {name for part in parts if part.ids is None for name in part.names}
    fit = all(part.ids is None or known.issuperset(part.names) for part in parts)
    return [part.names for part in parts] if fit else None


def _no_class(value: object, where: str, what: str, only_unlabelled: bool = False) -> LabelProblem:
    if only_unlabelled:
        return LabelProblem("every label is -1, which marks images without one; write the classes as 0, 1, 2, ...")
    hint = "; -1 marks an image without a label: leave those out" if str(value).startswith("-1") else ""
    return LabelProblem(f"{where} has the label {value}, which is {what}{hint}; write classes as 0, 1, 2, ... or names")
