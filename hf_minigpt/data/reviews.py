"""Labelled texts for a classifier: where they come from, how they are cleaned, split and cut into tokens."""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..atomic import written_at_once
from ..functional_minigpt import num_head_tokens
from ..tokenization import plain_text_encoder
from .corpora import LOADERS
from .tale_reviews import TALE_REVIEW_LABELS, tale_reviews


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
    class_names: Sequence[str] = ("negative", "positive"),
    label_map: Mapping[str, str] | None = None,
    train_split: str = "train",
    test_split: str = "test",
    unlabelled_split: str | None = None,
    test_fraction: float | None = None,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    max_train_examples: int | None = None,
) -> ReviewSplits:
    """Name a set of labelled texts, get its three splits.

    Texts are cleaned (`clean_text`); of equal ones (`text_key`) the first is kept, and the test split's before all
    others. Both held-out sets are stratified, and follow from `split_seed` alone.

    Args:
        dataset: None for the embedded reviews of tales; a file or folder of .jsonl, .json, .csv, .parquet (in a
            folder, the words train and test in the files' names tell the splits); else a name on the Hub.
        config_name: of a Hub dataset.
        class_names: by class number, which is what a whole number in the column is. Other values are names.
        label_map: name of the class for values of the column that are neither, or mean something else.
        unlabelled_split: more texts for `pretraining_texts`, labels not read.
        test_fraction: share of the texts to hold out where there is no test split; None for 0.2.
        validation_fraction: share of what is left for training.
        max_train_examples: use only so many for training, after all splits are made.

    Raises:
        ValueError: nothing there by that name, a column or a split that is not there, a label without a name.
    """
    for name, share in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1, both excluded.")
    num_without_label = 0
    splits: dict[str, LabelledTexts] = {}
    unlabelled: list[str] = []
    if dataset is None:
        name, class_names = "reviews of tales", TALE_REVIEW_LABELS
        splits["train"] = LabelledTexts(*tale_reviews(DEFAULT_NUM_TALE_REVIEWS))
    else:
        name = str(dataset)
        rows = _open(dataset, config_name)
        if train_split not in rows:
            raise ValueError(f"{name} has no split {train_split!r}; name one of {sorted(rows)} as train_split.")
        for key, split in (("train", train_split), ("test", test_split)):
            if split in rows:
                texts = _column(rows[split], text_column, f"{name}, split {split}")
                raw = _column(rows[split], label_column, f"{name}, split {split}")
                labels = _class_numbers(raw, rows[split].features[label_column], class_names, label_map or {})
                pairs = [(clean_text(text), n) for text, n in zip(texts, labels, strict=True) if n is not None]
                num_without_label += len(labels) - len(pairs)
                splits[key] = LabelledTexts([text for text, _ in pairs], [n for _, n in pairs])
        if unlabelled_split is not None:
            if unlabelled_split not in rows:
                raise ValueError(
                    f"{name} has no split {unlabelled_split!r}; name one of {sorted(rows)} as unlabelled_split."
                )
            source = f"{name}, split {unlabelled_split}"
            unlabelled = [clean_text(text) for text in _column(rows[unlabelled_split], text_column, source)]
    if "test" in splits and test_fraction is not None:
        raise ValueError(
            f"test_fraction={test_fraction}, but {name} has a split {test_split!r} to test on: leave it out, or name "
            "a test_split that is not there."
        )
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
        train=train.select(rest[:max_train_examples]),
        validation=train.select(held_out),
        test=test,
        unlabelled=[unlabelled[i] for i in kept],
        num_duplicates=num_duplicates,
        num_across=num_across,
        num_without_label=num_without_label,
    )


def _open(dataset: str | Path, config_name: str | None) -> Any:
    import datasets

    path = Path(dataset)
    try:
        if path.is_file():
            if path.suffix.lower() not in LOADERS:
                raise ValueError(f"{path}: labelled texts are read from {', '.join(LOADERS)}, not {path.suffix!r}.")
            return datasets.load_dataset(LOADERS[path.suffix.lower()], data_files=str(path))
        return datasets.load_dataset(str(dataset), config_name)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"no file, folder or Hub dataset {dataset} that can be read: {error}") from error


def _column(rows: Any, column: str, source: str) -> list[Any]:
    if column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}; name one of {rows.column_names}.")
    values = list(rows[column])
    if not values:
        raise ValueError(f"{source} has no rows.")
    return values


def _class_numbers(
    values: Sequence[Any], feature: Any, class_names: Sequence[str], label_map: Mapping[str, str]
) -> list[int | None]:
    """Numbers of classes; None where there is no label: None, or -1, as IMDb's unlabelled reviews have."""
    number_of: dict[str, int | None] = {str(number): number for number in range(len(class_names))}
    number_of |= {name: number for number, name in enumerate(class_names)} | {"None": None, "-1": None}
    for value, name in label_map.items():
        if name not in class_names:
            raise ValueError(
                f"label_map has {value}={name}, and {name!r} is not among class_names={list(class_names)}."
            )
        number_of[value] = class_names.index(name)
        # a class that the dataset itself has a name for may be mapped by that name
        if value in (feature.names if hasattr(feature, "names") else ()):
            number_of[str(feature.names.index(value))] = class_names.index(name)
    # 1.0 and True are the number 1 to whoever wrote them
    keys = [str(int(v)) if isinstance(v, bool | float) and v == int(v) else str(v) for v in values]
    unknown = sorted({key for key in keys if key not in number_of})
    if unknown:
        raise ValueError(
            f"label {unknown[0]!r} is neither a number below {len(class_names)} nor among class_names="
            f"{list(class_names)}: list all classes there, or map it, label_map {unknown[0]}={class_names[0]}."
        )
    return [number_of[key] for key in keys]


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
    with written_at_once(path) as work:
        if work.suffix == ".parquet":
            rows.to_parquet(str(work))
        else:
            rows.to_json(str(work), force_ascii=False)
