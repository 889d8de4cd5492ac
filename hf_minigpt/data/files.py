"""Files of rows and texts, for every job: found, decompressed and read row by row, each value with its place.

JSON is an array or one object a line, whatever the ending says. A row keeps the types of its file: text in .csv and
.tsv, JSON's or Parquet's own types elsewhere. Only the columns that are asked for are looked at, so that another
column may hold anything.
"""

import codecs
import csv
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
SUFFIXES = (".txt", *ROW_SUFFIXES)
COMPRESSIONS = (".gz", ".zst")

# Tried in this order, until one gives the columns that are asked for: Excel writes semicolons in half of Europe.
DELIMITERS = (",", ";", "\t", "|")
ROWS_PER_BATCH = 1000
# A column must occur in one of the first rows. A field of JSON may be left out where it is empty.
ROWS_TO_FIND_COLUMNS = 1000

# The names of splits in names of files, as on the Hub.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_HUB_FILE = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")


@dataclass
class Row:
    """
    Attributes:
        place: where the row lies, for messages: "reviews.csv, line 12" or "train.parquet, row 7", both counted from 1.
        values: by column. A column that the row leaves out is not there.
    """

    place: str
    values: dict[str, Any]


def describe_suffixes(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes)}, each also compressed ({' or '.join(COMPRESSIONS)})"


def file_format(path: str | Path) -> str:
    """The suffix of what the file holds: ".csv" of a.csv, A.CSV and a.csv.gz."""
    name = Path(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def find_files(source: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path] | None:
    """The files that a path names, sorted: a file, those in a folder (hidden ones left out), those that match a glob.

    A path is a glob only if there is no file or folder of that very name.

    Returns:
        None where there is nothing, as for a name on the Hub.

    Raises:
        ValueError: a file of another kind, a folder or a glob without files of these kinds, a link to nowhere.
    """
    root = Path(source)
    if root.is_dir():
        files = list(_files_below(root, suffixes))
        if not files:
            raise ValueError(f"folder {root} holds no file that ends in {describe_suffixes(suffixes)}.")
        return files
    if root.is_file():
        if file_format(root) not in suffixes:
            kind = root.suffix or "a file without suffix"
            raise ValueError(f"{root}: cannot read {kind}; use {describe_suffixes(suffixes)}.")
        return [root]
    if not re.search(r"[*?\[]", str(source)):
        return None
    folder, pattern = (Path(root.anchor), root.relative_to(root.anchor)) if root.is_absolute() else (Path(), root)
    found = sorted(path for path in folder.glob(str(pattern)) if path.is_file())
    files = [path for path in found if file_format(path) in suffixes]
    if not files:
        raise ValueError(
            f"{source}: there is no file of that name, and as a pattern it matches "
            f"{f'only {found[0]}, which' if found else 'nothing; a file that'} must end in "
            f"{describe_suffixes(suffixes)}."
        )
    return files


def _files_below(folder: Path, suffixes: Sequence[str], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder} is a symbolic link to a folder that it lies in; remove the link")
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry, suffixes, (*above, real))
        elif file_format(entry) in suffixes:
            if not entry.is_file():
                raise ValueError(f"{entry} is not a regular file but, perhaps, a link to nowhere; remove it")
            yield entry


def split_of(path: Path, root: Path) -> str | None:
    """The split that a file belongs to, by a word in its name or in a folder's below `root`; None without one."""
    for part in reversed(path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)):
        if match := _HUB_FILE.match(part):
            return match["split"]
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLITS.items():
            if any(name in words for name in names):
                return split
    return None


# Bytes


def open_bytes(path: Path) -> Any:
    """A binary file of what a file holds, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def check_start(path: Path, start: bytes) -> None:
    """Raise ValueError for what no UTF-8 text begins with. Archives and UTF-16 have zero bytes near the start."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16 text, which reads as binary: convert it (iconv -f UTF-16 -t UTF-8).")
    if b"\0" in start:
        raise ValueError(
            f"{path} is not text but binary (it has zero bytes): an archive, or UTF-16? Unpack it, or convert it "
            "(iconv -f UTF-16LE -t UTF-8)."
        )


class read_errors:
    """Errors of reading a file, as one that names it."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # EOFError: a compressed file that was cut
        if isinstance(error, (OSError, EOFError)):
            raise ValueError(f"{self.path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1 on, without their ends."""
    with read_errors(path), open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                check_start(path, line[:4096])
                line = line.removeprefix(codecs.BOM_UTF8)
            yield number, decode(line, path, f"line {number}").rstrip("\r\n")


def decode(data: bytes, path: Path, place: str) -> str:
    """Bytes as UTF-8 text, or a ValueError that names where they lie."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, {place}, is not UTF-8 text: byte 0x{data[error.start]:02x} in position {error.start}: "
            f"{error.reason}; convert the file (iconv -f WINDOWS-1252 -t UTF-8) or leave it out."
        ) from error


# Rows


def read_rows(path: Path, columns: Sequence[str] | None = None, start: int = 0) -> Iterator[Row]:
    """The rows of a file, one after the other, never all in memory.

    Args:
        columns: which of its columns; None for all. Each must occur in the file.
        start: rows to leave out at the beginning.

    Raises:
        ValueError: a file that is empty or cannot be read, or a column that is not there.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; remove it or leave it out")
    kind = file_format(path)
    if kind == ".parquet":
        rows = _parquet_rows(path, columns, start)
    elif kind in (".csv", ".tsv"):
        rows = _csv_rows(path, columns, kind, start)
    else:
        rows = _json_rows(path, columns, start)
    is_empty = start == 0
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"{path} is empty; remove it or leave it out")


def _csv_rows(path: Path, columns: Sequence[str] | None, kind: str, start: int) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    header = next((line for _, line in _lines(path) if line.strip()), None)
    if header is None:
        raise ValueError(f"{path} cannot be read: it has no line of column names.")
    delimiters = ("\t", *DELIMITERS) if kind == ".tsv" else DELIMITERS
    try:
        headers = {delimiter: next(csv.reader([header], delimiter=delimiter)) for delimiter in delimiters}
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read: its line of column names: {error}") from error
    fits = [delimiter for delimiter in delimiters if set(columns or ()) <= set(headers[delimiter])]
    delimiter = max(delimiters, key=lambda d: len(headers[d])) if columns is None else (fits or delimiters)[0]
    names = headers[delimiter]
    check_columns(path, names, columns)
    twice = next((name for name in columns or names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has two columns {twice!r}: rename or remove one.")
    asked = [(names.index(name), name) for name in columns or names]

    lines = _lines(path)
    line_number = 0

    def texts() -> Iterator[str]:
        nonlocal line_number
        for number_of_line, line in lines:
            line_number = number_of_line
            yield line + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    has_header = False
    number = first_line = 0
    while True:
        first_line = line_number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {first_line}, cannot be read: {error}. A quotation mark inside a quoted field must be "
                "doubled."
            ) from error
        if not fields:
            continue
        if not has_header:
            has_header = True
            continue
        number += 1
        if number <= start:
            continue
        if len(fields) != len(names):
            raise ValueError(
                f"{path}, line {first_line}, has {len(fields)} fields, and the line of column names has {len(names)}: "
                "put a field that has the separator in it into quotation marks, or mend the line."
            )
        yield Row(f"{path}, line {first_line}", {name: fields[i] for i, name in asked})


def _json_rows(path: Path, columns: Sequence[str] | None, start: int) -> Iterator[Row]:
    first = next((line.lstrip()[0] for _, line in _lines(path) if line.strip()), None)
    if first is None:
        return
    values = _array_values(path) if first == "[" else _line_values(path)
    missing = set(columns or ())
    seen: dict[str, None] = {}
    number = 0
    for number, (place, value) in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(
                f"{place} is {short(value)} and must be an object; the file must hold a list of objects, or an object "
                "a line."
            )
        if missing:
            missing -= value.keys()
            seen |= dict.fromkeys(value)
            if missing and number + 1 >= ROWS_TO_FIND_COLUMNS:
                break
        if number >= start:
            yield Row(place, value if columns is None else {name: value[name] for name in columns if name in value})
    if missing and seen:
        check_columns(path, list(seen), columns)


def _line_values(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, _parse(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{place}, cannot be read: {error}. Each line must hold one object, or the file an array of them."
                ) from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # Python refuses to convert a number of more than 4,300 digits, though perhaps nobody asks for it
        return json.loads(text, parse_int=str)


def _array_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array, with a part of the file in memory that holds the current one."""
    decoder, long_numbers = json.JSONDecoder(), json.JSONDecoder(parse_int=str)
    text, at = "", 0
    lines = _lines(path)
    is_whole = False

    def more() -> bool:
        """Read on, at least as much again as is in hand, so that a long element is not tried too often."""
        nonlocal text, at, is_whole
        parts, length = [text[at:]], 0
        while length <= max(len(text), 1 << 16):
            line = next(lines, None)
            if line is None:
                is_whole = True
                break
            parts.append(line[1] + "\n")
            length += len(parts[-1])
        text, at = "".join(parts), 0
        return length > 0

    def next_character() -> str:
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\n\r":
                at += 1
            if at < len(text) or not more():
                return text[at : at + 1]

    def refuse(what: str) -> ValueError:
        return ValueError(f"{path}, row {number}, cannot be read: {what}")

    number = 0
    next_character()
    at += 1
    while next_character() != "]" or number:
        number += 1
        while True:
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not isinstance(error, (json.JSONDecodeError, RecursionError)):
                    decoder = long_numbers
                    continue
                if not is_whole and more():
                    continue
                raise refuse(str(error)) from error
            # a number may go on in what is not read yet
            if end < len(text) or is_whole or not more():
                break
        at = end
        yield f"{path}, row {number}", value
        sign = next_character()
        if sign == "]":
            break
        if sign != ",":
            raise refuse(f"a comma or the end of the array must follow it, not {sign!r}.")
        at += 1
        next_character()
    at += 1
    if next_character():
        raise ValueError(f"{path} cannot be read: something follows its array.")


def _parquet_rows(path: Path, columns: Sequence[str] | None, start: int) -> Iterator[Row]:
    import pyarrow

    file = _open_parquet(path)
    check_columns(path, file.schema_arrow.names, columns)
    number = 0
    try:
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=None if columns is None else list(columns)):
            skipped = min(max(start - number, 0), batch.num_rows)
            number += skipped
            batch = batch.slice(skipped)
            names = batch.schema.names
            try:
                values = batch.to_pydict()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, one of the rows {number + 1} to {number + batch.num_rows}, is not UTF-8 text: {error}"
                ) from error
            for row in zip(*values.values(), strict=True):
                number += 1
                yield Row(f"{path}, row {number}", dict(zip(names, row, strict=True)))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read after row {number}: {error}") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix.lower() in COMPRESSIONS:
            with open_bytes(path) as file:
                return pyarrow.parquet.ParquetFile(io.BytesIO(file.read()))
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def declared_class_names(path: Path, column: str) -> list[str] | None:
    """The names that a Parquet file written by `datasets` declares for the numbers in a column, in their order."""
    if file_format(path) != ".parquet":
        return None
    metadata = _open_parquet(path).schema_arrow.metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
    except (KeyError, TypeError, ValueError):
        return None
    is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return list(feature["names"]) if is_class and feature.get("names") else None


def check_columns(source: str | Path, names: Sequence[str], columns: Sequence[str] | None) -> None:
    """Raise ValueError if one of the columns is not among the names."""
    for column in columns or ():
        if column not in names:
            raise ValueError(f"{source} has no column {column!r}; name one of its columns: {list(names)}")


# Values


def is_missing(value: Any) -> bool:
    """Null, or the NaN that stands for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: Row, column: str) -> str | None:
    """A row's text; None where there is none.

    Raises:
        ValueError: a value that is no text, or text that UTF-8 cannot encode.
    """
    value = row.values.get(column)
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"{row.place}: column {column!r} holds {type(value).__name__}, not text: {short(value)}. Name another "
            "column, or write the value as text."
        )
    return check_unicode(value, f"{row.place}: column {column!r}")


def check_unicode(text: str, name: str) -> str:
    """The text, unless it has a surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a character (a surrogate pair cut "
            f"in two), in {short(text[max(error.start - 20, 0) : error.start + 20])}: mend or remove it."
        ) from error
    return text


def short(value: Any) -> str:
    """A value in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
