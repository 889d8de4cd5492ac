"""recipes/chat.py with a tiny model."""

import pytest

from hf_minigpt.instructions.model import prepare_for_chat
from hf_minigpt.recipes import chat
from hf_minigpt.tokenization import add_chat_template, train_tokenizer
from tests.tiny import tiny_model


TEXTS = ["what is the answer to it? the answer is in the box, and the box is here."] * 9


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_tokenizer(TEXTS, 320, model_max_length=64, show_progress=False)
    model = tiny_model(
        "gpt2",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    prepare_for_chat(model, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_oldest_messages_are_dropped_except_the_system_message():
    tokenizer = train_tokenizer(TEXTS, 320, model_max_length=64, show_progress=False)
    add_chat_template(tokenizer)
    system = [{"role": "system", "content": "be"}]
    messages = [*system, *turns("box one", "box two", "box three", "box four", "box five")]

    def length(kept):
        return len(tokenizer.apply_chat_template(kept, add_generation_prompt=True)["input_ids"])

    for dropped, kept in ((0, messages), (2, [*system, *messages[3:]]), (4, [*system, *messages[5:]])):
        assert chat.drop_oldest_messages(tokenizer, messages, length(kept)) == (
            kept,
            tokenizer.apply_chat_template(kept, add_generation_prompt=True)["input_ids"],
            dropped,
        )
        assert chat.drop_oldest_messages(tokenizer, messages, length(kept) + 1)[2] == dropped
    with pytest.raises(
        ValueError, match=f"has {length(kept)} tokens, and the context has room for {length(kept) - 1}"
    ):
        chat.drop_oldest_messages(tokenizer, messages, length(kept) - 1)


def test_a_prompt_prints_one_answer(model_folder, capsys):
    flags = [model_folder, "--greedy", "--max_new_tokens", "6", "--prompt", "what is it?", "--system", "be"]
    messages = chat.main(flags)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    out = capsys.readouterr().out
    # only the answer
    assert out == messages[-1]["content"] + "\n"
    assert chat.main(flags) == messages
    sampled = [chat.main([*flags[:1], *flags[2:], "--seed", str(seed), "--top_k", "50"]) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_conversation_until_the_context_is_full(model_folder, capsys, monkeypatch):
    typed = iter(["what is it?", "", "/new", *["the answer is in the box"] * 5, "box " * 60, "the box", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    messages = chat.main([model_folder, "--greedy", "--max_new_tokens", "8"])
    err = capsys.readouterr().err
    assert "The context is full: the oldest 2 messages were dropped." in err
    assert "Shorten it" in err
    # the message that was too long is not part of the conversation
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert messages[-2]["content"] == "the box" and messages[0]["content"] != "what is it?"
    assert not any("box box box" in message["content"] for message in messages if message["role"] == "user")


def test_the_end_of_the_input_ends_the_chat(model_folder, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert chat.main([model_folder]) == []


def test_impossible_flags_are_refused(model_folder, tmp_path, capsys):
    plain = train_tokenizer(TEXTS, 320, model_max_length=64, show_progress=False)
    tiny_model("gpt2", vocab_size=len(plain)).save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    for flags, message in (
        ([model_folder, "--temperature", "0"], "--temperature 0.0 must be above 0"),
        ([model_folder, "--max_new_tokens", "64"], "leaves no room for a prompt in the context of 64"),
        ([model_folder, "--max_new_tokens", "8", "--prompt", "box " * 60], "Shorten it"),
        ([str(tmp_path)], "has no chat template"),
    ):
        with pytest.raises(SystemExit):
            chat.main(flags)
        assert message in capsys.readouterr().err
