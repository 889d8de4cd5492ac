"""Labelled texts for a classifier: where they come from, how they are cleaned, split and cut into tokens."""

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..atomic import atomic_file
from ..data.files import (
    ROW_SUFFIXES,
    Row,
    check_columns,
    declared_class_names,
    file_format,
    find_files,
    is_missing,
    read_rows,
    short,
    split_of,
    text_of,
)
from ..data.tales.reviews import TALE_REVIEW_LABELS, tale_reviews
from ..model.pooling_minigpt import num_head_tokens
from ..tokenization import plain_text_encoder


Truncation = Literal["head", "tail", "head_tail", "windows"]
TRUNCATIONS = ("head", "tail", "head_tail", "windows")

DEFAULT_NUM_TALE_REVIEWS = 6000
DEFAULT_TEST_FRACTION = 0.2

_BREAK = re.compile(r"\s*<br\s*/?>\s*", re.IGNORECASE)
_BREAKS = re.compile(r"\n{2,}")
_SPACE = re.compile(r"\s+")


@dataclass
class LabelledTexts:
    """Texts and the number of each one's class."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int] | np.ndarray) -> "LabelledTexts":
        return LabelledTexts([self.texts[i] for i in indices], [self.labels[i] for i in indices])


@dataclass
class ReviewSplits:
    """
    Attributes:
        name: what the user called the data.
        class_names: by class number.
        train, validation, test: no text of one is in another.
        unlabelled: texts for pretraining, of no other split.
        num_duplicates: texts left out because they stand elsewhere; `num_across` of them were in the test split too.
        num_without_label: rows of the labelled splits left out because they have none.
        num_without_text: rows left out because they have no text.
    """

    name: str
    class_names: list[str]
    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts
    unlabelled: list[str]
    num_duplicates: int
    num_across: int
    num_without_label: int
    num_without_text: int = 0

    @property
    def pretraining_texts(self) -> list[str]:
        """What a language model may see before the classifier is tested: neither test nor validation texts."""
        return self.train.texts + self.unlabelled


def clean_text(text: str) -> str:
    """Line breaks where there were HTML ones, and nothing around the text."""
    return _BREAKS.sub("\n", _BREAK.sub("\n", text)).strip()


def text_key(text: str) -> bytes:
    """What two texts have in common that differ in case and white space only."""
    return hashlib.blake2b(_SPACE.sub(" ", text).strip().casefold().encode(), digest_size=16).digest()


def load_reviews(
    dataset: str | Path | None = None,
    *,
    config_name: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    train_split: str = "train",
    test_split: str = "test",
    unlabelled_split: str | None = None,
    test_fraction: float | None = None,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    max_examples: int | None = None,
) -> ReviewSplits:
    """Name a set of labelled texts, get its three splits.

    Texts are cleaned (`clean_text`); of equal ones (`text_key`) the first is kept, and the test split's before all
    others. Both held-out sets are stratified, and follow from `split_seed` alone.

    Args:
        dataset: None for the embedded reviews of tales; a file, folder or glob of .jsonl, .json, .csv, .tsv, .parquet,
            each also .gz or .zst (of several files, the words train and test in their names tell the splits); else a
            name on the Hub.
        config_name: of a Hub dataset.
        class_names: by class number, which is what a whole number in the column is. Other values are names. None: the
            names that the data declares (`ClassLabel`), else negative and positive. Where the data declares some of
            these names, its numbers are looked up by name.
        label_map: name of the class for values of the column that are neither, or mean something else.
        unlabelled_split: more texts for `pretraining_texts`, labels not read.
        test_fraction: share of the texts to hold out where there is no test split; None for 0.2.
        validation_fraction: share of what is left for training.
        max_examples: use only so many for training, after all splits are made.

    Raises:
        ValueError: nothing there by that name, a column or a split that is not there, a value that is no text, a label
            without a name. The message names file, row and column.
    """
    for name, share in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1, both excluded.")
    num_without_label = num_without_text = 0
    splits: dict[str, LabelledTexts] = {}
    unlabelled: list[str] = []
    if dataset is None:
        name, class_names = "reviews of tales", TALE_REVIEW_LABELS
        splits["train"] = LabelledTexts(*tale_reviews(DEFAULT_NUM_TALE_REVIEWS))
    else:
        name = str(dataset)
        sources = _open(dataset, config_name)
        for flag, split in (("train_split", train_split), ("unlabelled_split", unlabelled_split)):
            if split is not None and split not in sources:
                raise ValueError(f"{name} has no split {split!r}; name one of {sorted(sources)} as {flag}.")
        used = {
            key: sources[split] for key, split in (("train", train_split), ("test", test_split)) if split in sources
        }
        declared = {tuple(names) for source in used.values() if (names := source.declared_names(label_column))}
        if len(declared) > 1:
            raise ValueError(f"{name} declares the classes of {label_column!r} differently: {sorted(declared)}.")
        declared_names = list(declared.pop()) if declared else None
        class_names = class_names or declared_names or ("negative", "positive")
        class_of = _ClassNumbers(class_names, declared_names, label_map or {})
        for key, source in used.items():
            splits[key] = LabelledTexts([], [])
            for row in source.rows([text_column, label_column]):
                text = clean_text(text_of(row, text_column) or "")
                number = class_of(row, label_column)
                num_without_text += not text
                num_without_label += bool(text) and number is None
                if text and number is not None:
                    splits[key].texts.append(text)
                    splits[key].labels.append(number)
        if unlabelled_split is not None:
            rows = sources[unlabelled_split].rows([text_column])
            unlabelled = [text for row in rows if (text := clean_text(text_of(row, text_column) or ""))]
    if "test" in splits and test_fraction is not None:
        raise ValueError(
            f"test_fraction={test_fraction}, but {name} has a split {test_split!r} to test on: leave it out, or name "
            "a test_split that is not there."
        )
    assert class_names is not None
    for key, given in splits.items():
        if set(given.labels) != set(range(len(class_names))):
            raise ValueError(
                f"{name}, {key}: of the classes {list(class_names)} only number {sorted(set(given.labels))} occur; "
                "name those that do by class_names, or give more rows."
            )

    train, test = splits["train"], splits.get("test")
    test_keys = set() if test is None else set(map(text_key, test.texts))
    seen = set(test_keys)
    kept = _first_of_each(train.texts, seen)
    num_across = sum(text_key(text) in test_keys for text in train.texts + unlabelled)
    num_duplicates = len(train) - len(kept)
    train = train.select(kept)
    if test is None:
        rest, held_out = stratified_split(train.labels, test_fraction or DEFAULT_TEST_FRACTION, split_seed)
        train, test = train.select(rest), train.select(held_out)
    rest, held_out = stratified_split(train.labels, validation_fraction, split_seed + 1)
    kept = _first_of_each(unlabelled, seen)
    num_duplicates += len(unlabelled) - len(kept)
    return ReviewSplits(
        name=name,
        class_names=list(class_names),
        train=train.select(rest[:max_examples]),
        validation=train.select(held_out),
        test=test,
        unlabelled=[unlabelled[i] for i in kept],
        num_duplicates=num_duplicates,
        num_across=num_across,
        num_without_label=num_without_label,
        num_without_text=num_without_text,
    )


@dataclass
class _Source:
    """One split of a set of labelled texts: its files, or a dataset of the Hub."""

    name: str
    files: list[Path] = field(default_factory=list)
    dataset: Any = None

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in self.files:
            yield from read_rows(file, columns)
        if self.dataset is not None:
            check_columns(self.name, self.dataset.column_names, columns)
            for i, values in enumerate(self.dataset.select_columns(list(columns)), start=1):
                yield Row(f"{self.name}, row {i}", values)

    def declared_names(self, column: str) -> list[str] | None:
        found = {tuple(names) for file in self.files if (names := declared_class_names(file, column))}
        if len(found) > 1:
            raise ValueError(
                f"the files of {self.name} declare the classes of {column!r} differently: {sorted(found)}."
            )
        if self.dataset is not None:
            return getattr(self.dataset.features.get(column), "names", None)
        return list(found.pop()) if found else None


def _open(dataset: str | Path, config_name: str | None) -> dict[str, _Source]:
    files = find_files(dataset, ROW_SUFFIXES)
    if files is not None:
        sources: dict[str, _Source] = {}
        splits = {file: "train" if len(files) == 1 else split_of(file, Path(dataset)) for file in files}
        unknown = next((file for file, split in splits.items() if split is None), None)
        if unknown is not None and any(splits.values()):
            raise ValueError(
                f"{unknown}: its name tells no split, and others of {dataset} do: put train or test into "
                "it, or take it away."
            )
        for file, split in splits.items():
            split = split or "train"
            sources.setdefault(split, _Source(f"{dataset}, split {split}")).files.append(file)
        return sources
    if file_format(dataset) in ROW_SUFFIXES:
        raise ValueError(f"no file {dataset}: look at its path.")
    import datasets

    try:
        splits = datasets.load_dataset(str(dataset), config_name)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"no file, folder or Hub dataset {dataset} that can be read: {error}") from error
    return {split: _Source(f"{dataset}, split {split}", dataset=rows) for split, rows in splits.items()}


class _ClassNumbers:
    """From a value of the label column to the number of its class; None where there is no label.

    There is none where the value is null, NaN or an empty text, or -1 in a column that declares its classes, as the
    Hub's unlabelled rows have.
    """

    def __init__(self, class_names: Sequence[str], declared: Sequence[str] | None, label_map: Mapping[str, str]):
        for value, name in label_map.items():
            if name not in class_names:
                raise ValueError(
                    f"label_map has {value}={name}, and {name!r} is not among class_names={list(class_names)}."
                )
        self.class_names = list(class_names)
        self.declared = declared
        self.label_map = label_map
        # where a class is called by a number, numbers are names
        is_numbered = any(_whole_number(name) is not None for name in class_names)
        # names that are all others are given anew, number by number
        self.declared_classes = _same_classes(declared or (), class_names)
        is_renamed = all(number is None for number in self.declared_classes)
        self.takes_numbers = is_renamed and not is_numbered

    def __call__(self, row: Row, column: str) -> int | None:
        value = row.values.get(column)
        if is_missing(value) or value == "":
            return None
        number = _whole_number(value)
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
            known = self.declared_classes[value]
            if known is not None:
                return known
        for key in keys:
            if key in self.class_names:
                return self.class_names.index(key)
        if number is not None and self.takes_numbers and 0 <= number < len(self.class_names):
            return number
        raise ValueError(
            f"{row.place}: {column} {short(keys[0])} is neither a number below {len(self.class_names)} nor among "
            f"class_names={self.class_names}: list all classes there, or map it, label_map "
            f"{keys[0]}={self.class_names[0]}."
        )


def _same_classes(declared: Sequence[str], class_names: Sequence[str]) -> list[int | None]:
    """The class that each declared name means: the one of that name, or where all are short forms (neg, pos), the one
    that begins with it; None where there is none."""
    lower = [name.casefold() for name in class_names]
    begins = [[i for i, name in enumerate(lower) if name.startswith(short.casefold())] for short in declared]
    found = [numbers[0] for numbers in begins if len(numbers) == 1]
    if len(set(found)) == len(declared):
        return list(found)
    return [class_names.index(name) if name in class_names else None for name in declared]


def _whole_number(value: Any) -> int | None:
    """The whole number that a label is, or is written as: 1, 1.0, True, "1", "1.0", "true"."""
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


def _first_of_each(texts: Sequence[str], seen: set[bytes]) -> list[int]:
    """Indices of the texts that are not empty and not in `seen`, which grows by them."""
    kept = []
    for i, text in enumerate(texts):
        key = text_key(text)
        if text and key not in seen:
            seen.add(key)
            kept.append(i)
    return kept


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of the held-out texts, both shuffled: `fraction` of each class, at least one.

    Warns if the share of all texts comes out more than a third off, as with many classes of a few texts each.

    Raises:
        ValueError: a class of one text.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    array = np.asarray(labels)
    rest, held_out = [], []
    for number in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == number))
        if len(members) < 2:
            raise ValueError(f"class {number} has one text only: give more, some to train on and some to hold out.")
        num_held_out = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.append(members[:num_held_out])
        rest.append(members[num_held_out:])
    num, wanted = sum(map(len, held_out)), fraction * len(array)
    # one text more or less is no news where there are few
    if abs(num - wanted) > max(wanted / 3, 1):
        warnings.warn(
            f"a held-out share of {fraction:g} asks for {wanted:,.0f} of {len(array):,} texts, and {num:,} "
            f"({num / len(array):.1%}) are held out, since each of the {len(rest)} classes has one at least in either "
            "part. Give more texts of each class, or another share.",
            stacklevel=2,
        )
    return generator.permutation(np.concatenate(rest)), generator.permutation(np.concatenate(held_out))


def model_truncation(truncation: Truncation) -> Literal["head", "tail", "head_tail"]:
    """The config's `truncation` for a way of making rows: what is kept of a text in evaluation and use."""
    return "head_tail" if truncation == "windows" else truncation


class ReviewRows(Dataset):
    """Reviews as rows of tokens, with end-of-text before them, as in pretraining, and after them.

    Item i is `{"input_ids": (T,) int64, "labels": int}`; without labels only the former. What changes from epoch to
    epoch (windows, dropped tokens) follows from (seed, epoch, i) alone; how long rows are does not change.

    Args:
        max_length: tokens of a row, its frame included.
        truncation: what is kept of a longer review: its `head`, its `tail` or `head_tail`, which is what
            `MiniGPTForSequenceClassification` keeps with the same `config.truncation`; or `windows`: a random window
            in each epoch of the training, `head_tail` in evaluation.
        token_dropout: share of the tokens that are replaced by end-of-text, which says nothing.
        labels: None for text to be judged.

    Attributes:
        lengths: (number of rows,) tokens of each row.
        num_truncated: reviews longer than a row.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        truncation: Truncation = "head",
        *,
        training: bool = False,
        token_dropout: float = 0.0,
        seed: int = 0,
    ):
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={truncation!r} is unknown: choose one of {', '.join(TRUNCATIONS)}.")
        if max_length < 4:
            raise ValueError(f"context_length={max_length} leaves no room for text: choose at least 4.")
        assert tokenizer.eos_token_id is not None and not (labels is None and training)
        self.eos = tokenizer.eos_token_id
        self.max_length = max_length
        self.room = max_length - 2
        self.truncation = truncation
        self.num_head = num_head_tokens(model_truncation(truncation), max_length) - 1
        self.training = training
        self.token_dropout = token_dropout
        self.seed = seed
        self.epoch = 0
        encoder = plain_text_encoder(tokenizer)
        # one flat array: a list of lists of Python numbers would take 20 times the memory
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        self.offsets = np.cumsum([0, *(len(encoding) for encoding in encodings)])
        self.tokens = np.concatenate([np.array(e.ids, dtype=np.int32) for e in encodings] or [np.empty(0, np.int32)])
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        sizes = np.diff(self.offsets)
        self.num_truncated = int((sizes > self.room).sum())
        self.lengths = np.minimum(sizes, self.room) + 2

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Draw other windows and drop other tokens."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch, index])) if self.training else None
        if len(tokens) > self.room:
            tokens = tokens[self._kept(len(tokens), generator)]
        tokens = tokens.astype(np.int64)
        if generator is not None and self.token_dropout > 0:
            tokens[generator.random(len(tokens)) < self.token_dropout] = self.eos
        item = {"input_ids": torch.from_numpy(np.concatenate([[self.eos], tokens, [self.eos]]))}
        return item if self.labels is None else item | {"labels": int(self.labels[index])}

    def _kept(self, size: int, generator: np.random.Generator | None) -> Any:
        if self.truncation == "windows" and generator is not None:
            begin = int(generator.integers(0, size - self.room, endpoint=True))
            return slice(begin, begin + self.room)
        return np.r_[: self.num_head, size - self.room + self.num_head : size]


def write_texts(texts: Sequence[str], path: str | Path) -> None:
    """Write texts as the column `text` of a .parquet or .jsonl file, which `load_documents` reads."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": list(texts)})
    with atomic_file(path) as work:
        if work.suffix == ".parquet":
            rows.to_parquet(str(work))
        else:
            rows.to_json(str(work), force_ascii=False)
