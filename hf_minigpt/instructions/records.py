"""Read records, convert them to conversations, and split off a held-out set."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.files import (
    ROW_SUFFIXES,
    check_unicode,
    find_files,
    is_missing,
    load_hub_dataset,
    read_rows,
    short,
)
from ..data.rows import seeded_generator


FORMATS = "'messages'; or 'prompt' and 'completion'; or 'instruction', 'output' and optionally 'input'"

# role in a record -> role in a conversation
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

# Identifies the messages of a conversation, surrounding whitespace aside
MessagesKey = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer.

    Attributes:
        messages: `{"role", "content"}` each: an optional system message, then user and assistant in turn.
        category: metrics are also reported by category.
    """

    messages: tuple[Mapping[str, str], ...]
    category: str = "all"

    @property
    def prompt(self) -> list[dict[str, str]]:
        """All messages except the last answer."""
        return [dict(message) for message in self.messages[:-1]]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.messages[-1]["content"]


@dataclass
class RecordCounts:
    """Number of records read, and of those left out, by reason."""

    read: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def num_lost(self) -> int:
        return self.lost.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.lost.items())
        return f"{self.read:,} records, {self.num_lost:,} left out" + (f" ({reasons})" if reasons else "")

    def check(self, max_lost_fraction: float) -> None:
        """Raise ValueError if more than this share of the records is left out."""
        if self.num_lost > max_lost_fraction * self.read:
            raise ValueError(
                f"{self}: more than max_lost_fraction={max_lost_fraction:.0%}. Raise --context_length for over-long "
                "records, correct the data for empty and duplicate ones, or raise --max_lost_fraction."
            )


class Record(dict[str, Any]):
    """A record, with its file and line for error messages."""

    def __init__(self, values: Mapping[str, Any], place: str):
        super().__init__(values)
        self.place = place


def load_records(dataset: str, config_name: str | None = None, split: str = "train") -> Iterator[Record]:
    """Read records from files or from the Hub.

    Args:
        dataset: a file, folder or glob of .json, .jsonl, .csv, .tsv or .parquet, optionally compressed (.gz, .zst); or
            the name of a dataset on the Hub.

    Raises:
        ValueError: no such file or dataset, or a file that cannot be read.
    """
    files = find_files(dataset, ROW_SUFFIXES)
    if files is not None:
        return (Record(row.values, row.place) for file in files for row in read_rows(file))
    rows = load_hub_dataset(dataset, config_name, split=split)
    return (Record(row, f"{dataset}, row {i}") for i, row in enumerate(rows, start=1))


def to_conversation(record: Mapping[str, Any], input_separator: str = "\n\n") -> Conversation | None:
    """Convert a record to a conversation.

    A record has one of three formats:

    - `messages` or `conversations`: a list, or a list as JSON text, of messages with `role` and `content` or `from`
      and `value`;
    - `prompt` and `completion`, each a text or a list of messages;
    - `instruction`, `output` and optionally `input` (Alpaca).

    A column `system` becomes the system message, and `category` the conversation's category. Without it, Alpaca
    records get the categories "with input" and "without input". User messages after the last answer are left out.
    Empty system messages too.

    Numbers are converted to text; null and NaN count as empty; a list of content parts of type `text` is joined. A
    boolean is an error, since its text could be "true", "True" or "yes".

    Args:
        input_separator: separates Alpaca's instruction from its input.

    Returns:
        The conversation; None if the text of a user or assistant message is empty.

    Raises:
        ValueError: an unknown format, a value that cannot be converted to text, or roles not in turn.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is {short(record)}. It must be an object with {FORMATS}.")
    given = {name for name, value in record.items() if not is_missing(value)}
    category = check_unicode(str(record["category"]), "category") if "category" in given else ""
    messages_column = next((name for name in ("messages", "conversations") if name in given), None)
    if messages_column:
        messages = _to_messages(record[messages_column], messages_column)
    elif "prompt" in given and "completion" in record:
        messages = [
            message
            for name, role in (("prompt", "user"), ("completion", "assistant"))
            for message in (
                _to_messages(record[name], name)
                if isinstance(record[name], (list, tuple))
                else [{"role": role, "content": _to_text(record[name], name)}]
            )
        ]
    elif "instruction" in given and "output" in record:
        text, context, output = (_to_text(record.get(name), name) for name in ("instruction", "input", "output"))
        # an input without an instruction leaves the prompt empty
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
        raise ValueError(f"a record has the fields {sorted(map(str, record))}. It must have {FORMATS}.")
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    system = _to_text(record.get("system"), "system")
    if system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})

    while messages and messages[-1]["role"] == "user":
        messages.pop()
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if "system" in [m["role"] for m in messages[1:]] or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"the roles of a record are {[message['role'] for message in messages]}: after at most one 'system', "
            "'user' and 'assistant' must take turns."
        )
    if not roles or any(not message["content"].strip() for message in messages):
        return None
    return Conversation(tuple(messages), category or "all")


def _to_messages(value: Any, name: str) -> list[dict[str, str]]:
    """Convert a list of messages, or its JSON text, to messages with `role` and `content`.

    Args:
        name: the field, for error messages.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} is the text {short(value)}, which is not JSON ({error}). Use a list of messages."
            ) from error
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {short(value)}. Use a list of messages, each with role and content.")
    messages = []
    for i, message in enumerate(value):
        field_name = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{field_name} is {short(message)}. Use an object with role and content.")
        for calls in ("tool_calls", "function_call"):
            if not is_missing(message.get(calls)) and message[calls]:
                raise ValueError(
                    f"{field_name} has {calls}={short(message[calls])}, which the chat templates do not support: "
                    "leave this record out, or write the call as text into content."
                )
        role_name, role = _first_present(message, "role", "from")
        content_name, content = _first_present(message, "content", "value")
        if not {"content", "value", "tool_calls", "function_call"} & set(message):
            raise ValueError(
                f"{field_name} has the fields {sorted(map(str, message))}. It must have role and content, or from and "
                "value."
            )
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{field_name}.{role_name} is {short(role)}. Use one of {', '.join(ROLES)}.")
        messages.append({"role": ROLES[role], "content": _join_parts(content, f"{field_name}.{content_name}")})
    return messages


def _first_present(message: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Return name and value of the first field that is not missing; of the first field if all are missing."""
    name = next((name for name in names if not is_missing(message.get(name))), names[0])
    return name, message.get(name)


def _join_parts(value: Any, name: str) -> str:
    """Convert a message's content, a value or a list of text parts, to text."""
    if not isinstance(value, (list, tuple)):
        return _to_text(value, name)
    texts = []
    for i, part in enumerate(value):
        if isinstance(part, Mapping):
            kind = part.get("type", "text" if "text" in part else None)
            if kind != "text":
                raise ValueError(
                    f"{name}[{i}] is a part of type {short(kind)}. Only parts of type 'text' are supported: "
                    "leave this part or this record out."
                )
            part = part.get("text")
        texts.append(_to_text(part, f"{name}[{i}]"))
    return "".join(texts)


def _to_text(value: Any, name: str) -> str:
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
            raise ValueError(f"{name} is a number with too many digits ({error}). Give it as text.") from error
    raise ValueError(f"{name} is {short(value)}, of type {type(value).__name__}. Give it as text.")


def to_conversations(
    records: Iterable[Mapping[str, Any]], input_separator: str = "\n\n"
) -> tuple[list[Conversation], RecordCounts]:
    """Convert records to conversations. Empty and duplicate records are left out and counted.

    Raises:
        ValueError: as `to_conversation`; the message names the record.
    """
    conversations: dict[MessagesKey, Conversation] = {}
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
        key = _messages_key(conversation.messages)
        if key in conversations:
            counts.lost["duplicate"] += 1
        conversations.setdefault(key, conversation)
    return list(conversations.values()), counts


def _messages_key(messages: Iterable[Mapping[str, str]]) -> MessagesKey:
    return tuple((message["role"], message["content"].strip()) for message in messages)


def split_held_out(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations at random into a training set and a held-out set that share no prompt.

    Conversations with the same prompt (all messages before the last answer) form a group. Groups are drawn in random
    order, and groups larger than the remaining number are skipped. Warns if the held-out share is more than a third
    off `fraction`.

    Args:
        fraction: share of the conversations to hold out; at least one is.

    Returns:
        The training set and the held-out set.

    Raises:
        ValueError: fewer than two distinct prompts.
    """
    by_prompt: dict[MessagesKey, list[Conversation]] = {}
    for conversation in conversations:
        by_prompt.setdefault(_messages_key(conversation.messages[:-1]), []).append(conversation)
    groups = list(by_prompt.values())
    total = len(conversations)
    if len(groups) < 2:
        raise ValueError(
            f"the {total:,} conversations have {len(groups)} distinct prompt. At least two are required, one of them "
            "for the held-out set. Add records with other prompts."
        )
    order: list[int] = seeded_generator(seed, 0).permutation(len(groups)).tolist()
    target = min(max(round(fraction * total), 1), total - 1)
    chosen: list[int] = []
    num = 0
    for i in order:
        if num + len(groups[i]) <= target:
            chosen.append(i)
            num += len(groups[i])
    # add one more group if there is none yet, or if that comes closer to the target
    taken = set(chosen)
    remaining = [i for i in order if i not in taken and num + len(groups[i]) < total]
    if remaining and num < target:
        smallest = min(remaining, key=lambda i: len(groups[i]))
        if not chosen or num + len(groups[smallest]) - target < target - num:
            chosen.append(smallest)
            num += len(groups[smallest])
    if abs(num - fraction * total) > max(fraction * total / 3, 1):
        warnings.warn(
            f"validation_fraction={fraction:g} asks for {fraction * total:,.0f} of {total:,} conversations. The "
            f"held-out set has {num:,} ({num / total:.1%}) of {len(chosen):,} prompts, because conversations with the "
            f"same prompt stay together: of {len(groups):,} prompts, the largest has {max(map(len, groups)):,}.",
            stacklevel=2,
        )
    taken = set(chosen)
    training = [c for i, group in enumerate(groups) if i not in taken for c in group]
    return training, [c for i in chosen for c in groups[i]]


def tale_conversations(
    num: int | None = None, num_held_out: int | None = None
) -> tuple[list[Conversation], list[Conversation], RecordCounts]:
    """Return the embedded conversations about the tales.

    Returns:
        The training set; the held-out set, whose questions have combinations that training does not contain; and the
        counts of the training set.
    """
    from ..data.tales.instructions import held_out_records, training_records

    training, counts = to_conversations(training_records(num or NUM_TALE_RECORDS))
    held_out, _ = to_conversations(held_out_records(num_held_out or NUM_HELD_OUT_TALE_RECORDS))
    return training, held_out, counts
