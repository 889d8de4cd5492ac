"""Reading records, converting them to conversations, and splitting off a held-out set."""

import json

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_minigpt.instructions.records import (
    RecordCounts,
    load_records,
    split_held_out,
    to_conversation,
    to_conversations,
)


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "4 !"},
]


def test_left_out_records_are_counted():
    records = [
        {"instruction": "a", "input": "", "output": "1"},
        {"instruction": "a ", "input": None, "output": "1"},
        {"instruction": " ", "input": "b", "output": "1"},
        {"instruction": "a", "input": "", "output": ""},
        {"prompt": "d", "completion": "3"},
    ]
    conversations, counts = to_conversations(records)
    assert [c.answer for c in conversations] == ["1", "3"]
    assert dict(counts.lost) == {"duplicate": 1, "empty": 2}
    assert str(counts) == "5 records, 3 left out (1 duplicate, 2 empty)"
    counts.check(0.6)
    with pytest.raises(ValueError, match=r"3 left out.*more than max_lost_fraction=59%.*--context_length"):
        counts.check(0.59)
    assert str(RecordCounts(3)) == "3 records, 0 left out"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"record 1: a record has the fields \['text'\]\. It must have 'messages'"),
        ({"messages": [{"role": "user", "content": "a"}] * 2 + CHAT[2:3]}, "must take turns"),
        ({"messages": [*CHAT[1:3], CHAT[0], *CHAT[3:]]}, "must take turns"),
    ],
)
def test_a_malformed_record_is_refused_with_its_place(record, message):
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
        # missing values
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
        # empty columns of another format
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
        # a prompt is not parsed as JSON
        ({"prompt": "[1, 2]", "completion": "a"}, ["[1, 2]", "a"]),
        # an empty system message
        *(({"messages": [{"role": "system", "content": no}, *QA]}, ["q", "a"]) for no in ("", " ", None, NAN, [])),
        *(({"messages": QA, "system": empty}, ["q", "a"]) for empty in ("", " \n", None, NAN)),
        ({"messages": [{"role": "system", "content": ""}, *QA], "system": "S"}, ["S", "q", "a"]),
        ({"prompt": "q", "completion": "a", "system": 1}, ["1", "q", "a"]),
        # no tool call
        ({"messages": ask(tool_calls=[])}, ["q", "a"]),
        ({"messages": ask(tool_calls=NAN)}, ["q", "a"]),
        ({"messages": [QA[0], {"role": "assistant", "tool_calls": []}]}, None),
    ],
)  # fmt: skip
def test_a_record_becomes_a_conversation(record, expected):
    conversation = to_conversation(record)
    assert (conversation and [message["content"] for message in conversation.messages]) == expected
    if conversation:
        roles = ["system"] * (len(expected) - 2) + ["user", "assistant"]
        assert [message["role"] for message in conversation.messages] == roles


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "q", "output": True}, "output is True, of type bool. Give it as text"),
        ({"instruction": "q", "output": {"x": 1}}, "output is {'x': 1}, of type dict. Give it as text"),
        ({"instruction": ["q"], "output": "a"}, r"instruction is \['q'\], of type list"),
        ({"instruction": "q", "input": [], "output": "a"}, "input is .*list"),
        ({"instruction": "q", "output": float("inf")}, "output is inf"),
        ({"instruction": "q", "output": 10**5000}, "output is a number with too many digits"),
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
        ({"messages": ask(role="tool")}, r"messages\[1\]\.role is 'tool'\. Use one of system, developer, user"),
        ({"messages": ask(role=None)}, r"messages\[1\]\.role is None"),
        ({"messages": ask(role=["user"])}, r"messages\[1\]\.role is \['user'\]"),
        ({"messages": [{"from": "bot", "value": "q"}]}, r"messages\[0\]\.from is 'bot'"),
        ({"messages": [QA[0], {"role": "assistant", "text": "a"}]}, r"messages\[1\] has the fields .*'text'"),
        ({"messages": ["q", "a"]}, r"messages\[0\] is 'q'\. Use an object"),
        ({"messages": {"role": "user"}}, r"messages is .*\. Use a list of messages"),
        ({"messages": 3}, r"messages is 3\. Use a list"),
        ({"messages": "q: a"}, "messages is the text 'q: a', which is not JSON"),
        ({"messages": "[" * 100_000}, "messages is the text"),
        ({"messages": '{"role": "user"}'}, r"messages is .*\. Use a list"),
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
def test_a_value_that_is_not_text_is_refused_with_its_field(record, message):
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


def test_user_messages_after_the_last_answer_are_left_out():
    conversation = to_conversation({"messages": CHAT[:4], "category": "c"})
    assert [message["content"] for message in conversation.messages] == ["S", "Hi", "Yo"]
    assert conversation.category == "c" and to_conversation({"messages": CHAT[:2]}) is None
    assert to_conversation({"prompt": "a", "completion": "b", "system": "S"}).messages[0] == CHAT[0]


def test_all_file_formats_give_the_same_records(tmp_path):
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


def test_the_two_sets_share_no_prompt():
    records = [{"prompt": f"p{i % 20}", "completion": str(i)} for i in range(60)]
    conversations, _ = to_conversations(records)
    training, held_out = split_held_out(conversations, 0.25, seed=1)
    prompts = [{c.messages[0]["content"] for c in part} for part in (training, held_out)]
    assert len(training) == 45 and len(held_out) == 15 and not prompts[0] & prompts[1]
    assert split_held_out(conversations, 0.25, seed=1)[1] == held_out != split_held_out(conversations, 0.25, seed=2)[1]


def conversations_of(*sizes):
    """Conversations with as many answers to each prompt as `sizes` says."""
    return to_conversations(
        {"prompt": f"p{prompt}", "completion": str(i)} for prompt, size in enumerate(sizes) for i in range(size)
    )[0]


def test_a_prompt_is_all_messages_before_the_answer():
    """Grouping by the last question alone would give groups of 10 and 190 records."""
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
        ([190, *[1] * 10], 0.05, 10),  # the large one is skipped
        ([50, 30, *[2] * 10], 0.1, 10),
        ([7] * 20, 0.1, 14),
        ([8] * 10, 0.25, 24),  # 16 and 24 are equally close to the target, 20
        ([1, 1], 0.1, 1),
        ([1] * 9, 0.99, 8),  # training is never empty
    ],
)
def test_the_fraction_counts_conversations(sizes, fraction, expected, recwarn):
    for seed in range(5):
        training, held_out = split_held_out(conversations_of(*sizes), fraction, seed)
        assert len(training) + len(held_out) == sum(sizes) and training
        assert len(held_out) == expected or (expected == 24 and len(held_out) == 16)
    assert not recwarn.list


@pytest.mark.parametrize(("sizes", "num"), [([190, 10], 10), ([100, 100], 100), ([60, 40, 100], 40)])
def test_a_held_out_set_far_from_the_fraction_is_a_warning(sizes, num):
    fraction = 0.1
    conversations = conversations_of(*sizes)
    with pytest.warns(
        UserWarning, match=rf"asks for 20 of 200 conversations.* has {num} \({num / 200:.1%}\) of 1 prompts"
    ):
        training, held_out = split_held_out(conversations, fraction, seed=0)
    assert len(held_out) == num and len(training) == 200 - num


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(ValueError, match=r"the 9 conversations have 1 distinct prompt\. At least two are required"):
        split_held_out(conversations_of(9), 0.1, seed=0)
