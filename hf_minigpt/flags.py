"""Conditions on the values of command-line flags, declared with the flags and checked before any work.

A field of an argument dataclass carries its conditions in its type. Conditions on inherited fields are in the class's
`CONDITIONS`:

    @dataclass
    class Arguments:
        fraction: Annotated[float, Range(above=0, below=1)] = 0.1
        adapter: bool = False
        rank: Annotated[int, Range(least=1), Needs("adapter")] = 8

`check_flags` raises a ValueError that names the field, its value and the remedy. Fields without conditions are checked
too: numbers must be finite, integers must fit into 64 bits, and strings must not be empty. `number` gives `argparse`
the same checks.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints


MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class Flags:
    """The values of all fields of a program, with their defaults."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def is_given(self, name: str) -> bool:
        """Return whether a field has another value than its default."""
        return name in self.values and self.values[name] != self.defaults.get(name)


class Condition:
    """A requirement on the value of one field."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        """Return what is wrong with a value other than None, as the end of a sentence that starts with "field=value".

        Returns None if the value meets the condition.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Range(Condition):
    """A number within bounds, or one of `also`. In a list, every item must be.

    Args:
        least: inclusive lower bound.
        above: exclusive lower bound.
        most: inclusive upper bound.
        below: exclusive upper bound.
        multiple_of: the number must be a multiple of this.
        also: numbers that are accepted outside the bounds.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return value in self.also or (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        bounds = [("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below)]
        parts = [f"{word} {bound}" for word, bound in bounds if bound is not None]
        if self.multiple_of is not None:
            parts.append(f"a multiple of {self.multiple_of}")
        return " and ".join(parts) + "".join(f", or {value}" for value in self.also)

    def problem(self, value: Any, flags: Flags) -> str | None:
        wrong = [item for item in _items(value) if _is_number(item) and item not in self]
        return f"must be {self}" if wrong else None


# The range that torch, NumPy and Python's random accept as a seed.
SEED = Range(least=0, most=2**32 - 1)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
COUNT = Range(least=1)
# Far above any useful rate, and far below one that overflows.
RATE = Range(least=0, most=1000)
SHARE = Range(least=0, below=1)
# More threads than this start slowly or not at all.
THREADS = Range(least=1, most=1024)


@dataclass(frozen=True)
class OneOf(Condition):
    """One of some names. In a list, every item must be.

    Args:
        names: the known names, or a function that returns them.
        also: accepts further names.
    """

    names: Sequence[str] | Callable[[], Iterable[str]]
    also: Callable[[str], bool] = lambda name: False

    def problem(self, value: Any, flags: Flags) -> str | None:
        known = list(self.names() if callable(self.names) else self.names)
        for name in _items(value):
            if name not in known and not self.also(name):
                return f"is unknown.{did_you_mean(name, known)} Choose from: {', '.join(known)}"
        return None


@dataclass(frozen=True)
class Needs(Condition):
    """Requires that another field is set, to a value other than None, False, empty or 0."""

    name: str

    def problem(self, value: Any, flags: Flags) -> str | None:
        if flags.values.get(self.name):
            return None
        return f"requires {self.name}, which is {flags.values.get(self.name)!r}. Set it, or remove this flag"


class Unique(Condition):
    """A list without duplicates."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        return "has duplicates. Give each value once" if len(set(value)) < len(value) else None


class JsonObject(Condition):
    """A dictionary, or a JSON object as a string."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        return None if isinstance(found, dict) else 'must be a JSON object, such as {"num_cycles": 2}'


class JsonFile(Condition):
    """A dictionary, a JSON object as a string, or the path of a JSON file."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return None if Path(value).is_file() else "is not a file. Give the path of a JSON file or a JSON object"
        return JsonObject().problem(value, flags)


@dataclass(frozen=True)
class Installed(Condition):
    """Requires an installed package."""

    package: str

    def problem(self, value: Any, flags: Flags) -> str | None:
        if find_spec(self.package) is not None:
            return None
        return f"requires a package that is not installed. Run: pip install {self.package.replace('_', '-')}"


class Assignments(Condition):
    """A string of the form name=value,name=value."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        is_wrong = not all(all(part.partition("=")[::2]) for part in str(value).split(","))
        return "must have the form name=value,name=value" if is_wrong else None


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _general_problem(value: Any) -> str | None:
    for item in _items(value):
        if isinstance(item, float) and not math.isfinite(item):
            return "is not a finite number"
        if _is_number(item) and abs(item) > MAX_INT and isinstance(item, int):
            return f"does not fit into 64 bits. Set it to at most {MAX_INT}"
        if isinstance(item, str) and not item.strip():
            return "is empty. Give a value, or remove this flag"
    return None


def conditions(dataclass_type: Any) -> dict[str, list[Condition]]:
    """Return the conditions of each field that has any. A subclass that only changes a default inherits them."""
    found: dict[str, list[Condition]] = {}
    for parent in reversed(dataclass_type.__mro__):
        for name, inherited in vars(parent).get("CONDITIONS", {}).items():
            found[name] = list(inherited)
        hints = get_type_hints(parent, include_extras=True) if "__annotations__" in vars(parent) else {}
        for name in vars(parent).get("__annotations__", {}):
            own = [item for item in getattr(hints[name], "__metadata__", ()) if isinstance(item, Condition)]
            if own:
                found[name] = own
    return found


def _defaults(dataclass_type: Any) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(dataclass_type)
    }


def check_flags(dataclass_types: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Check the values of the fields of some dataclasses. A value equal to the default is not checked.

    Args:
        dataclass_types: argument dataclasses.
        values: value of each field, by name.

    Raises:
        ValueError: for the first value that does not meet a condition.
    """
    defaults = {name: value for cls in dataclass_types for name, value in _defaults(cls).items()}
    flags = Flags(values, defaults)
    for dataclass_type in dataclass_types:
        declared = conditions(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            name = field.name
            if values.get(name) is None or not flags.is_given(name):
                continue
            problem = _general_problem(values[name])
            for condition in declared.get(name, []):
                problem = problem or condition.problem(values[name], flags)
            if problem is not None:
                raise ValueError(f"{name}={enum_value(values[name])!r} {problem}.")


def check_arguments(arguments: Any) -> None:
    """Check the fields of one object. Called in `__post_init__`, because objects may also be made in Python."""
    names = [field.name for field in dataclasses.fields(arguments)]
    check_flags([type(arguments)], {name: getattr(arguments, name, None) for name in names})


def number(kind: Callable[[str], Any], **bounds: Any) -> Callable[[str], Any]:
    """Return a type for `argparse`: a finite number of this kind, within a `Range` of these bounds."""
    allowed = Range(**bounds)

    def convert(text: str) -> Any:
        value = kind(text)
        problem = _general_problem(value) or (allowed.problem(value, Flags({}, {})) if bounds else None)
        if problem is not None:
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    # argparse shows this name if the text is not a number
    convert.__name__ = getattr(kind, "__name__", "number")
    return convert


def enum_value(value: Any) -> Any:
    """Return the value of an enumeration member, and any other object unchanged."""
    return getattr(value, "value", value)


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return a sentence that suggests the known name closest to `name`, or "" if there are no known names."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f" Did you mean {prefix}{nearest[0]}?" if nearest else ""
