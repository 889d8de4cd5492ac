"""Map the values of a label column to class numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.files import Row, is_missing, short


class LabelReader:
    """Class number of a row, or None if the row has no label.

    A row has no label if the value is null, NaN or empty, or -1 in a column with declared classes, which is how
    datasets on the Hub mark unlabelled rows.

    Args:
        class_names: names of the classes, by class number.
        declared: class names declared by the dataset (`ClassLabel`), if any.
        label_map: class names for values that are neither class names nor class numbers.

    Raises:
        ValueError: `label_map` names an unknown class.
    """

    def __init__(self, class_names: Sequence[str], declared: Sequence[str] | None, label_map: Mapping[str, str]):
        for value, name in label_map.items():
            if name not in class_names:
                raise ValueError(
                    f"label_map has {value}={name}, but {name!r} is not among class_names={list(class_names)}. Add it "
                    "there, or correct label_map."
                )
        self.class_names = list(class_names)
        self.declared = declared
        self.label_map = label_map
        self.declared_classes = _match_names(declared or (), class_names)
        # Numbers are class numbers, unless a class is itself named by a number, or only some declared names match.
        has_numeric_name = any(_to_int(name) is not None for name in class_names)
        is_renamed = all(number is None for number in self.declared_classes)
        self.accepts_numbers = is_renamed and not has_numeric_name

    def __call__(self, row: Row, column: str) -> int | None:
        value = row.values.get(column)
        if is_missing(value) or value == "":
            return None
        number = _to_int(value)
        keys = [str(value)]
        if keys[0].lower() in ("true", "false"):
            keys.append(keys[0].lower())
        if number is not None:
            keys.append(str(number))
        if self.declared is not None and isinstance(value, int):
            if value == -1 and "-1" not in self.label_map:
                return None
            if 0 <= value < len(self.declared):
                keys.insert(0, self.declared[value])
        for key in keys:
            if key in self.label_map:
                return self.class_names.index(self.label_map[key])
        if self.declared is not None and isinstance(value, int) and 0 <= value < len(self.declared):
            declared_class = self.declared_classes[value]
            if declared_class is not None:
                return declared_class
        for key in keys:
            if key in self.class_names:
                return self.class_names.index(key)
        if number is not None and self.accepts_numbers and 0 <= number < len(self.class_names):
            return number
        raise ValueError(
            f"{row.place}: {column} {short(keys[0])} is neither a number below {len(self.class_names)} nor among "
            f"class_names={self.class_names}. List all classes in class_names, or map the value, for example by "
            f"--label_map {keys[0]}={self.class_names[0]}."
        )


def _match_names(declared: Sequence[str], class_names: Sequence[str]) -> list[int | None]:
    """Return the class number of each declared name, or None.

    If each declared name abbreviates a different class name (neg, pos), abbreviations match. Otherwise names must be
    equal.
    """
    lower = [name.casefold() for name in class_names]
    candidates = [[i for i, name in enumerate(lower) if name.startswith(short.casefold())] for short in declared]
    found = [numbers[0] for numbers in candidates if len(numbers) == 1]
    if len(set(found)) == len(declared):
        return list(found)
    return [class_names.index(name) if name in class_names else None for name in declared]


def _to_int(value: Any) -> int | None:
    """Return 1 for 1, 1.0, True, "1", "1.0" and "true", and None for values that are not whole numbers."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return int(text == "true")
        try:
            value = float(text)
        except ValueError:
            return None
    if isinstance(value, bool | int | float) and value == value and abs(value) < 2**53 and value == int(value):
        return int(value)
    return None
