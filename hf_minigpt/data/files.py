"""Find and read data files (text, JSON, CSV, Parquet, optionally compressed) and datasets on the Hub, for every job.

Files are read row by row, and errors name the file and the line or row. A JSON file is an array or has one object per
line, whatever its suffix. Values keep their types: text in .csv and .tsv, JSON's or Parquet's own types elsewhere.
Only the requested columns are checked, so other columns may contain anything.
"""

import codecs
import contextlib
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

# Tried in this order until one yields the requested columns. In many locales Excel writes semicolons.
DELIMITERS = (",", ";", "\t", "|")
ROWS_PER_BATCH = 1000
# JSON rows may omit empty fields, so a column must occur in one of this many first rows.
ROWS_TO_FIND_COLUMNS = 1000

# Words in file names that name a split, as on the Hub.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_HUB_FILE = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")


@dataclass
class Row:
    """One row of a file.

    Attributes:
        place: location for error messages, such as "reviews.csv, line 12" or "train.parquet, row 7", counted from 1.
        values: the row's values by column name. Omitted columns are absent.
    """

    place: str
    values: dict[str, Any]


def describe_suffixes(suffixes: Sequence[str]) -> str:
    """Return the accepted suffixes as text for error messages."""
    return f"{', '.join(suffixes)}, each also compressed ({' or '.join(COMPRESSIONS)})"


def file_format(path: str | Path) -> str:
    """Return the lower-case suffix without compression: ".csv" for a.csv, A.CSV and a.csv.gz."""
    name = Path(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def find_files(source: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path] | None:
    """Return the sorted files of a path: a single file, the files below a folder, or the matches of a glob.

    Hidden files are skipped. A path is treated as a glob only if no file or folder has that exact name.

    Args:
        source: file, folder or glob.
        suffixes: accepted file formats.

    Returns:
        The files, or None if nothing exists at the path, as for a dataset name on the Hub.

    Raises:
        ValueError: an unsupported file, a folder or glob without supported files, or a broken link.
    """
    root = Path(source)
    if root.is_dir():
        files = list(_files_below(root, suffixes))
        if not files:
            raise ValueError(f"folder {root} contains no file that ends in {describe_suffixes(suffixes)}.")
        return files
    if root.is_file():
        if file_format(root) not in suffixes:
            kind = root.suffix or "a file without a suffix"
            raise ValueError(f"{root}: cannot read {kind}; use {describe_suffixes(suffixes)}.")
        return [root]
    if not re.search(r"[*?\[]", str(source)):
        return None
    folder, pattern = (Path(root.anchor), root.relative_to(root.anchor)) if root.is_absolute() else (Path(), root)
    found = sorted(path for path in folder.glob(str(pattern)) if path.is_file())
    files = [path for path in found if file_format(path) in suffixes]
    if not files:
        raise ValueError(
            f"{source}: no file has this name, and as a glob it matches "
            f"{f'only files of other formats, such as {found[0]}' if found else 'nothing'}. "
            f"Supported are {describe_suffixes(suffixes)}."
        )
    return files


def _files_below(folder: Path, suffixes: Sequence[str], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder} is a symbolic link to one of its parent folders. Remove the link.")
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry, suffixes, (*above, real))
        elif file_format(entry) in suffixes:
            if not entry.is_file():
                raise ValueError(f"{entry} is not a regular file, or is a broken link. Remove it.")
            yield entry


def split_of(path: Path, root: Path) -> str | None:
    """Return the split named by a word in the file's name or in a folder name below `root`, or None."""
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
    """Open a file for reading bytes, decompressed according to its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def check_start(path: Path, start: bytes) -> None:
    """Raise ValueError if the first bytes are not UTF-8 text. Archives and UTF-16 have zero bytes near the start."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16 text. Convert it to UTF-8 (iconv -f UTF-16 -t UTF-8).")
    if b"\0" in start:
        raise ValueError(
            f"{path} is binary, not text: it contains zero bytes. Unpack it if it is an archive, or convert it if it "
            "is UTF-16 (iconv -f UTF-16LE -t UTF-8)."
        )


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn read errors into a ValueError that names the file."""
    try:
        yield
    # a truncated compressed file raises EOFError
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers, counted from 1, and lines without line ends."""
    with naming_file(path), open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                check_start(path, line[:4096])
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}, line {number},", error, error.start) from error
            yield number, text.rstrip("\r\n")


def not_utf8(source: str, error: UnicodeDecodeError, position: int) -> ValueError:
    """Return the error for bytes that are not UTF-8, with the place of the first wrong byte."""
    return ValueError(
        f"{source} is not UTF-8 text: byte 0x{error.object[error.start]:02x} in position {position}: {error.reason}. "
        "Convert the file (iconv -f WINDOWS-1252 -t UTF-8) or remove it."
    )


def empty_file(path: Path) -> ValueError:
    """Return the error for a file without content."""
    return ValueError(f"{path} is empty. Remove it or leave it out.")


# Rows


def read_rows(path: Path, columns: Sequence[str] | None = None, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a file one by one, without loading the whole file into memory.

    Args:
        path: .json, .jsonl, .ndjson, .csv, .tsv or .parquet file, optionally compressed.
        columns: columns to read, each of which must occur in the file. None reads all.
        start: number of rows to skip.

    Raises:
        ValueError: the file is empty, cannot be read or lacks a column.
    """
    if path.stat().st_size == 0:
        raise empty_file(path)
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
        raise empty_file(path)


def _csv_rows(path: Path, columns: Sequence[str] | None, kind: str, start: int) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    header = next((line for _, line in _lines(path) if line.strip()), None)
    if header is None:
        raise ValueError(f"{path} cannot be read: it has no header line.")
    delimiters = ("\t", *DELIMITERS) if kind == ".tsv" else DELIMITERS
    try:
        headers = {delimiter: next(csv.reader([header], delimiter=delimiter)) for delimiter in delimiters}
    except csv.Error as error:
        raise ValueError(f"{path}, header line, cannot be read: {error}") from error
    matching = [delimiter for delimiter in delimiters if set(columns or ()) <= set(headers[delimiter])]
    delimiter = max(delimiters, key=lambda d: len(headers[d])) if columns is None else (matching or delimiters)[0]
    names = headers[delimiter]
    check_columns(path, names, columns)
    repeated = next((name for name in columns or names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{path} has two columns {repeated!r}. Rename or remove one.")
    selected = [(names.index(name), name) for name in columns or names]

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
                f"{path}, line {first_line}, cannot be read: {error}. Double the quotation marks inside quoted fields."
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
                f"{path}, line {first_line}, has {len(fields)} fields, and the header line has {len(names)}. Quote "
                "fields that contain the delimiter, or fix the line."
            )
        yield Row(f"{path}, line {first_line}", {name: fields[i] for i, name in selected})


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
                f"{place} is {short(value)} and must be an object. The file must be an array of objects or have one "
                "object per line."
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
                    f"{place}, cannot be read: {error}. The file must have one object per line or be an array of them."
                ) from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # Python refuses to convert numbers of more than 4,300 digits, even in a column that is not requested
        return json.loads(text, parse_int=str)


def _array_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the places and values of a JSON array's elements, with only part of the file in memory."""
    decoder, long_numbers = json.JSONDecoder(), json.JSONDecoder(parse_int=str)
    text, at = "", 0
    lines = _lines(path)
    is_whole = False

    def read_more() -> bool:
        """At least double the buffered text, so that a long element is not parsed too often."""
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
            if at < len(text) or not read_more():
                return text[at : at + 1]

    def cannot_read(reason: str) -> ValueError:
        return ValueError(f"{path}, row {number}, cannot be read: {reason}")

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
                if not is_whole and read_more():
                    continue
                raise cannot_read(str(error)) from error
            # a number at the end of the buffer may continue
            if end < len(text) or is_whole or not read_more():
                break
        at = end
        yield f"{path}, row {number}", value
        sign = next_character()
        if sign == "]":
            break
        if sign != ",":
            raise cannot_read(f"a comma or the end of the array must follow it, not {sign!r}.")
        at += 1
        next_character()
    at += 1
    if next_character():
        raise ValueError(f"{path} cannot be read: there is text after its array.")


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
    """Return the class names of a ClassLabel column in a Parquet file that `datasets` wrote, or None."""
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
            raise ValueError(f"{source} has no column {column!r}. Choose one of its columns: {list(names)}.")


# The Hub


@contextlib.contextmanager
def _naming_dataset(name: str) -> Iterator[None]:
    """Check a dataset name, and turn the Hub's errors into a ValueError that names the dataset."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or file_format(name) in SUFFIXES:
        raise ValueError(f"no file or folder {name} exists, and it does not look like a Hub dataset (owner/dataset).")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"no file or folder {name} exists, and it cannot be loaded as a dataset from the Hub: {error}"
        ) from error


def hub_revision(name: str) -> str:
    """Return the current commit of a dataset on the Hub.

    Raises:
        ValueError: there is no such dataset, or the Hub cannot be reached.
    """
    with _naming_dataset(name):
        import huggingface_hub

        return str(huggingface_hub.dataset_info(name).sha)


def load_hub_dataset(name: str, config_name: str | None = None, **options: Any) -> Any:
    """Load a dataset from the Hub.

    Args:
        name: "dataset" or "owner/dataset".
        config_name: configuration of the dataset.
        options: passed to `datasets.load_dataset`, such as `split`, `streaming` and `revision`.

    Returns:
        The split's rows, or without `split` a dictionary of all splits.

    Raises:
        ValueError: there is no such dataset, configuration or split, or the Hub cannot be reached.
    """
    with _naming_dataset(name):
        import datasets

        return datasets.load_dataset(name, config_name, **options)


# Values


def is_missing(value: Any) -> bool:
    """Return whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: Row, column: str) -> str | None:
    """Return a row's text, or None if the value is missing.

    Raises:
        ValueError: the value is not text, or UTF-8 cannot encode it.
    """
    value = row.values.get(column)
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"{row.place}: column {column!r} contains {type(value).__name__}, not text: {short(value)}. Choose "
            "another column, or convert the values to text."
        )
    return check_unicode(value, f"{row.place}: column {column!r}")


def check_unicode(text: str, name: str) -> str:
    """Return the text, or raise ValueError if it has a surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a character (an unpaired "
            f"surrogate), in {short(text[max(error.start - 20, 0) : error.start + 20])}. Replace or remove it."
        ) from error
    return text


def short(value: Any) -> str:
    """Return a value's representation, truncated to 60 characters, for error messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
