"""What a flag may be, declared where the flag is, and checked before any work.

A field of an argument dataclass carries its conditions in its type; a field that the class inherits has them in the
class's `CONDITIONS`:

    @dataclass
    class Arguments:
        share: Annotated[float, Range(above=0, below=1)] = 0.1
        adapter: bool = False
        rank: Annotated[int, Range(least=1), Needs("adapter")] = 8

`check_flags` raises ValueError with the field, its value and what to do. Without any condition a number must be
finite, a whole one must fit into 64 bits, and text must not be empty. Command lines of `argparse` have `number`.
"""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints


LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Flags:
    """Values by field, and what they are where nobody says anything."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def is_given(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return name in self.values and self.values[name] != self.defaults.get(name)


class Condition:
    """Says what is wrong with a value that is not None, or None. The sentence goes on from "field=value"."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Range(Condition):
    """Numbers from `least` or above `above` to `most` or below `below`, or one of `also`; of a list each."""

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


@dataclass(frozen=True)
class OneOf(Condition):
    """Names out of those that `names` is, or returns when it is called; of a list each. `also` accepts more."""

    names: Sequence[str] | Callable[[], Iterable[str]]
    also: Callable[[str], bool] = lambda name: False

    def problem(self, value: Any, flags: Flags) -> str | None:
        known = list(self.names() if callable(self.names) else self.names)
        for name in _items(value):
            if name not in known and not self.also(name):
                return f"is unknown.{did_you_mean(name, known)} There are: {', '.join(known)}"
        return None


@dataclass(frozen=True)
class Needs(Condition):
    """Is read only where another field is set, that is neither None, False, empty nor 0."""

    name: str

    def problem(self, value: Any, flags: Flags) -> str | None:
        if flags.values.get(self.name):
            return None
        return f"is read only with {self.name}, which is {flags.values.get(self.name)!r}: set it, or leave this out"


class Unique(Condition):
    """A list without repetitions."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        return "names something twice: name each once" if len(set(value)) < len(value) else None


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _general_problem(value: Any) -> str | None:
    for item in _items(value):
        if isinstance(item, float) and not math.isfinite(item):
            return "is no finite number: give one"
        if _is_number(item) and abs(item) > LARGEST and isinstance(item, int):
            return f"does not fit into 64 bits: give at most {LARGEST}"
        if isinstance(item, str) and not item.strip():
            return "is empty: give a value, or leave the flag out"
    return None


def conditions(dataclass_type: Any) -> dict[str, list[Condition]]:
    """The conditions of each field that has some; a subclass that only changes a default keeps those of its parent."""
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
    """Check the values of some dataclasses' fields, by name, against the conditions of all.

    A value that is the default is taken as it is.

    Raises:
        ValueError: at the first one that is wrong.
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
                value = getattr(values[name], "value", values[name])
                raise ValueError(f"{name}={value!r} {problem}.")


def check_arguments(arguments: Any) -> None:
    """Check the fields of one object, which its `__post_init__` does first: not all objects come from `parse`."""
    names = [field.name for field in dataclasses.fields(arguments)]
    check_flags([type(arguments)], {name: getattr(arguments, name, None) for name in names})


def number(kind: Callable[[str], Any], **bounds: Any) -> Callable[[str], Any]:
    """A type for `argparse`: a number of this kind, finite, in a `Range` of these bounds."""
    allowed = Range(**bounds)

    def convert(text: str) -> Any:
        value = kind(text)
        problem = _general_problem(value) or (allowed.problem(value, Flags({}, {})) if bounds else None)
        if problem is not None:
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    # what argparse calls it where the text is no number
    convert.__name__ = getattr(kind, "__name__", "number")
    return convert


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """A sentence with the nearest of the known names; "" where there is none."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f" Did you mean {prefix}{nearest[0]}?" if nearest else ""
