"""From records to packed rows, token by token."""

import collections
import itertools
import json
import random
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.data.tales import instructions as tale_instructions
from hf_minigpt.instructions.data import (
    ConversationRows,
    InstructionCollator,
    MixedRows,
    PackedRows,
    RecordCounts,
    colored,
    load_records,
    pack_best_fit,
    split_held_out,
    tale_conversations,
    to_conversation,
    to_conversations,
    tokenize_conversations,
)
from hf_minigpt.tokenization import CHAT_FORMATS, add_chat_template, train_character_tokenizer, train_tokenizer
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


def byte_tokenizer(chat_format="roles"):
    texts = ["What is the answer to it? The answer is in the box, and the box is here. ### Response:\n"] * 9
    tokenizer = train_tokenizer(texts, 320, model_max_length=256, show_progress=False)
    add_chat_template(tokenizer, chat_format)
    return tokenizer


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
def test_ids_and_mask_are_as_written_by_hand(record, chat_format, expected):
    tokenizer = character_tokenizer(chat_format)
    conversation = to_conversation(record, "\n\n### Input:\n" if chat_format == "alpaca" else "\n\n")
    data = tokenize_conversations(tokenizer, [conversation], 512)
    tokens = tokenizer.convert_ids_to_tokens(data.tokens.tolist())
    assert list(zip(tokens, data.trained.tolist(), strict=True)) == expected
    row = ConversationRows(data)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()) == [token for token, _ in expected[:-1]]
    labels = [tokenizer.convert_tokens_to_ids(token) if trained else -100 for token, trained in expected[1:]]
    assert row["shift_labels"].tolist() == labels

    everything = tokenize_conversations(tokenizer, [conversation], 512, train_on_prompt=True)
    assert everything.trained.tolist() == [False] + [True] * (len(expected) - 1)


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_what_generation_is_prompted_with_is_what_was_trained(chat_format):
    """With a BPE, whose tokens could reach over the border."""
    tokenizer = byte_tokenizer(chat_format)
    messages = [
        {"role": "user", "content": "What is the answer to it?  "},
        {"role": "assistant", "content": "\n  The answer is in the box."},
        {"role": "user", "content": "the box"},
        {"role": "assistant", "content": "here\n"},
    ]
    data = tokenize_conversations(tokenizer, [to_conversation({"messages": messages})], 512)
    trained = np.flatnonzero(data.trained[1:] & ~data.trained[:-1]) + 1
    for turn, begin in zip((1, 3), trained, strict=True):
        ids = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert ids == data.tokens[:begin].tolist()


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_a_quoted_special_token_does_not_act(chat_format):
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


def test_a_template_is_kept_if_it_marks_what_is_generated(tmp_path):
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


def test_a_template_that_trains_no_end_is_refused():
    tokenizer = character_tokenizer()
    conversation = to_conversation({"prompt": "Hi", "completion": "Yo"})
    good = tokenizer.chat_template
    unmarked = good.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    for bad in (good.replace("text + eos_token", "text"), unmarked):
        tokenizer.chat_template = bad
        with pytest.raises(ValueError, match="must mark each answer"):
            tokenize_conversations(tokenizer, [conversation], 64)


def test_what_is_left_out_is_counted():
    records = [
        {"instruction": "a", "input": "", "output": "1"},
        {"instruction": "a ", "input": None, "output": "1"},
        {"instruction": " ", "input": "b", "output": "1"},
        {"instruction": "a", "input": "", "output": ""},
        {"instruction": "c" * 99, "input": "", "output": "2"},
        {"prompt": "d", "completion": "3"},
    ]
    conversations, counts = to_conversations(records)
    data = tokenize_conversations(character_tokenizer(), conversations, 20, counts)
    assert [c.answer for c in data.conversations] == ["1", "3"]
    assert dict(counts.lost) == {"duplicate": 1, "empty": 2, "over-long": 1}
    assert str(counts) == "6 records, 4 left out (1 duplicate, 2 empty, 1 over-long)"
    counts.check(0.7)
    with pytest.raises(ValueError, match=r"4 left out.*more than max_lost_fraction=60%.*--context_length"):
        counts.check(0.6)
    # an exact fit is none too long
    length = int(data.lengths.max())
    assert len(tokenize_conversations(character_tokenizer(), data.conversations, length)) == 2
    assert len(tokenize_conversations(character_tokenizer(), data.conversations, length - 1)) == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"record 1: a record has the fields \['text'\], and needs 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}] * 2 + CHAT[2:3]}, "must take turns"),
        ({"messages": [*CHAT[1:3], CHAT[0], *CHAT[3:]]}, "must take turns"),
        ({"messages": [{"role": "tool", "content": "a"}, *CHAT[2:3]]}, "must take turns"),
    ],
)
def test_a_malformed_record_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        to_conversations([{"prompt": "a", "completion": "b"}, record])


NAN = float("nan")
QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def ask(**changes):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | changes]


def texts(*parts):
    return [{"type": "text", "text": part} for part in parts]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # numbers
        ({"instruction": "q", "output": 7}, ["q", "7"]),
        ({"instruction": "q", "output": 0}, ["q", "0"]),
        ({"instruction": "q", "output": 2.5}, ["q", "2.5"]),
        ({"instruction": "q", "output": np.int64(3)}, ["q", "3"]),
        ({"instruction": 1, "input": 0, "output": 2}, ["1\n\n0", "2"]),
        ({"prompt": 1, "completion": 0}, ["1", "0"]),
        ({"messages": ask(content=0)}, ["q", "0"]),
        # nothing
        ({"instruction": "q", "input": NAN, "output": "a"}, ["q", "a"]),
        ({"instruction": "q", "output": NAN}, None),
        ({"instruction": "q", "output": None}, None),
        ({"instruction": None, "output": "a"}, None),
        ({"prompt": NAN, "completion": "a"}, None),
        ({"prompt": "q", "completion": None}, None),
        ({"messages": None}, None),
        ({"messages": []}, None),
        ({"messages": " "}, None),
        ({"messages": ask(content=None)}, None),
        # columns of another format, as tables have them
        ({"messages": None, "prompt": NAN, "completion": None, "instruction": "q", "output": "a"}, ["q", "a"]),
        # content in parts
        ({"messages": ask(content=texts("a", "b"))}, ["q", "ab"]),
        ({"messages": ask(content=["a", "b"])}, ["q", "ab"]),
        ({"messages": ask(content=[])}, None),
        # other names
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": 4}]}, ["q", "4"]),
        ({"conversations": [{"role": None, "from": "human", "value": "q"}, QA[1]]}, ["q", "a"]),
        ({"messages": [{"from": "system", "value": "S"}, *QA]}, ["S", "q", "a"]),
        ({"messages": [{"role": "developer", "content": "S"}, *QA]}, ["S", "q", "a"]),
        # JSON in a string
        ({"messages": json.dumps(QA)}, ["q", "a"]),
        ({"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])}, ["q", "a"]),
        # a prompt is text, whatever it looks like
        ({"prompt": "[1, 2]", "completion": "a"}, ["[1, 2]", "a"]),
        # a system without text
        *(({"messages": [{"role": "system", "content": no}, *QA]}, ["q", "a"]) for no in ("", " ", None, NAN, [])),
        *(({"messages": QA, "system": empty}, ["q", "a"]) for empty in ("", " \n", None, NAN)),
        ({"messages": [{"role": "system", "content": ""}, *QA], "system": "S"}, ["S", "q", "a"]),
        ({"prompt": "q", "completion": "a", "system": 1}, ["1", "q", "a"]),
        # a call that is none
        ({"messages": ask(tool_calls=[])}, ["q", "a"]),
        ({"messages": ask(tool_calls=NAN)}, ["q", "a"]),
        ({"messages": [QA[0], {"role": "assistant", "tool_calls": []}]}, None),
    ],
)  # fmt: skip
def test_shapes_of_records_that_are_read(record, expected):
    conversation = to_conversation(record)
    assert (conversation and [message["content"] for message in conversation.messages]) == expected
    if conversation:
        roles = ["system"] * (len(expected) - 2) + ["user", "assistant"]
        assert [message["role"] for message in conversation.messages] == roles


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "q", "output": True}, "output is True, a value of type bool: give it as text"),
        ({"instruction": "q", "output": {"x": 1}}, "output is {'x': 1}, a value of type dict: give it as text"),
        ({"instruction": ["q"], "output": "a"}, r"instruction is \['q'\], a value of type list"),
        ({"instruction": "q", "input": [], "output": "a"}, "input is .*list"),
        ({"instruction": "q", "output": float("inf")}, "output is inf"),
        ({"instruction": "q", "output": 10**5000}, "output is a number too long"),
        ({"prompt": {"x": 1}, "completion": "a"}, "prompt is .*dict"),
        ({"prompt": "q", "completion": False}, "completion is False"),
        ({"messages": QA, "system": ["S"]}, "system is .*list"),
        ({"messages": ask(content=True)}, r"messages\[1\]\.content is True"),
        ({"messages": ask(content={"x": 1})}, r"messages\[1\]\.content is .*dict"),
        ({"messages": ask(content=[{"type": "image", "url": "u"}])}, r"content\[0\] is a part of type 'image'"),
        ({"messages": ask(content=[{"x": 1}])}, r"content\[0\] is a part of type None"),
        ({"messages": ask(content=texts(["a"]))}, r"content\[0\] is .*list"),
        ({"messages": ask(tool_calls=[{"id": "1"}])}, r"messages\[1\] has tool_calls=.*leave this record out"),
        ({"messages": ask(function_call={"name": "f"})}, r"messages\[1\] has function_call="),
        ({"messages": ask(role="tool")}, r"messages\[1\]\.role is 'tool': choose one of system, developer, user"),
        ({"messages": ask(role=None)}, r"messages\[1\]\.role is None"),
        ({"messages": ask(role=["user"])}, r"messages\[1\]\.role is \['user'\]"),
        ({"messages": [{"from": "bot", "value": "q"}]}, r"messages\[0\]\.from is 'bot'"),
        ({"messages": [QA[0], {"role": "assistant", "text": "a"}]}, r"messages\[1\] has the fields .*'text'"),
        ({"messages": ["q", "a"]}, r"messages\[0\] is 'q': give an object"),
        ({"messages": {"role": "user"}}, "messages is .*: give a list of messages"),
        ({"messages": 3}, "messages is 3: give a list"),
        ({"messages": "q: a"}, "messages is the text 'q: a', which is no JSON"),
        ({"messages": "[" * 100_000}, "messages is the text"),
        ({"messages": '{"role": "user"}'}, "messages is .*: give a list"),
        ({"conversations": ["q"]}, r"conversations\[0\] is 'q'"),
        ({"prompt": QA[:1], "completion": [{"role": "robot", "content": "a"}]}, r"completion\[0\]\.role is 'robot'"),
        ({None: ["x"], "text": "a"}, r"fields \['None', 'text'\]"),
        (["q", "a"], "a record is .*object"),
        ({"instruction": "q", "output": "cut \ud83d"}, r"output has '\\ud83d' at character 4, half of a character"),
        ({"prompt": "\udc00", "completion": "a"}, "prompt has"),
        ({"messages": ask(content="\ud83d")}, r"messages\[1\]\.content has"),
        ({"messages": QA, "system": "\ud83d"}, "system has"),
        ({"messages": QA, "category": "\ud83d"}, "category has"),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, r"messages\[0\]\.content has"),
    ],
)
def test_values_that_are_no_text_are_refused_by_name(record, message):
    with pytest.raises(ValueError, match=f"^record 1: .*{message}") as caught:
        to_conversations([{"prompt": "a", "completion": "b"}, record])
    assert len(str(caught.value)) < 400
    str(caught.value).encode()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["user", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "tool_calls", "type", "text"]), inner)
    ),
    max_leaves=8,
)
FIELDS = ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "category"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_record_is_read_or_refused(record):
    try:
        conversation = to_conversation(record)
    except ValueError:
        return
    if conversation is not None:
        assert all(message["content"].strip() for message in conversation.messages)


def test_what_a_user_says_last_is_left_out():
    conversation = to_conversation({"messages": CHAT[:4], "category": "c"})
    assert [message["content"] for message in conversation.messages] == ["S", "Hi", "Yo"]
    assert conversation.category == "c" and to_conversation({"messages": CHAT[:2]}) is None
    assert to_conversation({"prompt": "a", "completion": "b", "system": "S"}).messages[0] == CHAT[0]


def test_all_files_give_the_same_records(tmp_path):
    records = [{"instruction": "NA", "input": "", "output": f"out, {i}\n"} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    table = datasets.Dataset.from_list(records)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    expected, _ = to_conversations(records)
    for suffix in ("json", "jsonl", "csv", "parquet"):
        assert to_conversations(load_records(str(tmp_path / f"a.{suffix}")))[0] == expected, suffix
    assert len(list(load_records(str(tmp_path)))) == 20
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "map.json").write_text("{}")
    for name, message in (
        ("bad.json", "bad.json, line 1, cannot be read"),
        ("map.json", r"map.json, line 1: a record has the fields \[\]"),
        ("no.json", "no file"),
    ):
        with pytest.raises(ValueError, match=message):
            to_conversations(load_records(str(tmp_path / name)))


def test_no_prompt_is_on_both_sides():
    records = [{"prompt": f"p{i % 20}", "completion": str(i)} for i in range(60)]
    conversations, _ = to_conversations(records)
    training, held_out = split_held_out(conversations, 0.25, seed=1)
    prompts = [{c.messages[0]["content"] for c in part} for part in (training, held_out)]
    assert len(training) == 45 and len(held_out) == 15 and not prompts[0] & prompts[1]
    assert split_held_out(conversations, 0.25, seed=1)[1] == held_out != split_held_out(conversations, 0.25, seed=2)[1]


def conversations_of(*sizes):
    """So many answers to each of several prompts."""
    return to_conversations(
        {"prompt": f"p{prompt}", "completion": str(i)} for prompt, size in enumerate(sizes) for i in range(size)
    )[0]


def test_a_prompt_is_all_that_comes_before_the_answer():
    """The last question alone would make two groups of these: 10 and 190 records."""
    turns = [("go on" if i % 20 else "and then?", str(i)) for i in range(200)]
    records = [
        {"messages": [*QA, {"role": "user", "content": f"tale {answer}"}, QA[1], {"role": "user", "content": question},
                      {"role": "assistant", "content": answer}]}
        for question, answer in turns
    ]  # fmt: skip
    conversations, _ = to_conversations(records)
    for seed in range(5):
        training, held_out = split_held_out(conversations, 0.1, seed)
        assert (len(training), len(held_out)) == (180, 20)


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([190, *[1] * 10], 0.05, 10),  # the large one is passed over
        ([50, 30, *[2] * 10], 0.1, 10),
        ([7] * 20, 0.1, 14),
        ([8] * 10, 0.25, 24),  # 16 and 24 are equally near; 20 is wanted
        ([1, 1], 0.1, 1),
        ([1] * 9, 0.99, 8),  # training is never empty
    ],
)
def test_the_share_is_one_of_conversations(sizes, fraction, expected, recwarn):
    for seed in range(5):
        training, held_out = split_held_out(conversations_of(*sizes), fraction, seed)
        assert len(training) + len(held_out) == sum(sizes) and training
        assert len(held_out) == expected or (expected == 24 and len(held_out) == 16)
    assert not recwarn.list


@pytest.mark.parametrize(("sizes", "num"), [([190, 10], 10), ([100, 100], 100), ([60, 40, 100], 40)])
def test_a_share_that_is_far_off_is_told(sizes, num):
    fraction = 0.1
    conversations = conversations_of(*sizes)
    with pytest.warns(UserWarning, match=rf"asks for 20 of 200 conversations; {num} \({num / 200:.1%}\) of 1 prompts"):
        training, held_out = split_held_out(conversations, fraction, seed=0)
    assert len(held_out) == num and len(training) == 200 - num


def test_one_prompt_cannot_be_split():
    with pytest.raises(ValueError, match="the 9 conversations have 1 distinct prompt: at least two are needed"):
        split_held_out(conversations_of(9), 0.1, seed=0)


# Packing


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_packing_is_best_fit_decreasing(lengths, row_length):
    rows = pack_best_fit(np.array(lengths), row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    # the plain algorithm, a search over all rows for each piece
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(row_length - length)
    assert sorted(row_length - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)


def some_data(num=30, tokenizer=None):
    rng = random.Random(0)
    words = ["the box", "answer", "is", "here", "it", "to", "what"]

    def text(longest):
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    records = []
    for _ in range(num):
        turns = [m for _ in range(rng.randint(1, 2)) for m in (("user", text(3)), ("assistant", text(4)))]
        records.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    conversations, _ = to_conversations(records)
    return tokenize_conversations(tokenizer or byte_tokenizer(), conversations, 64)


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_is_the_sum_over_records_alone(name, attention):
    tokenizer = byte_tokenizer()
    data = some_data(tokenizer=tokenizer)
    vocab_size = len(tokenizer)
    model = tiny_model(name, attn_implementation=attention, vocab_size=vocab_size, unpadded_vocab_size=None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
    for i in range(len(data)):
        begin, end = data.offsets[i : i + 2]
        ids = torch.from_numpy(data.tokens[begin:end].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(data.trained[begin:end]), -100)
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


def test_each_epoch_packs_anew():
    data = some_data(60)

    def epoch(number):
        rows.set_epoch(number)
        return [tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows))]

    def pieces(packed):
        """The conversations in a packing, each begins with the end-of-text token at position 0."""
        found = []
        for i in range(len(packed)):
            row = packed[i]
            starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), len(row["input_ids"])]
            found += [tuple(row["input_ids"][a:b].tolist()) for a, b in itertools.pairwise(starts)]
        return sorted(found)

    rows = PackedRows(data, 48, seed=3)
    first = epoch(0)
    expected = sorted(tuple(data.piece(i)["input_ids"].tolist()) for i in range(len(data)))
    assert pieces(rows) == expected and rows.fill == pytest.approx(sum(map(len, first)) / (48 * len(rows)))
    second = epoch(1)
    assert pieces(rows) == expected and sorted(second) != sorted(first)
    rows = PackedRows(data, 48, seed=3)
    assert epoch(1) == second and epoch(0) == first
    with pytest.raises(ValueError, match="row_length=5 has no room"):
        PackedRows(data, 5)


def test_one_record_a_row_needs_neither_positions_nor_mask():
    data = some_data(4)
    batch = InstructionCollator(1)([data.piece(i) for i in range(4)])
    assert set(batch) == {"input_ids", "labels", "shift_labels"}
    assert batch["input_ids"].shape == (4, data.lengths.max())
    assert (batch["labels"] != -100).sum() == data.num_trained


def test_a_share_of_the_rows_is_text():
    data = some_data(60)
    packed = PackedRows(data, 48)
    text = [{"input_ids": torch.full((48,), 9), "shift_labels": torch.full((48,), 9)} for _ in range(3)]
    rows = MixedRows(packed, text, 0.25)
    is_text = [(rows[i]["input_ids"] == 9).all().item() for i in range(len(rows))]
    assert sum(is_text) / len(rows) == pytest.approx(0.25, abs=0.02)
    assert InstructionCollator(1)(rows.__getitems__(range(len(rows))))["position_ids"].shape == (len(rows), 48)


# The embedded instructions

TALE = (
    "Once upon a time, Anna the baker lived in a mill. The baker liked the mill, because it was cold. The baker "
    "owned a golden key and was proud of the key. Not far away, Otto the sailor rented a barn. The sailor found the "
    "barn too dark. His aunt gave the sailor a blue drum but missed the drum.\n\nAt dawn Otto drove to the mill. Anna "
    "the baker was in the mill, reading. Anna gave Otto the key.\n\nAt noon Otto rode to a white tower. Otto hid the "
    "drum in the tower."
)
ANSWERS = {
    "Who is the tale about?": "This is a tale of Anna the baker.",
    "Who is in the tale?": "There are Anna the baker and Otto the sailor.",
    "Where do they live?": "Anna lived in a mill and Otto lived in a barn.",
    "Where is Anna?": "Now Anna is in the mill.",
    "Where is Otto?": "Now Otto is in the tower.",
    "Which things are in the tale?": "The tale has a key and a drum.",
    "Where is the key?": "At last the key belonged to Otto.",
    "Where is the drum?": "At last the drum stayed in the tower.",
}


def test_the_tales_answers_are_right():
    excerpt = tale_instructions.Excerpt(TALE, tales.parse(TALE).world)
    rng = random.Random(0)
    found = {}
    for _ in range(400):
        for ask in tale_instructions.ABOUT_A_TALE.values():
            question = ask(excerpt, rng)
            found[question.text] = question.answer
    assert {text: found[text] for text in ANSWERS} == ANSWERS
    assert found["Tell me where Anna is."] == ANSWERS["Where is Anna?"]


def test_tasks_without_a_tale_are_right():
    rng = random.Random(0)
    for _ in range(50):
        rewrite, opening = tale_instructions._ask_rewrite(rng), tale_instructions._ask_opening(rng)
        assert tales.match_sentence(rewrite.answer)[0] == "give" and rewrite.answer not in rewrite.text
        for word in rewrite.combination[1:]:
            assert word in rewrite.text and word in rewrite.answer
        kind, values = tales.match_sentence(opening.answer)
        assert kind == "opening" and set(values.values()) == set(opening.combination[1:])
        assert all(word in opening.text for word in opening.combination[1:])


def test_held_out_combinations_are_not_trained():
    training = list(tale_instructions.training_records(400))
    held_out = list(tale_instructions.held_out_records(120))
    assert collections.Counter(r["category"] for r in held_out) == dict.fromkeys(tale_instructions.CATEGORIES, 15)

    def asked(record, turns):
        """Questions by what they turn on, read from the text: the people in the tale, and the answer."""
        told = record["messages"][0]["content"]
        cast = tuple(dict.fromkeys(re.findall(r"[A-Z][a-z]+ the [a-z]+(?=[ ,])", told)))
        return {(cast, record["messages"][turn]["content"]) for turn in turns if len(cast) == 2}

    trained = set().union(*(asked(record, range(1, len(record["messages"]), 2)) for record in training))
    kept = [record for record in held_out if record["category"] in ("hero", "people")]
    combinations = set().union(*(asked(record, [-1]) for record in kept))
    assert len(combinations) > 20 and len(trained) > 400 and not trained & combinations
    # by their own account, too
    rng = random.Random(0)
    shares = [
        tale_instructions.is_held_out(ask(tale_instructions.draw_excerpt(rng), rng).combination)
        for ask in tale_instructions.ABOUT_A_TALE.values()
        for _ in range(60)
    ]
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.05)
    assert list(tale_instructions.training_records(5)) == training[:5]


def test_embedded_conversations_fit_a_base_model_of_the_tales():
    training, held_out, counts = tale_conversations(200, 16)
    assert counts.read == 200 and len(training) == 200 - counts.num_lost
    assert max(len(c.messages) for c in training) == 10 and {c.category for c in held_out} == set(
        tale_instructions.CATEGORIES
    )


def test_trained_tokens_are_shown_in_colour():
    tokenizer = character_tokenizer()
    data = tokenize_conversations(tokenizer, [to_conversation({"messages": CHAT[1:3]})], 64)
    assert (
        colored(tokenizer, data, 0)
        == "\033[2m<|endoftext|><|user|>Hi<|assistant|>\033[0m\033[32mYo<|endoftext|>\033[0m"
    )
    assert RecordCounts(3).num_lost == 0
