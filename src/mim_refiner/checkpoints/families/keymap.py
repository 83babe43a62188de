"""Two-way key maps: a source format's tensor names to timm's, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mim_refiner.errors import InputError

# What a placeholder stands for: a block number, a number that is not kept (of a chunk of blocks), the two kinds of a
# layer's parameters.
_PLACEHOLDERS = {"i": r"\d+", "n": r"\d+", "p": "weight|bias"}
ZEROS = "0"  # in place of a source: zeros of its neighbours' shape (BEiT's keys have no bias)

Template = str | tuple[str, ...]
Mapped = tuple[dict[str, Tensor], dict[str, str]]  # timm name -> value; source name -> timm name


class KeyMap:
    """Rules (source, timm name), each a template with ``{i}`` for a block number and ``{p}`` for weight or bias.

    A source of several templates names tensors that are joined along dimension 0 (query, key, value); one of them may
    be ``ZEROS``. ``{n}`` stands for a number that timm's name has not. Several rules may lead to one timm name
    (spellings of different versions); back to the source goes the first. ``same`` tells names that are alike in both.
    """

    def __init__(self, rules: Sequence[tuple[Template, str]] = (), same: Callable[[str], bool] | None = None) -> None:
        self._same = same or (lambda name: False)
        joined = [((source,) if isinstance(source, str) else source, target) for source, target in rules]
        self._forward = [
            (_pattern(template), target, part, sources)
            for sources, target in joined
            for part, template in enumerate(sources)
            if template != ZEROS
        ]
        self._backward = [(_pattern(target), sources) for sources, target in joined]

    def knows(self, name: str) -> bool:
        """Whether the source format has a tensor of this name in the encoder."""
        return self.target(name) is not None

    def target(self, name: str) -> tuple[str, int, tuple[str, ...]] | None:
        """timm's name of what a source name means, which part of it, and all its parts; None where no rule knows it."""
        if self._same(name):
            return name, 0, (name,)
        for pattern, target, part, sources in self._forward:
            match = pattern.fullmatch(name)
            if match:
                return target.format(**match.groupdict()), part, sources
        return None

    def to_timm(self, state: Mapping[str, Tensor]) -> Mapped:
        """Rename and join; a joined tensor appears only if all its parts are there."""
        parts: dict[str, dict[int, str]] = {}
        wanted: dict[str, tuple[str, ...]] = {}
        for name in state:
            if (found := self.target(name)) is None:
                continue
            target, part, wanted[target] = found
            if part in parts.setdefault(target, {}):
                raise InputError(f"tensors {parts[target][part]} and {name} both mean {target}; keep one of them")
            parts[target][part] = name
        tensors: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for target, names in parts.items():
            sources = wanted[target]
            if len(names) >= len(sources) - sources.count(ZEROS):
                zeros = torch.zeros_like(state[next(iter(names.values()))])
                values = [state[names[part]] if part in names else zeros for part in range(len(sources))]
                tensors[target] = values[0] if len(values) == 1 else torch.cat(values)
                origin |= dict.fromkeys(names.values(), target)
        return tensors, origin

    def from_timm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of :meth:`to_timm`, for rules without ``ZEROS``; InputError for a tensor that has no name there."""
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


def _pattern(template: str) -> re.Pattern[str]:
    """Regular expression of a template; a placeholder that occurs twice must have the same value."""
    seen: set[str] = set()
    text = ""
    if set(re.sub(r"\{\w+\}", "", template)) & set("{}"):
        raise InputError(f"key map: '{template}' has a brace that is no placeholder; use {{i}}, {{n}} or {{p}}")
    for literal, placeholder in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        text += re.escape(literal)
        if not placeholder:
            continue
        if placeholder not in _PLACEHOLDERS:
            raise InputError(f"key map: '{template}' has the placeholder {{{placeholder}}}; use {{i}} or {{p}}")
        text += f"(?P={placeholder})" if placeholder in seen else f"(?P<{placeholder}>{_PLACEHOLDERS[placeholder]})"
        seen.add(placeholder)
    return re.compile(text)
