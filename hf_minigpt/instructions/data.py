"""Instructions: records in three formats -> conversations -> token ids with what is trained -> rows, packed or not.

Ids and mask come from one rendering of the tokenizer's chat template, so they cannot drift apart. A record keeps its
tokens to itself: packed rows restart `position_ids` at each one, from which the model knows where attention ends, and
no record's last position predicts the next one's first token.
"""

import itertools
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..data.collators import IGNORE_INDEX
from ..data.files import ROW_SUFFIXES, check_unicode, file_format, find_files, is_missing, read_rows, short
from ..data.rows import Row, seeded_generator


FORMATS = "'messages', or 'prompt' and 'completion', or 'instruction', 'output' and perhaps 'input'"

# what roles are called, and what they are
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

NUM_TALE_RECORDS = 12_000
NUM_HELD_OUT_TALE_RECORDS = 400

RECORDS_PER_BATCH = 1000


@dataclass(frozen=True)
class Conversation:
    """Messages `{"role", "content"}`: perhaps one of the system, then user and assistant in turns, the latter last."""

    messages: tuple[Mapping[str, str], ...]
    category: str = "all"

    @property
    def prompt(self) -> list[dict[str, str]]:
        """All but the last answer."""
        return [dict(message) for message in self.messages[:-1]]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass
class RecordCounts:
    """What became of the records that were read."""

    read: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def num_lost(self) -> int:
        return self.lost.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.lost.items())
        return f"{self.read:,} records, {self.num_lost:,} left out" + (f" ({reasons})" if reasons else "")

    def check(self, max_lost_fraction: float) -> None:
        """Raise ValueError if more than that share of the records is lost."""
        if self.num_lost > max_lost_fraction * self.read:
            raise ValueError(
                f"{self}: more than max_lost_fraction={max_lost_fraction:.0%} of them. For over-long records raise "
                "--context_length, as far as the model allows; for empty and duplicate ones check the data; or "
                "raise --max_lost_fraction."
            )


# Records


class Record(dict[str, Any]):
    """A record and where it lies, for messages."""

    def __init__(self, values: Mapping[str, Any], place: str):
        super().__init__(values)
        self.place = place


def load_records(dataset: str, config_name: str | None = None, split: str = "train") -> Iterator[Record]:
    """The rows of files of .json, .jsonl, .csv, .tsv, .parquet, each also .gz or .zst, or of a dataset on the Hub.

    Raises:
        ValueError: nothing there by that name, or nothing in it that can be read.
    """
    files = find_files(dataset, ROW_SUFFIXES)
    if files is not None:
        return (Record(row.values, row.place) for file in files for row in read_rows(file))
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset) or file_format(dataset) in ROW_SUFFIXES:
        raise ValueError(f"no file or folder {dataset}, and it does not look like a name on the Hub (owner/dataset).")
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config_name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"no file or folder {dataset} here, and the Hub did not give a dataset: {error}") from error
    return (Record(row, f"{dataset}, row {i}") for i, row in enumerate(rows, start=1))


def to_conversation(record: Mapping[str, Any], input_separator: str = "\n\n") -> Conversation | None:
    """A record in any of the three formats as a conversation; None if a user's or an assistant's text is empty.

    `messages` may also be called `conversations`, be JSON in a string, and have `from` and `value` for `role` and
    `content`. A number becomes its text, null and NaN are empty, and a content's parts of type `text` are joined. A
    boolean is refused, since its text could be "true", "True" or "yes".

    A column `system` is the system's message, and one without text is none; `category` says what the figures are
    broken down by, else Alpaca's records are told by whether they have an input. What a user says after the last
    answer is left out.

    Args:
        input_separator: between Alpaca's instruction and its input.

    Raises:
        ValueError: none of the three formats, a value that is no text, or roles that do not take turns.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is {short(record)}, and must be an object with {FORMATS}.")
    given = {name for name, value in record.items() if not is_missing(value)}
    category = check_unicode(str(record["category"]), "category") if "category" in given else ""
    turns = next((name for name in ("messages", "conversations") if name in given), None)
    if turns:
        messages = _messages(record[turns], turns)
    elif "prompt" in given and "completion" in record:
        messages = [
            message
            for name, role in (("prompt", "user"), ("completion", "assistant"))
            for message in (
                _messages(record[name], name)
                if isinstance(record[name], (list, tuple))
                else [{"role": role, "content": _text(record[name], name)}]
            )
        ]
    elif "instruction" in given and "output" in record:
        text, context, output = (_text(record.get(name), name) for name in ("instruction", "input", "output"))
        # an input without an instruction is as empty as none
        if context.strip() and text.strip():
            text += input_separator + context
        if "category" not in record:
            category = "with input" if context.strip() else "without input"
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": output}]
    elif {"messages", "conversations"} & set(record) or any(
        set(names) <= set(record) for names in (("prompt", "completion"), ("instruction", "output"))
    ):
        return None
    else:
        raise ValueError(f"a record has the fields {sorted(map(str, record))}, and needs {FORMATS}.")
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    system = _text(record.get("system"), "system")
    if system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})

    while messages and messages[-1]["role"] == "user":
        messages.pop()
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if "system" in [m["role"] for m in messages[1:]] or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"the roles of a record are {[message['role'] for message in messages]}: after one 'system' at most, "
            "'user' and 'assistant' must take turns."
        )
    if not roles or any(not message["content"].strip() for message in messages):
        return None
    return Conversation(tuple(messages), category or "all")


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    """Messages as `{"role", "content"}`, whatever they call these."""
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} is the text {short(value)}, which is no JSON ({error}): give a list of messages."
            ) from error
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {short(value)}: give a list of messages, each with role and content.")
    messages = []
    for i, message in enumerate(value):
        field_name = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{field_name} is {short(message)}: give an object with role and content.")
        for calls in ("tool_calls", "function_call"):
            if not is_missing(message.get(calls)) and message[calls]:
                raise ValueError(
                    f"{field_name} has {calls}={short(message[calls])}, which the chat templates cannot write: leave "
                    "this record out, or put the call into content as text."
                )
        role_name, role = _first(message, "role", "from")
        content_name, content = _first(message, "content", "value")
        if not {"content", "value", "tool_calls", "function_call"} & set(message):
            raise ValueError(
                f"{field_name} has the fields {sorted(map(str, message))}, and needs role and content (or from and "
                "value)."
            )
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"{field_name}.{role_name} is {short(role)}: choose one of {', '.join(ROLES)}, of which the user's "
                "and the assistant's must take turns."
            )
        messages.append({"role": ROLES[role], "content": _content(content, f"{field_name}.{content_name}")})
    return messages


def _first(message: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of these fields that has a value; the first one if none has."""
    name = next((name for name in names if not is_missing(message.get(name))), names[0])
    return name, message.get(name)


def _content(value: Any, name: str) -> str:
    if not isinstance(value, (list, tuple)):
        return _text(value, name)
    texts = []
    for i, part in enumerate(value):
        if isinstance(part, Mapping):
            kind = part.get("type", "text" if "text" in part else None)
            if kind != "text":
                raise ValueError(
                    f"{name}[{i}] is a part of type {short(kind)}, and only parts of type 'text' can be trained: "
                    "leave this part or this record out."
                )
            part = part.get("text")
        texts.append(_text(part, f"{name}[{i}]"))
    return "".join(texts)


def _text(value: Any, name: str) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return check_unicode(value, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (math.inf, -math.inf):
        try:
            return str(value)
        except ValueError as error:
            raise ValueError(f"{name} is a number too long to be written ({error}): give it as text.") from error
    raise ValueError(f"{name} is {short(value)}, a value of type {type(value).__name__}: give it as text.")


def to_conversations(
    records: Iterable[Mapping[str, Any]], input_separator: str = "\n\n"
) -> tuple[list[Conversation], RecordCounts]:
    """All records as conversations, empty and duplicate ones left out and counted."""
    conversations: dict[tuple[tuple[str, str], ...], Conversation] = {}
    counts = RecordCounts()
    for i, record in enumerate(records):
        counts.read += 1
        try:
            conversation = to_conversation(record, input_separator)
        except ValueError as error:
            raise ValueError(f"{getattr(record, 'place', f'record {i}')}: {error}") from error
        if conversation is None:
            counts.lost["empty"] += 1
            continue
        key = tuple((message["role"], message["content"].strip()) for message in conversation.messages)
        if key in conversations:
            counts.lost["duplicate"] += 1
        conversations.setdefault(key, conversation)
    return list(conversations.values()), counts


def split_held_out(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """A random share of the conversations held out, at least one, so that no prompt is on both sides.

    A prompt is all that comes before the last answer. Prompts are drawn until the share is reached; those with more
    answers than there is room for are passed over. Warns if the share comes out more than a third off.

    Raises:
        ValueError: fewer than two prompts.
    """
    prompts: dict[tuple[tuple[str, str], ...], list[Conversation]] = {}
    for conversation in conversations:
        key = tuple((message["role"], message["content"].strip()) for message in conversation.messages[:-1])
        prompts.setdefault(key, []).append(conversation)
    groups = list(prompts.values())
    total = len(conversations)
    if len(groups) < 2:
        raise ValueError(
            f"the {total:,} conversations have {len(groups)} distinct prompt: at least two are needed, one of them to "
            "be held out. Give records with other prompts."
        )
    order: list[int] = seeded_generator(seed, 0).permutation(len(groups)).tolist()
    wanted = min(max(round(fraction * total), 1), total - 1)
    chosen: list[int] = []
    num = 0
    for i in order:
        if num + len(groups[i]) <= wanted:
            chosen.append(i)
            num += len(groups[i])
    # one more may come closer, and one there must be
    taken = set(chosen)
    more = [i for i in order if i not in taken and num + len(groups[i]) < total]
    if more and num < wanted:
        nearest = min(more, key=lambda i: len(groups[i]))
        if not chosen or num + len(groups[nearest]) - wanted < wanted - num:
            chosen.append(nearest)
            num += len(groups[nearest])
    if abs(num - fraction * total) > max(fraction * total / 3, 1):
        warnings.warn(
            f"validation_fraction={fraction:g} asks for {fraction * total:,.0f} of {total:,} conversations; {num:,} "
            f"({num / total:.1%}) of {len(chosen):,} prompts are held out, since each of all {len(groups):,} "
            f"must stay whole and the largest has {max(map(len, groups)):,} conversations.",
            stacklevel=2,
        )
    taken = set(chosen)
    training = [c for i, group in enumerate(groups) if i not in taken for c in group]
    return training, [c for i in chosen for c in groups[i]]


# Tokens


class TokenizedConversations:
    """Token ids of conversations, and which of them are trained.

    Attributes:
        tokens: (num_tokens,) int32, one conversation after the other.
        trained: (num_tokens,) bool.
        offsets: (num_conversations + 1,) int64.
        conversations: what they are made from, over-long ones left out.
    """

    def __init__(
        self, ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], conversations: Sequence[Conversation]
    ):
        self.conversations = list(conversations)
        self.tokens = np.concatenate([np.empty(0, np.int32), *ids])
        self.trained = np.concatenate([np.empty(0, bool), *trained])
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def lengths(self) -> np.ndarray:
        """(num_conversations,): positions that each takes in a row, one less than its tokens."""
        return np.diff(self.offsets) - 1

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())

    def piece(self, index: int) -> Row:
        """A conversation alone: `input_ids`, `shift_labels`, `position_ids`, each (T,), int64."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        tokens = torch.from_numpy(self.tokens[span].astype(np.int64))
        trained = torch.from_numpy(self.trained[span])
        return {
            "input_ids": tokens[:-1],
            "shift_labels": tokens[1:].where(trained[1:], IGNORE_INDEX),
            "position_ids": torch.arange(len(tokens) - 1),
        }


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    max_length: int,
    counts: RecordCounts | None = None,
    train_on_prompt: bool = False,
) -> TokenizedConversations:
    """Render each conversation by the tokenizer's chat template; what the template calls generated is trained.

    Args:
        max_length: positions in a row; what takes more is left out, and counted as over-long.
        counts: where to count; default: nowhere.
        train_on_prompt: train every token but the first.

    Raises:
        ValueError: the template does not mark what is generated, or does not end an answer with the end token.
    """
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    kept: list[Conversation] = []
    for batch in _batched(conversations, RECORDS_PER_BATCH):
        messages = [[dict(message) for message in conversation.messages] for conversation in batch]
        rendered: Any = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        for conversation, tokens, mask in zip(batch, rendered["input_ids"], rendered["assistant_masks"], strict=True):
            if len(tokens) - 1 > max_length:
                if counts is not None:
                    counts.lost["over-long"] += 1
                continue
            row, is_trained = np.array(tokens, np.int32), np.array(mask, bool)
            _check_template(tokenizer, conversation, row, is_trained)
            ids.append(row)
            trained.append(np.arange(len(row)) > 0 if train_on_prompt else is_trained)
            kept.append(conversation)
    return TokenizedConversations(ids, trained, kept)


def _check_template(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, ids: np.ndarray, trained: np.ndarray
) -> None:
    """Every answer is trained, its end token too: else the model would never learn to stop."""
    num_answers = sum(message["role"] == "assistant" for message in conversation.messages)
    ends = ids[trained & ~np.append(trained[1:], False)]
    if len(ends) != num_answers or (ends != tokenizer.eos_token_id).any() or trained[0]:
        raise ValueError(
            f"the chat template must mark each answer, with {tokenizer.eos_token!r} at its end, as "
            "{% generation %}: choose one of this package's with --chat_format."
        )


def _batched(items: Sequence[Conversation], size: int) -> Iterator[Sequence[Conversation]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# Rows


class ConversationRows(Dataset):
    """One conversation a row: `input_ids`, `shift_labels`, `position_ids`, each (T,)."""

    def __init__(self, data: TokenizedConversations):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return self.data.piece(range(len(self))[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]


class PackedRows(Dataset):
    """
    Conversations packed into rows of up to `row_length` positions by best fit, the longest first.

    Each epoch draws another packing: which conversations of equal length share a row, in what order, and the order of
    the rows; their number stays. A row's items are `input_ids`, `shift_labels`, `position_ids`, each (T,), the last
    of which restarts at 0 with every conversation.
    """

    def __init__(self, data: TokenizedConversations, row_length: int, seed: int = 0):
        longest = int(data.lengths.max(initial=0))
        if longest > row_length:
            raise ValueError(f"row_length={row_length} has no room for a conversation of {longest} positions.")
        self.data = data
        self.row_length = row_length
        self.seed = seed
        # bins of lengths: the same in every epoch
        self._bins = pack_best_fit(data.lengths, row_length)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the packing of an epoch; it depends on nothing but the seed and the epoch."""
        self.epoch = epoch
        rng = seeded_generator(self.seed, epoch)
        # conversations of equal length change places
        lengths = self.data.lengths
        by_length = np.argsort(lengths, kind="stable")
        shuffled = rng.permutation(len(lengths))
        shuffled = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        stand_in = np.empty_like(by_length)
        stand_in[by_length] = shuffled
        self._rows = [rng.permutation(stand_in[self._bins[i]]) for i in rng.permutation(len(self._bins))]

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.data.lengths.sum()) / (self.row_length * max(len(self), 1))

    def __getitem__(self, index: int) -> Row:
        pieces = [self.data.piece(i) for i in self._rows[range(len(self))[index]]]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]


def pack_best_fit(lengths: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Best-fit decreasing (Ding et al., 2024): the longest first, each into the fullest row that has room for it.

    Args:
        lengths: (N,), none above `row_length`.

    Returns:
        For each row the indices of what lies in it.
    """
    rows: list[list[int]] = []
    # the rows that have so much room left; a heap or a tree would pay only beyond some thousand tokens a row
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = np.zeros(row_length + 1, bool)
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        # argmax: the first True, so the least room that is enough
        room = length + int(rooms[length:].argmax())
        if rooms[room]:
            row = by_room[room].pop()
            rooms[room] = bool(by_room[room])
            rows[row].append(int(index))
        else:
            row, room = len(rows), row_length
            rows.append([int(index)])
        by_room[room - length].append(row)
        rooms[room - length] = True
    return [np.array(row) for row in rows]


class MixedRows(Dataset):
    """Rows of instructions, then rows of pretraining text: `share` of all rows, other ones each epoch."""

    def __init__(self, rows: Any, text_rows: Any, share: float):
        self.rows = rows
        self.text_rows = text_rows
        self.num_text_rows = round(share / (1 - share) * len(rows))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        for rows in (self.rows, self.text_rows):
            if hasattr(rows, "set_epoch"):
                rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows) + self.num_text_rows

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        if index < len(self.rows):
            return self.rows[index]
        row = self.text_rows[(index - len(self.rows)) % len(self.text_rows)]
        return {**row, "position_ids": torch.arange(len(row["input_ids"]))}

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [self[index] for index in indices]


@dataclass
class InstructionCollator:
    """Batches of rows, padded on the right.

    Args:
        pad_token_id: fills `input_ids`; the targets there are -100.

    Returns (from a call): `input_ids`, `labels`, `shift_labels`, all (B, T), int64; `labels` equal `shift_labels`,
        which the model reads. If a row holds several conversations also `position_ids` (B, T), which start at 0 in the
        padding, too. No mask of the padding: it comes last, and under causal attention nothing sees it.
    """

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        input_ids = pad_sequence([row["input_ids"] for row in rows], True, padding_value=self.pad_token_id)
        shift_labels = pad_sequence([row["shift_labels"] for row in rows], True, padding_value=IGNORE_INDEX)
        batch = {"input_ids": input_ids, "labels": shift_labels, "shift_labels": shift_labels}
        if any((row["position_ids"][1:] == 0).any() for row in rows):
            length = input_ids.shape[1]
            # Padding is a document too, or a few, but not one a position: attention may be called for each. None is
            # longer than a conversation, so that a learned table has a row for every position.
            padding = torch.arange(length) % (1 + max(int(row["position_ids"].max()) for row in rows))
            padded = [torch.cat((row["position_ids"], padding))[:length] for row in rows]
            batch["position_ids"] = torch.stack(padded)
        return batch


# What is embedded


def tale_conversations(
    num: int | None = None, num_held_out: int | None = None
) -> tuple[list[Conversation], list[Conversation], RecordCounts]:
    """Instructions about the tales: for training, and held out, on combinations that training does not ask for."""
    from ..data.tales.instructions import held_out_records, training_records

    training, counts = to_conversations(training_records(num or NUM_TALE_RECORDS))
    held_out, _ = to_conversations(held_out_records(num_held_out or NUM_HELD_OUT_TALE_RECORDS))
    return training, held_out, counts


def colored(tokenizer: PreTrainedTokenizerFast, data: TokenizedConversations, index: int) -> str:
    """A conversation's text with its trained tokens in green, special tokens and all."""
    span = slice(data.offsets[index], data.offsets[index + 1])
    pairs = zip(data.tokens[span].tolist(), data.trained[span].tolist(), strict=True)
    text = ""
    for is_trained, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in group])
        text += f"\033[32m{part}\033[0m" if is_trained else f"\033[2m{part}\033[0m"
    return text
