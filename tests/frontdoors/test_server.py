"""`python -m hf_minigpt serve` on trained weights: what the openai client reads is what `generate` writes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minigpt.recipes import sft
from tests.deploy.test_serving import start, stop
from tests.frontdoors.test_language_model import HELD_OUT, PROMPTS, check_tales


NUM_NEW = 40


def greedy(folder, rows: list[list[int]]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = [model.generate(torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False) for ids in rows]
    texts = [ids[0, len(row) :] for ids, row in zip(written, rows, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]


def test_completions(trained_folder):
    openai = pytest.importorskip("openai")
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    prompts = PROMPTS[:4]
    server, url = start(str(trained_folder))
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        options = {"model": str(trained_folder), "temperature": 0, "max_tokens": NUM_NEW}
        replies = [client.completions.create(prompt=prompt, **options) for prompt in prompts]
    finally:
        stop(server)
    texts = [reply.choices[0].text for reply in replies]
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    assert texts == greedy(trained_folder, rows)
    assert [reply.usage.prompt_tokens for reply in replies] == [len(ids) for ids in rows]
    check_tales([prompt + text for prompt, text in zip(prompts, texts, strict=True)])


@pytest.mark.slow
def test_chat(trained_folder, tmp_path):
    openai = pytest.importorskip("openai")
    folder = tmp_path / "assistant"
    flags = ["--model", str(trained_folder), "--output_dir", str(folder), "--max_steps", "60", "--eval_answers", "20"]
    sft.main([*flags, "--disable_tqdm", "true"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [f"{text}\nWho is in the tale?" for text in HELD_OUT[:4]]
    rows = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        rows.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        assert rows[-1].count(tokenizer.bos_token_id) == 1 and rows[-1][0] == tokenizer.bos_token_id
    server, url = start(str(folder))
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        options = {"model": str(folder), "temperature": 0, "max_tokens": NUM_NEW}
        texts = [
            client.chat.completions.create(messages=[{"role": "user", "content": question}], **options)
            for question in questions
        ]
    finally:
        stop(server)
    assert [text.choices[0].message.content for text in texts] == greedy(folder, rows)
    assert [text.usage.prompt_tokens for text in texts] == [len(ids) for ids in rows]
