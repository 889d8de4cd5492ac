"""Tokenizing, packing and collating conversations, token by token."""

import collections
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_minigpt.instructions.records import RecordCounts, to_conversation, to_conversations
from hf_minigpt.instructions.rows import (
    ConversationRows,
    InstructionCollator,
    MixedRows,
    PackedRows,
    highlight_loss_tokens,
    pack_best_fit,
    tokenize_conversations,
)
from hf_minigpt.tokenization import CHAT_FORMATS, add_chat_template, train_character_tokenizer
from tests.instructions.tiny_chat import WORDS, byte_tokenizer
from tests.tiny import POSITIONS, tiny_model


EOS, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"
LETTERS = "".join(map(chr, range(32, 127))) + "\n"
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "4 !"},
]


def character_tokenizer(chat_format="roles"):
    tokenizer = train_character_tokenizer([LETTERS], model_max_length=512)
    add_chat_template(tokenizer, chat_format)
    return tokenizer


def chat_tokenizer(chat_format="roles"):
    tokenizer = byte_tokenizer()
    add_chat_template(tokenizer, chat_format)
    return tokenizer


def conversation(prompt, completion):
    return to_conversation({"prompt": prompt, "completion": completion})


def prompt(*parts):
    return [(token, False) for part in parts for token in ([part] if part.startswith("<|") else part)]


def answer(text):
    return [(token, True) for token in [*text, EOS]]


HEADER = "Below is an instruction that describes a task"
ASK = ". Write a response that appropriately completes the request.\n\n"
CONTEXT = ", paired with an input that provides further context"
EXPECTED = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "roles",
     [*prompt(EOS, USER, "Add.\n\n1 2", ASSISTANT), *answer("3")]),
    ({"instruction": "Hi", "input": "", "output": " Yo "}, "roles",
     [*prompt(EOS, USER, "Hi", ASSISTANT), *answer("Yo")]),
    ({"prompt": "Hi", "completion": "Yo"}, "roles", [*prompt(EOS, USER, "Hi", ASSISTANT), *answer("Yo")]),
    ({"prompt": CHAT[:-1], "completion": CHAT[-1:]}, "roles",
     [*prompt(EOS, SYSTEM, "S", USER, "Hi", ASSISTANT), *answer("Yo"), *prompt(USER, "2?", ASSISTANT),
      *answer("4 !")]),
    ({"messages": CHAT}, "roles",
     [*prompt(EOS, SYSTEM, "S", USER, "Hi", ASSISTANT), *answer("Yo"), *prompt(USER, "2?", ASSISTANT),
      *answer("4 !")]),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca",
     [*prompt(EOS, HEADER + CONTEXT + ASK + "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
      *answer("3")]),
    ({"prompt": "Hi", "completion": "Yo"}, "alpaca",
     [*prompt(EOS, HEADER + ASK + "### Instruction:\nHi\n\n### Response:\n"), *answer("Yo")]),
    ({"messages": CHAT[1:]}, "alpaca",
     [*prompt(EOS, HEADER + ASK + "### Instruction:\nHi\n\n### Response:\n"), *answer("Yo"),
      *prompt("\n\n### Instruction:\n2?\n\n### Response:\n"), *answer("4 !")]),
    ({"messages": CHAT}, "alpaca",
     [*prompt(EOS, "S\n\n### Instruction:\nHi\n\n### Response:\n"), *answer("Yo"),
      *prompt("\n\n### Instruction:\n2?\n\n### Response:\n"), *answer("4 !")]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "chat_format", "expected"), EXPECTED)
def test_ids_and_loss_mask_match_the_template(record, chat_format, expected):
    tokenizer = character_tokenizer(chat_format)
    conversation = to_conversation(record, "\n\n### Input:\n" if chat_format == "alpaca" else "\n\n")
    data = tokenize_conversations(tokenizer, [conversation], 512)
    tokens = tokenizer.convert_ids_to_tokens(data.tokens.tolist())
    assert list(zip(tokens, data.loss_mask.tolist(), strict=True)) == expected
    row = ConversationRows(data)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()) == [token for token, _ in expected[:-1]]
    labels = [tokenizer.convert_tokens_to_ids(token) if trained else -100 for token, trained in expected[1:]]
    assert row["shift_labels"].tolist() == labels

    everything = tokenize_conversations(tokenizer, [conversation], 512, train_on_prompt=True)
    assert everything.loss_mask.tolist() == [False] + [True] * (len(expected) - 1)


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_the_generation_prompt_equals_the_training_tokens(chat_format):
    """A BPE could merge the end of a prompt with the start of the answer."""
    tokenizer = chat_tokenizer(chat_format)
    messages = [
        {"role": "user", "content": "What is the answer to it?  "},
        {"role": "assistant", "content": "\n  The answer is in the box."},
        {"role": "user", "content": "the box"},
        {"role": "assistant", "content": "here\n"},
    ]
    data = tokenize_conversations(tokenizer, [to_conversation({"messages": messages})], 512)
    trained = np.flatnonzero(data.loss_mask[1:] & ~data.loss_mask[:-1]) + 1
    for turn, begin in zip((1, 3), trained, strict=True):
        ids = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert ids == data.tokens[:begin].tolist()


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_special_tokens_in_a_message_are_plain_text(chat_format):
    tokenizer = character_tokenizer(chat_format)
    special = "<|endoftext|> <|pad|>" + (" <|system|> <|user|> <|assistant|>" if chat_format == "roles" else "")
    plain, quoting = (
        tokenize_conversations(tokenizer, [to_conversation({"prompt": text, "completion": text})], 512)
        for text in ("hello", special)
    )
    counts = [
        collections.Counter(t for t in data.tokens.tolist() if t in tokenizer.all_special_ids)
        for data in (plain, quoting)
    ]
    assert counts[0] == counts[1]


def test_the_tokenizer_s_own_template_is_kept_if_it_marks_answers(tmp_path):
    tokenizer = character_tokenizer("alpaca")
    assert add_chat_template(tokenizer) == 0 and "### Response" in tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    assert add_chat_template(tokenizer) == 3
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template and len(loaded) == len(tokenizer)
    assert loaded.convert_tokens_to_ids(USER) == tokenizer.convert_tokens_to_ids(USER)
    with pytest.raises(ValueError, match="chat_format='chatml' is unknown: choose one of roles, alpaca"):
        add_chat_template(tokenizer, "chatml")


def test_a_template_without_marked_answers_or_end_token_is_refused():
    tokenizer = character_tokenizer()
    conversation = to_conversation({"prompt": "Hi", "completion": "Yo"})
    good = tokenizer.chat_template
    unmarked = good.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    for bad in (good.replace("text + eos_token", "text"), unmarked):
        tokenizer.chat_template = bad
        with pytest.raises(ValueError, match="does not mark each answer"):
            tokenize_conversations(tokenizer, [conversation], 64)


def test_over_long_conversations_are_left_out_and_counted():
    conversations = [conversation("a", "1"), conversation("c" * 99, "2"), conversation("d", "3")]
    counts = RecordCounts(3)
    data = tokenize_conversations(character_tokenizer(), conversations, 20, counts)
    assert [c.answer for c in data.conversations] == ["1", "3"]
    assert dict(counts.lost) == {"over-long": 1}
    length = int(data.lengths.max())
    assert len(tokenize_conversations(character_tokenizer(), data.conversations, length)) == 2
    assert len(tokenize_conversations(character_tokenizer(), data.conversations, length - 1)) == 0


def test_tokens_of_the_loss_are_green():
    tokenizer = character_tokenizer()
    data = tokenize_conversations(tokenizer, [to_conversation({"messages": CHAT[1:3]})], 64)
    assert (
        highlight_loss_tokens(tokenizer, data, 0)
        == "\033[2m<|endoftext|><|user|>Hi<|assistant|>\033[0m\033[32mYo<|endoftext|>\033[0m"
    )


# Packing


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_packing_is_best_fit_decreasing(lengths, row_length):
    rows = pack_best_fit(np.array(lengths), row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    # the plain algorithm, a search over all rows for each item
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(row_length - length)
    assert sorted(row_length - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)


def some_data(num=30, tokenizer=None):
    """Tokenized conversations of one or two turns."""
    rng = random.Random(0)

    def text(longest):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    records = []
    for _ in range(num):
        turns = [m for _ in range(rng.randint(1, 2)) for m in (("user", text(3)), ("assistant", text(4)))]
        records.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    conversations, _ = to_conversations(records)
    return tokenize_conversations(tokenizer or chat_tokenizer(), conversations, 64)


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_equals_the_sum_over_single_records(name, attention):
    tokenizer = chat_tokenizer()
    data = some_data(tokenizer=tokenizer)
    vocab_size = len(tokenizer)
    model = tiny_model(name, attn_implementation=attention, vocab_size=vocab_size, unpadded_vocab_size=None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
    for i in range(len(data)):
        begin, end = data.offsets[i : i + 2]
        ids = torch.from_numpy(data.tokens[begin:end].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(data.loss_mask[begin:end]), -100)
        loss = model(ids, labels=labels, num_items_in_batch=1).loss
        total += loss.item()
        for sums, gradient in zip(gradients, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            sums += 0 if gradient is None else gradient

    rows = PackedRows(data, 64, seed=3)
    assert len(rows) < len(data) / 2
    batch = InstructionCollator(tokenizer.pad_token_id)(rows.__getitems__(range(len(rows))))
    assert (batch["input_ids"] == tokenizer.pad_token_id).any()
    model.train()
    loss = model(**batch, num_items_in_batch=1).loss
    assert loss.item() == pytest.approx(total, rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for expected, found in zip(gradients, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * largest)


def test_each_epoch_has_another_packing():
    data = some_data(60)

    def epoch(number):
        rows.set_epoch(number)
        return [tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows))]

    def unpack(packed):
        """The conversations in the rows, split where `position_ids` restart."""
        found = []
        for i in range(len(packed)):
            row = packed[i]
            starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), len(row["input_ids"])]
            found += [tuple(row["input_ids"][a:b].tolist()) for a, b in itertools.pairwise(starts)]
        return sorted(found)

    rows = PackedRows(data, 48, seed=3)
    first = epoch(0)
    expected = sorted(tuple(data.row(i)["input_ids"].tolist()) for i in range(len(data)))
    assert unpack(rows) == expected and rows.fill == pytest.approx(sum(map(len, first)) / (48 * len(rows)))
    second = epoch(1)
    assert unpack(rows) == expected and sorted(second) != sorted(first)
    rows = PackedRows(data, 48, seed=3)
    assert epoch(1) == second and epoch(0) == first
    with pytest.raises(ValueError, match="row_length=5 is shorter than the longest conversation"):
        PackedRows(data, 5)


def test_single_records_have_neither_positions_nor_mask():
    data = some_data(4)
    batch = InstructionCollator(1)([data.row(i) for i in range(4)])
    assert set(batch) == {"input_ids", "labels", "shift_labels"}
    assert batch["input_ids"].shape == (4, data.lengths.max())
    assert (batch["labels"] != -100).sum() == data.num_trained


def test_mixed_rows_have_the_requested_share_of_text():
    data = some_data(60)
    packed = PackedRows(data, 48)
    text = [{"input_ids": torch.full((48,), 9), "shift_labels": torch.full((48,), 9)} for _ in range(3)]
    rows = MixedRows(packed, text, 0.25)
    is_text = [(rows[i]["input_ids"] == 9).all().item() for i in range(len(rows))]
    assert sum(is_text) / len(rows) == pytest.approx(0.25, abs=0.02)
    assert InstructionCollator(1)(rows.__getitems__(range(len(rows))))["position_ids"].shape == (len(rows), 48)


def test_the_collator_gives_the_lengths_of_the_conversations():
    """Attention on a GPU then does not wait to find them. Padding counts as conversations."""
    rows = PackedRows(some_data(40), 48, seed=1)
    batch = InstructionCollator(1)(rows.__getitems__(range(len(rows))))
    starts = batch["cu_seq_lens_q"].tolist()
    assert (starts[0], starts[-1]) == (0, batch["input_ids"].numel())
    positions = [list(range(end - start)) for start, end in itertools.pairwise(starts)]
    assert list(itertools.chain(*positions)) == batch["position_ids"].flatten().tolist()
    assert batch["max_length_q"] == batch["max_length_k"] == max(map(len, positions))
    assert torch.equal(batch["cu_seq_lens_k"], batch["cu_seq_lens_q"]) and batch["cu_seq_lens_q"].dtype == torch.int32
