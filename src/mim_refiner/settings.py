"""Typed settings: pydantic models that ``key=value`` and files of the same keys change, checked before anything starts.

Unknown keys are refused with the nearest valid name, values with what they should be.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mim_refiner.errors import RecipeError, did_you_mean
from mim_refiner.files import dotted, load_yaml, reading

# Bounds that no run reaches: beyond them lie mistyped numbers, which would else end in an allocation or an overflow.
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Side = Annotated[int, Field(ge=1, le=2**14)]  # pixels
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "fast", "fp32", "bf16"]


def _pair(value: Any) -> Any:
    """HEIGHTxWIDTH as text."""
    parts = value.split("x") if isinstance(value, str) else []
    return tuple(int(part) for part in parts) if len(parts) == 2 and all(part.isdecimal() for part in parts) else value


Size = Annotated[Side | tuple[Side, Side], BeforeValidator(_pair)]  # of a square, or (height, width)


def as_list(value: Any) -> Any:
    """One value, or text with commas, as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if isinstance(value, list | tuple) else [value]


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A validator for a name among ``names``."""

    def known(value: str) -> str:
        if value not in names:
            raise ValueError(f"is unknown{did_you_mean(value, names)}; use {', '.join(names)}")
        return value

    return known


def _ascending(value: tuple[float, ...]) -> tuple[float, ...]:
    if sorted(value) != list(value):
        raise ValueError("must be ascending")
    return value


Listed = BeforeValidator(as_list)  # so that kinds=fog,jpeg and shares=0.1 are lists too
Positive = Annotated[float, Field(gt=0, le=1e9)]
BatchSize = Annotated[int, Field(ge=2, le=10**9)]  # that BatchNorm or mixup can use
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Rates = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_ascending), Listed]
Files = Annotated[tuple[Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)], ...], Listed]
_SET = "--set "
S = TypeVar("S", bound="Settings")
V = TypeVar("V")
OneOrEach: TypeAlias = V | list[V]


class Idle(NamedTuple):
    """``keys`` (or groups of them) that say nothing where ``rests`` is true of the value of the setting ``switch``."""

    switch: str
    rests: Callable[[Any], bool]
    keys: tuple[str, ...]
    remedy: str  # what to set the switch to
    beside: bool = False  # also where --set has both: they contradict each other (a file may list all settings)

    def of(self, key: str) -> bool:
        return key != self.switch and any(f"{key}.".startswith(f"{idle}.") for idle in self.keys)


class Settings(BaseModel):
    """Base of all settings; ``noun`` is what messages call them, ``listed`` where all keys stand, ``idle`` which say
    nothing when."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
    noun: ClassVar[str] = "recipe"
    listed: ClassVar[str] = "recipe.yaml"
    idle: ClassVar[tuple[Idle, ...]] = ()

    def lay_under(self, tree: dict[str, Any], said: Mapping[str, Any]) -> None:
        """Lay into ``tree``, all values so far, what some of those ``said`` next stand for; they come on top."""

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and "on" in get_args(kind):  # YAML's on and off
            return "on" if value else "off"
        types = _plain_types(kind)
        if bool not in types and {int, float} & types and _has_truth(value):  # pydantic would take it for 1 or 0
            raise ValueError("true and false are no numbers")
        return value


def _plain_types(kind: Any) -> set[type]:
    """What an annotation is made of."""
    arms = () if get_origin(kind) is Literal else get_args(kind)
    return {kind} if isinstance(kind, type) and not arms else {each for arm in arms for each in _plain_types(arm)}


def _has_truth(value: Any) -> bool:
    return any(map(_has_truth, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


class FrozenSettings(Settings):
    """Settings that stay as they were made; ``model_copy(update=...)`` gives others."""

    model_config = ConfigDict(frozen=True)


def setting_texts(given: str | Iterable[str] | Mapping[str, Any] | None) -> list[str]:
    """``key=value`` texts: as given, or of a mapping with dotted or nested keys; arrays and tensors are lists."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    if isinstance(given, Mapping):
        return [f"{key}={json.dumps(value, default=plain)}" for key, value in dotted(given).items()]
    return [given] if isinstance(given, str) else list(given or ())


def read_setting(setting: str) -> tuple[str, Any]:
    """(key, value) of ``key=value``; the value as YAML has it."""
    key, separator, text = setting.partition("=")
    if not separator:
        raise RecipeError(f"--set {setting!r} has no '='; write --set key=value")
    with reading(f"--set {key[:60]}", "quote the value, or write a number, true or [list]", RecipeError):
        value = load_yaml(text)
    return key.strip(), value


def changed(base: S, changes: Iterable[tuple[str, Any]], file: tuple[str, Mapping[str, Any]] = ("", {})) -> S:
    """``base`` with what a ``file`` (its name, its nested values) and then ``changes`` (dotted keys) say.

    Raises RecipeError naming key, value and remedy, also for a key that has no effect as its switch is off, unless the
    switch is said in the same place or a later one: who turns it off knows that the key rests.
    """
    tree, keys = base.model_dump(), known_keys(base)
    groups = {key.rpartition(".")[0] for key in keys}  # an empty one says nothing
    listed = [(key, value) for key, value in dotted(file[1]).items() if key not in groups or value is not None]
    said = {f"{file[0]}: ": listed, _SET: list(changes)}
    for where, pairs in said.items():
        base.lay_under(tree, dict(pairs))
        for key, value in pairs:
            if key not in keys:
                hint = nearest_key(key, keys) or f"; use a key of {base.listed}"
                raise RecipeError(f"{where}unknown {base.noun} key '{key}'{hint}")
            *parents, leaf = key.split(".")
            place = tree
            for parent in parents:
                place = place[parent]
            place[leaf] = value
            if isinstance(value, str):
                with contextlib.suppress(ValueError):  # YAML 1.1 reads 4e-4 as text
                    place[leaf] = float(value)
    try:
        made = type(base).model_validate(tree)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(type(base), tree, each) for each in _innermost(error.errors()))
        raise RecipeError(f"{base.noun}: {'; '.join([*problems][:5])}; correct by --set or in the file") from None
    values, known = dotted(made.model_dump()), set[str]()
    for where, pairs in reversed(said.items()):
        known |= {key for key, _ in pairs}
        for rule, (key, _) in product(made.idle, pairs):
            value, told = values[rule.switch], rule.switch in known and not (rule.beside and where == _SET)
            if rule.of(key) and rule.rests(value) and not told:
                shown = [*value] if isinstance(value, tuple) else str(value).lower()
                raise RecipeError(
                    f"{where}{key} has no effect with {rule.switch}={shown}; set {rule.switch}{rule.remedy}, or leave "
                    f"{key} out"
                )
    return made


def nearest_key(key: str, keys: Sequence[str]) -> str:
    """A hint: the first key of a group, those with this last name, or the one that is spelled most alike."""
    leaf = key.rpartition(".")[2]
    same = [full for full in keys if full.startswith(f"{key}.")][:1] or [
        full for full in keys if full.rpartition(".")[2] == leaf
    ]
    return f"; did you mean {' or '.join(map(repr, same))}?" if same else did_you_mean(key, keys)


def _innermost(errors: Sequence[Any]) -> list[Any]:
    """Without those of lists that are only short by what is wrong in them."""
    places = [each["loc"] for each in errors]
    return [each for each in errors if not any(each["loc"] == other[: len(each["loc"])] != other for other in places)]


# pydantic's errors by their type, in the words of this package; its own speak of input, fields and items.
_WHOLE, _NUMBER, _TRUTH, _LIST = "must be a whole number", "must be a number", "must be true or false", "must be a list"
_MAPPING = "must be a mapping of names to values"
_WORDS = {
    "int_type": _WHOLE, "int_parsing": _WHOLE, "int_from_float": _WHOLE, "int_parsing_size": _WHOLE,
    "float_type": _NUMBER, "float_parsing": _NUMBER, "finite_number": "must be a finite number",
    "bool_type": _TRUTH, "bool_parsing": _TRUTH, "string_type": "must be text", "string_too_short": "must not be empty",
    "list_type": _LIST, "tuple_type": _LIST, "dict_type": _MAPPING, "model_type": _MAPPING,
    "greater_than": "must be above {gt:g}", "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be below {lt:g}", "less_than_equal": "must be {le:g} or less",
    "too_short": "must have {min_length} or more values", "too_long": "must have {max_length} or fewer values",
    "missing": "is missing", "extra_forbidden": "is unknown", "literal_error": "must be {expected}",
    "value_error": "{error}",
}  # fmt: skip


def said(error: Any) -> str:
    """What is wrong with a value, of one of the ``errors()`` of pydantic."""
    return _WORDS.get(error["type"], "cannot be used").format(**error.get("ctx", {}))


_BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


def _problem(kind: Any, tree: Any, error: Any) -> str:
    """What is wrong with a value. pydantic tells an error for each way to write one; here that is the same problem."""
    at: list[str] = []
    for part in error["loc"]:
        at.append(str(part))
        field = getattr(kind, "model_fields", {}).get(part)
        tree = tree.get(part) if isinstance(tree, dict) else None
        kind = field.annotation if field else None
        if len(at) < len(error["loc"]) and len(arms := ways(kind)) > 1:
            *others, last = arms
            return _instead(at, f"must be {', '.join(others)} or {last}", tree)
    return _instead(at, said(error), error["input"])


def _instead(at: Sequence[str], wanted: str, value: Any) -> str:
    values = isinstance(value, str) and "," in value and len(value) < 60 and "a list" in wanted
    return f"{'.'.join(at)}: {wanted} (got {_shown(value)}{f'; write [{value}]' if values else ''})"


def ways(kind: Any) -> list[str]:
    """The ways to write a value of a type, in words."""
    arms, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        limits = [limit for of in arms[1:] for limit in getattr(of, "metadata", [of])]
        words = [f" {_BOUNDS[key]} {getattr(limit, key)}" for key in _BOUNDS for limit in limits if hasattr(limit, key)]
        return [way + "".join(words) for way in ways(arms[0])]
    if origin in (Union, UnionType):
        return [way for arm in arms if arm is not NoneType for way in ways(arm)]
    if origin is Literal:
        return [str(value) for value in arms]
    if origin in (list, tuple):
        way, *others = ways(arms[0])
        if origin is tuple and way.startswith("a whole number"):
            return ["HEIGHTxWIDTH"]
        count = f"{len(arms)} " if origin is tuple and Ellipsis not in arms else ""
        return [f"a list of {count}" + ("such" if others else way.removeprefix("a ").replace("number", "numbers"))]
    plain = {bool: ["true", "false"], int: ["a whole number"], float: ["a number"], str: ["text"]}
    return plain.get(kind, ["something else"])


def known_keys(settings: Settings) -> list[str]:
    """All dotted keys that --set accepts."""
    return list(dotted(settings.model_dump()))


def _shown(value: Any) -> str:
    with contextlib.suppress(ValueError):  # whole numbers of more than 4300 digits have no text
        return repr(value)[:60]
    return "a number of thousands of digits"
