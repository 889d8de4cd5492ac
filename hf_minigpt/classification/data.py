"""Load labelled texts, remove duplicates, and split them into training, validation and test sets."""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import atomic_file
from ..data.files import (
    ROW_SUFFIXES,
    Row,
    check_columns,
    declared_class_names,
    find_files,
    load_hub_dataset,
    read_rows,
    split_of,
    text_of,
)
from ..data.tales.reviews import TALE_REVIEW_LABELS, tale_reviews
from .arguments import ReviewArguments
from .labels import LabelReader


TALE_REVIEWS = "reviews of tales"
NUM_TALE_REVIEWS = 6000
DEFAULT_TEST_FRACTION = 0.2

_BREAK = re.compile(r"\s*<br\s*/?>\s*", re.IGNORECASE)
_BREAKS = re.compile(r"\n{2,}")
_SPACE = re.compile(r"\s+")


@dataclass
class LabelledTexts:
    """Texts and their class numbers."""

    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int] | np.ndarray) -> "LabelledTexts":
        return LabelledTexts([self.texts[i] for i in indices], [self.labels[i] for i in indices])


@dataclass
class ReviewSplits:
    """The training, validation and test sets of a dataset, without texts in common.

    Attributes:
        name: name or path of the dataset.
        class_names: names of the classes, by class number.
        unlabelled: additional texts for pretraining.
        num_duplicates: number of duplicates removed; `num_across` of them duplicate a text of the given test split.
        num_without_label: number of rows removed because they have no label.
        num_without_text: number of rows removed because they have no text.
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
        """The texts to pretrain on: training and unlabelled texts, without validation and test texts."""
        return self.train.texts + self.unlabelled


def clean_text(text: str) -> str:
    """Replace HTML line breaks by newlines, and strip the text."""
    return _BREAKS.sub("\n", _BREAK.sub("\n", text)).strip()


def text_key(text: str) -> bytes:
    """Return a hash that is equal for texts that differ only in case and white space."""
    return hashlib.blake2b(_SPACE.sub(" ", text).strip().casefold().encode(), digest_size=16).digest()


def load_reviews(args: ReviewArguments) -> ReviewSplits:
    """Load a dataset of labelled texts and split it.

    Texts are cleaned (`clean_text`). Of duplicates (equal `text_key`) the first is kept, but those of the test split
    take precedence. Held-out sets are stratified by class and depend on `args.split_seed` only; `args.max_examples`
    applies after splitting.

    Raises:
        ValueError: the dataset, a split or a column is missing, a text or label is invalid, or a class does not occur.
            The message names the file, row and column.
    """
    loaded = _load_tale_reviews() if args.dataset is None else _load_dataset(args)
    train, test, unlabelled = loaded.train, loaded.test, loaded.unlabelled
    if test is not None and args.test_fraction is not None:
        raise ValueError(
            f"test_fraction={args.test_fraction}, but {loaded.name} has a test split {args.test_split!r}. Leave out "
            "test_fraction, or set test_split to a name that does not exist."
        )
    for split, data in (("train", train), ("test", test)):
        if data is not None and set(data.labels) != set(range(len(loaded.class_names))):
            raise ValueError(
                f"{loaded.name}, {split}: of the classes {loaded.class_names} only number {sorted(set(data.labels))} "
                "occur. Set class_names to the classes that occur, or add examples."
            )

    test_keys = set() if test is None else set(map(text_key, test.texts))
    seen = set(test_keys)
    kept = _unseen(train.texts, seen)
    num_across = sum(text_key(text) in test_keys for text in train.texts + unlabelled)
    num_duplicates = len(train) - len(kept)
    train = train.select(kept)
    if test is None:
        fraction = args.test_fraction or DEFAULT_TEST_FRACTION
        rest, held_out = stratified_split(train.labels, fraction, args.split_seed)
        train, test = train.select(rest), train.select(held_out)
    rest, held_out = stratified_split(train.labels, args.validation_fraction, args.split_seed + 1)
    kept = _unseen(unlabelled, seen)
    num_duplicates += len(unlabelled) - len(kept)
    return ReviewSplits(
        name=loaded.name,
        class_names=loaded.class_names,
        train=train.select(rest[: args.max_examples]),
        validation=train.select(held_out),
        test=test,
        unlabelled=[unlabelled[i] for i in kept],
        num_duplicates=num_duplicates,
        num_across=num_across,
        num_without_label=loaded.num_without_label,
        num_without_text=loaded.num_without_text,
    )


@dataclass
class _LoadedDataset:
    """A dataset before deduplication and splitting."""

    name: str
    class_names: list[str]
    train: LabelledTexts
    test: LabelledTexts | None = None
    unlabelled: list[str] = field(default_factory=list)
    num_without_label: int = 0
    num_without_text: int = 0


def _load_tale_reviews() -> _LoadedDataset:
    return _LoadedDataset(TALE_REVIEWS, list(TALE_REVIEW_LABELS), LabelledTexts(*tale_reviews(NUM_TALE_REVIEWS)))


def _load_dataset(args: ReviewArguments) -> _LoadedDataset:
    name = str(args.dataset)
    splits = _open(name, args.dataset_config)
    for flag, split in (("train_split", args.train_split), ("unlabelled_split", args.unlabelled_split)):
        if split is not None and split not in splits:
            raise ValueError(f"{name} has no split {split!r}. Set {flag} to one of {sorted(splits)}.")
    train, test = splits[args.train_split], splits.get(args.test_split)
    labelled = [train] if test is None else [train, test]
    declared = {tuple(names) for part in labelled if (names := part.declared_names(args.label_column))}
    if len(declared) > 1:
        raise ValueError(
            f"{name}: the splits declare different classes for {args.label_column!r}: {sorted(declared)}. Rewrite "
            "them with the same classes."
        )
    declared_names = list(declared.pop()) if declared else None
    class_names = args.class_names or declared_names or ["negative", "positive"]
    label_map = dict(item.split("=", 1) for item in args.label_map)
    class_of = LabelReader(class_names, declared_names, label_map)
    loaded = _LoadedDataset(name, class_names, LabelledTexts(), None if test is None else LabelledTexts())
    for source, data in ((train, loaded.train), (test, loaded.test)):
        if source is None or data is None:
            continue
        for row in source.rows([args.text_column, args.label_column]):
            text = clean_text(text_of(row, args.text_column) or "")
            label = class_of(row, args.label_column)
            if not text:
                loaded.num_without_text += 1
            elif label is None:
                loaded.num_without_label += 1
            else:
                data.texts.append(text)
                data.labels.append(label)
    if args.unlabelled_split is not None:
        rows = splits[args.unlabelled_split].rows([args.text_column])
        texts = (clean_text(text_of(row, args.text_column) or "") for row in rows)
        loaded.unlabelled = [text for text in texts if text]
    return loaded


@dataclass
class _Split:
    """A split of a dataset, from files or from the Hub."""

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
        """Return the class names that the files or the dataset declare for a column."""
        if self.dataset is not None:
            return getattr(self.dataset.features.get(column), "names", None)
        found = {tuple(names) for file in self.files if (names := declared_class_names(file, column))}
        if len(found) > 1:
            raise ValueError(
                f"{self.name}: the files declare different classes for {column!r}: {sorted(found)}. Rewrite them with "
                "the same classes."
            )
        return list(found.pop()) if found else None


def _open(dataset: str, config_name: str | None) -> dict[str, _Split]:
    files = find_files(dataset, ROW_SUFFIXES)
    if files is not None:
        splits: dict[str, _Split] = {}
        names = {file: "train" if len(files) == 1 else split_of(file, Path(dataset)) for file in files}
        unknown = next((file for file, name in names.items() if name is None), None)
        if unknown is not None and any(names.values()):
            raise ValueError(
                f"{unknown}: the file name contains no split, unlike other files of {dataset}. Add train or test to "
                "the name, or remove the file."
            )
        for file, name in names.items():
            name = name or "train"
            splits.setdefault(name, _Split(f"{dataset}, split {name}")).files.append(file)
        return splits
    loaded = load_hub_dataset(dataset, config_name)
    return {name: _Split(f"{dataset}, split {name}", dataset=rows) for name, rows in loaded.items()}


def _unseen(texts: Sequence[str], seen: set[bytes]) -> list[int]:
    """Return the indices of texts whose key is not in `seen`, and add their keys."""
    kept = []
    for i, text in enumerate(texts):
        key = text_key(text)
        if text and key not in seen:
            seen.add(key)
            kept.append(i)
    return kept


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into a remaining and a held-out part, both shuffled, with `fraction` of each class held out.

    Each part contains at least one example of each class. Warns if the held-out part is therefore more than a third
    larger or smaller than `fraction` of all examples.

    Raises:
        ValueError: a class has a single example.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    array = np.asarray(labels)
    rest, held_out = [], []
    for number in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == number))
        if len(members) < 2:
            raise ValueError(
                f"class {number} has a single text. Add texts, so that some can be held out and some trained on."
            )
        num_held_out = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.append(members[:num_held_out])
        rest.append(members[num_held_out:])
    num_held_out, expected = sum(map(len, held_out)), fraction * len(array)
    # A difference of one text is normal in a small set.
    if abs(num_held_out - expected) > max(expected / 3, 1):
        warnings.warn(
            f"a held-out fraction of {fraction:g} means {expected:,.0f} of {len(array):,} texts, but "
            f"{num_held_out:,} ({num_held_out / len(array):.1%}) are held out, because each of the {len(rest)} "
            "classes needs at least one text in both parts. Add texts of each class, or change the fraction.",
            stacklevel=2,
        )
    return generator.permutation(np.concatenate(rest)), generator.permutation(np.concatenate(held_out))


def write_texts(texts: Sequence[str], path: str | Path) -> None:
    """Write texts as the column `text` of a .parquet or .jsonl file."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": list(texts)})
    with atomic_file(path) as work:
        if work.suffix == ".parquet":
            rows.to_parquet(str(work))
        else:
            rows.to_json(str(work), force_ascii=False)
