"""EleutherAI's lm-eval on a checkpoint, by its command line, without network: a task of the test's own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_minigpt.data import tales
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.sliding_windows import score_texts
from test_registration import WITHOUT_THE_PACKAGE
from tiny import tiny_model


CONTEXT = 256
ROLLING = """
task: tale_bytes
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/tales.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
CHOICE = """
task: tale_endings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/endings.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
# what `lm_eval` on the command line calls, where hf_minigpt was never installed: the checkpoint brings its code
LM_EVAL = f"{WITHOUT_THE_PACKAGE}\nfrom lm_eval.__main__ import cli_evaluate\n\ncli_evaluate()"


@torch.no_grad()
def log_probability(model, tokenizer, text: str, ending: str) -> float:
    ids = tokenizer(text + " " + ending, return_tensors="pt")["input_ids"]
    num = len(tokenizer(" " + ending)["input_ids"])
    logits = model(ids).logits[0, -num - 1 : -1].log_softmax(-1)
    return logits.gather(-1, ids[0, -num:, None]).sum().item()


@pytest.mark.slow
def test_lm_eval(tmp_path):
    pytest.importorskip("lm_eval")
    texts = list(tales.tales(12, seed=5))
    endings = ["the mill was old.", "nobody knew why."]
    tokenizer = train_tokenizer(texts, 320, model_max_length=CONTEXT, show_progress=False)
    model = tiny_model("modern", vocab_size=320, unpadded_vocab_size=320, max_position_embeddings=CONTEXT)
    checkpoint, tasks, output = (tmp_path / name for name in ("model", "tasks", "output"))
    for part in (model, tokenizer):
        part.save_pretrained(checkpoint)
    tasks.mkdir()
    short = [text[:120] for text in texts]
    (tasks / "tales.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    best = [max((0, 1), key=lambda i: log_probability(model, tokenizer, text, endings[i])) for text in short]
    # the model's own choice, but for every third
    rows = [
        {"text": text, "endings": endings, "answer": choice if i % 3 else 1 - choice}
        for i, (text, choice) in enumerate(zip(short, best, strict=True))
    ]
    (tasks / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "bytes.yaml").write_text(ROLLING.format(folder=tasks))
    (tasks / "endings.yaml").write_text(CHOICE.format(folder=tasks))

    command = [sys.executable, "-I", "-c", LM_EVAL, "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tasks), "--tasks", "tale_bytes,tale_endings", "--output_path", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (found,) = output.rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    expected = score_texts(model.eval(), tokenizer, short)["bits_per_byte"]
    assert results["tale_bytes"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    assert results["tale_endings"]["acc,none"] == pytest.approx(8 / 12)
