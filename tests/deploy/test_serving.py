"""`hf-minigpt serve`, with requests of the openai client."""

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from transformers import GenerationConfig

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.deploy.serving import check_request, fit_into_context
from tests.model.test_generation import tiny_tokenizer
from tests.tiny import tiny_model


ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('the role tool is unknown') }}{% endif %}"
    "{{ eos_token }}{{ message['role'] }} says {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the cat sat"}]
# vocabulary and context of the tiny checkpoints
SIZE, CONTEXT = 28, 64


def test_generation_stops_at_the_end_of_the_context():
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))
    for prompt, asked, expected in ((3, 1024, 6), (3, 2, 2), (8, None, 1), (1, None, 8)):
        config = GenerationConfig(max_new_tokens=asked)
        fit_into_context(config, model, prompt)
        assert config.max_new_tokens == expected
    with pytest.raises(ValueError, match="9 tokens exceeds the model's context of 8"):
        fit_into_context(GenerationConfig(), model, 9)
    with pytest.raises(ValueError, match="prompt is empty"):
        fit_into_context(GenerationConfig(), model, 0)


HELLO = {"role": "user", "content": "hello"}
MISTAKES = [
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, 'messages="hi" must be a list'),
    ({"messages": ["hi"]}, r'messages\[0\]="hi" must be an object'),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content=5 must be a string"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content=null must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "must be a string, or a list of"),
    ({"messages": [HELLO, {"role": "miller", "content": "x"}]}, r'messages\[1\].role="miller" must be one of'),
    ({"messages": [{"content": "x"}]}, r"messages\[0\].role=null must be one of"),
    ({"messages": [{"role": "user", "content": "a \ud83d"}]}, r"messages\[0\].content has U\+D83D, half of"),
    ({"messages": [HELLO], "max_tokens": "many"}, 'max_tokens="many" must be a number'),
    ({"messages": [HELLO], "max_tokens": 0}, "max_tokens=0 must be at least 1"),
]


@pytest.mark.parametrize(("body", "message"), MISTAKES[1:])
def test_a_wrong_request_is_named(body, message):
    with pytest.raises(ValueError, match=message) as error:
        check_request(body)
    str(error.value).encode()
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        check_request({"prompt": "a \ud83d"})


def test_the_role_developer_becomes_system():
    body = {"messages": [{"role": "developer", "content": "Be short."}, HELLO]}
    check_request(body)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    check_request({"input": "hello"})
    check_request({"input": [{"type": "input_text", "text": "hello"}]})


def test_workarounds_are_deleted_with_the_versions_that_need_them():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lower_bounds = dict(re.findall(r"(\w+)>=([\d.]+)", " ".join(requirements)))
    for path in (ROOT / "hf_minigpt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for package, fixed in re.findall(r"Delete this when (\w+)>=([\d.]*\d) is required", text):
            assert Version(lower_bounds[package]) < Version(fixed), f"{path}: delete the code for {package}<{fixed}"


def post(url: str, body) -> tuple[int, str]:
    """Return the status and the error message, also for requests that OpenAI's client does not send."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def start(*flags: str) -> tuple[subprocess.Popen, str]:
    """Start a server on a free port, and return it with its address."""
    server = subprocess.Popen(
        [sys.executable, "-m", "hf_minigpt", "serve", *flags, "--port", "0", "--host", "127.0.0.1", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = []
    for line in server.stdout:
        printed.append(line)
        if match := re.search(r"running on (http://127.0.0.1:\d+)", line):
            return server, match[1]
    raise AssertionError("".join(printed))


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    server.communicate(timeout=60)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model with learned positions, saved with and without a chat template."""
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=SIZE, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    # Without an end-of-text token, texts are as long as allowed.
    model.generation_config.eos_token_id = None
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        tokenizer.chat_template = template
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.chat_template = TEMPLATE
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, model=model)


def expected_text(checkpoints, prompt: str, new_tokens: int) -> str:
    ids = checkpoints.tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = checkpoints.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
    return checkpoints.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["plain", "continuous"])
def test_openai_client(checkpoints, batching):
    import openai

    chat, plain = (str(checkpoints.folder / name) for name in ("chat", "plain"))
    prompt = checkpoints.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|endoftext|>user says the cat sat<|endoftext|>"
    chat_text = expected_text(checkpoints, prompt, 12)
    # Without a model on the command line, each request names one.
    flags = [chat] if batching == "plain" else ["--continuous-batching", "--cb-num-blocks", "32"]
    server, url = start(*flags)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        reply = client.chat.completions.create(model=chat, messages=MESSAGES, temperature=0, max_tokens=12)
        assert reply.choices[0].message.content == chat_text
        assert reply.choices[0].finish_reason == "length"
        num_prompt_tokens = len(checkpoints.tokenizer(prompt)["input_ids"])
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (num_prompt_tokens, 12)
        stream = client.chat.completions.create(
            model=chat, messages=MESSAGES, temperature=0, max_tokens=12, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat_text

        # Without max_tokens, generation stops at the end of the context.
        written = client.completions.create(model=chat, prompt="the cat", temperature=0)
        assert written.choices[0].text == expected_text(checkpoints, "the cat", CONTEXT + 1 - 7)
        assert written.choices[0].finish_reason == "length"
        long = client.completions.create(model=chat, prompt="cat" * 21, max_tokens=40, temperature=0)
        assert long.usage.completion_tokens == 2

        response = client.responses.create(
            model=chat, input="the cat sat", temperature=0, max_output_tokens=12, stream=False
        )
        assert response.output_text == chat_text

        with pytest.raises(openai.BadRequestError, match=r"66 tokens exceeds the model's context of 64"):
            client.completions.create(model=chat, prompt="cat" * 22)
        with pytest.raises(openai.BadRequestError, match=r"66 tokens exceeds the model's context of 64"):
            client.completions.create(model=chat, prompt="cat" * 22, stream=True)
        chat_url = f"{url}/v1/chat/completions"
        for body, message in MISTAKES:
            status, answer = post(chat_url, {"model": chat} | body)
            assert status == 400 and re.search(message, answer), (body, answer)
        message = "messages is missing. Set it to the text that the model answers."
        assert post(chat_url, {"model": chat}) == (400, message)
        assert post(chat_url, ["hi"])[0] == 400
        assert post(f"{url}/v1/responses", {"model": chat})[0] == 400
        status, answer = post(chat_url, {"model": chat, "messages": [{"role": "tool", "content": "x"}]})
        assert status == 400 and "tool is unknown" in answer
        developer = [{"role": "developer", "content": "the"}, *MESSAGES]
        assert post(chat_url, {"model": chat, "messages": developer, "max_tokens": 2}) == (200, "")

        if batching == "plain":
            assert [model.id for model in client.models.list()] == [chat]
            with pytest.raises(openai.BadRequestError, match="Server is pinned to"):
                client.completions.create(model=plain, prompt="the cat")
        else:
            with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
                client.chat.completions.create(model=plain, messages=MESSAGES)
            assert (
                client.completions.create(model=plain, prompt="the cat", max_tokens=3, temperature=0).choices[0].text
            )
    finally:
        stop(server)


@pytest.mark.slow
def test_a_classifier_is_not_served(tmp_path):
    tiny_model("gpt2", model_class=MiniGPTForSequenceClassification, vocab_size=SIZE, pad_token_id=0).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="MiniGPTForSequenceClassification, which cannot generate text"):
        start(str(tmp_path))


@pytest.mark.slow
def test_an_adapter_is_served_merged(checkpoints, tmp_path):
    import openai
    from peft import LoraConfig, get_peft_model

    base = MiniGPTForCausalLM.from_pretrained(checkpoints.folder / "chat")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    checkpoints.tokenizer.save_pretrained(tmp_path)
    ids = checkpoints.tokenizer("the cat", return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = checkpoints.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected != expected_text(checkpoints, "the cat", 12)
    server, url = start(str(tmp_path))
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        reply = client.completions.create(model=str(tmp_path), prompt="the cat", temperature=0, max_tokens=12)
        assert reply.choices[0].text == expected
    finally:
        stop(server)
