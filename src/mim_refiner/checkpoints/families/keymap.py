"""Two-way key maps: a source format's tensor names to timm's, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mim_refiner.errors import InputError

# What may stand for {i} and {p} in a template: a block number, and the two kinds of a layer's parameters.
_PLACEHOLDERS = {"i": r"\d+", "p": "weight|bias"}

Template = str | tuple[str, ...]


@dataclass(frozen=True)
class Mapped:
    """Tensors under timm's names, and where each came from."""

    tensors: dict[str, Tensor]  # timm name -> value
    origin: dict[str, str]  # source name -> timm name; several source names may share one
    rest: tuple[str, ...]  # source names that no rule knows


class KeyMap:
    """Rules (source, timm name), each a template with ``{i}`` for a block number and ``{p}`` for weight or bias.

    A source of several templates names tensors that are joined along dimension 0 (query, key, value). Several rules
    may lead to one timm name (spellings of different versions); back to the source goes the first. ``same`` tells
    names that are alike in both.
    """

    def __init__(self, rules: Sequence[tuple[Template, str]] = (), same: Callable[[str], bool] | None = None) -> None:
        self._same = same or (lambda name: False)
        self._rules = [((source,) if isinstance(source, str) else source, target) for source, target in rules]
        self._forward = [
            (_pattern(template), target, part, len(sources))
            for sources, target in self._rules
            for part, template in enumerate(sources)
        ]
        self._backward = [(_pattern(target), sources) for sources, target in self._rules]

    def knows(self, name: str) -> bool:
        """Whether the source format has a tensor of this name in the encoder."""
        return self._target(name) is not None

    def to_timm(self, state: Mapping[str, Tensor]) -> Mapped:
        """Rename and join; a joined tensor appears only if all its parts are there."""
        parts: dict[str, dict[int, str]] = {}
        counts: dict[str, int] = {}
        rest = []
        for name in state:
            found = self._target(name)
            if found is None:
                rest.append(name)
                continue
            target, part, count = found
            if part in parts.setdefault(target, {}):
                raise InputError(f"tensors {parts[target][part]} and {name} both mean {target}; keep one of them")
            parts[target][part] = name
            counts[target] = count
        tensors: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for target, names in parts.items():
            if len(names) < counts[target]:
                rest.extend(names.values())
                continue
            values = [state[names[part]] for part in range(counts[target])]
            tensors[target] = values[0] if len(values) == 1 else torch.cat(values)
            origin |= dict.fromkeys(names.values(), target)
        return Mapped(tensors, origin, tuple(rest))

    def from_timm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of :meth:`to_timm`; raises InputError for a tensor that the source format has no name for."""
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if self._same(name):
                state[name] = tensor
                continue
            match, sources = next(
                ((match, sources) for pattern, sources in self._backward if (match := pattern.fullmatch(name))),
                (None, ()),
            )
            if match is None:
                raise InputError(f"{name} has no place in this format; choose --format timm, which holds every encoder")
            for source, value in zip(sources, tensor.chunk(len(sources)), strict=True):
                state[source.format(**match.groupdict())] = value.clone() if len(sources) > 1 else value
        return state

    def _target(self, name: str) -> tuple[str, int, int] | None:
        if self._same(name):
            return name, 0, 1
        for pattern, target, part, count in self._forward:
            match = pattern.fullmatch(name)
            if match:
                return target.format(**match.groupdict()), part, count
        return None


def _pattern(template: str) -> re.Pattern[str]:
    """Regular expression of a template; a placeholder that occurs twice must have the same value."""
    seen: set[str] = set()
    text = ""
    for literal, placeholder in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        text += re.escape(literal)
        if not placeholder:
            continue
        if placeholder not in _PLACEHOLDERS:
            raise InputError(f"key map: '{template}' has the placeholder {{{placeholder}}}; use {{i}} or {{p}}")
        text += f"(?P={placeholder})" if placeholder in seen else f"(?P<{placeholder}>{_PLACEHOLDERS[placeholder]})"
        seen.add(placeholder)
    return re.compile(text)
