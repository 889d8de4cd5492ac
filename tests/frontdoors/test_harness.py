"""EleutherAI's lm-eval on a checkpoint, by its command line, without network: a task of the test's own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.training.evaluation import score_texts
from tests.test_registration import WITHOUT_THE_PACKAGE


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
def log_probability(model, tokenizer, text: str, ending: str, add_special_tokens: bool) -> float:
    ids = tokenizer(text + " " + ending, add_special_tokens=add_special_tokens, return_tensors="pt")["input_ids"]
    num = len(tokenizer(" " + ending, add_special_tokens=False)["input_ids"])
    logits = model(ids).logits[0, -num - 1 : -1].log_softmax(-1)
    return logits.gather(-1, ids[0, -num:, None]).sum().item()


def best_endings(model, tokenizer, rows: list[dict], add_special_tokens: bool) -> list[int]:
    return [
        max(
            range(2),
            key=lambda i: log_probability(model, tokenizer, row["text"], row["endings"][i], add_special_tokens),
        )
        for row in rows
    ]


@pytest.mark.slow
def test_lm_eval(trained_folder, tmp_path):
    pytest.importorskip("lm_eval")
    model = AutoModelForCausalLM.from_pretrained(trained_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    texts = list(tales.tales(40, seed=2030))
    # which of two sentences goes on: the tale's own, or another tale's
    sentences = [text.split(". ") for text in texts]
    rows = [
        {
            "text": ". ".join(own[:3]) + ".",
            "endings": [own[3] + ".", other[3] + "."][:: 1 if i % 2 else -1],
            "answer": 0 if i % 2 else 1,
        }
        for i, (own, other) in enumerate(zip(sentences, sentences[1:] + sentences[:1], strict=True))
    ]
    tasks, output = tmp_path / "tasks", tmp_path / "output"
    tasks.mkdir()
    (tasks / "tales.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:12]))
    (tasks / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "bytes.yaml").write_text(ROLLING.format(folder=tasks))
    (tasks / "endings.yaml").write_text(CHOICE.format(folder=tasks))

    command = [sys.executable, "-I", "-c", LM_EVAL, "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += [
        "--model_args",
        f"pretrained={trained_folder},trust_remote_code=True,dtype=float32,add_bos_token=False",
    ]
    command += ["--include_path", str(tasks), "--tasks", "tale_bytes,tale_endings", "--output_path", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (found,) = output.rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    # whole windows without overlap, as lm-eval cuts them
    length = model.config.max_position_embeddings
    expected = score_texts(model, tokenizer, texts[:12], stride=length)["bits_per_byte"]
    assert results["tale_bytes"]["bits_per_byte,none"] == pytest.approx(expected, rel=2e-3)
    answers = [row["answer"] for row in rows]
    accuracies = []
    for add_special_tokens in (False, True):
        best = best_endings(model, tokenizer, rows, add_special_tokens)
        accuracies.append(sum(a == b for a, b in zip(best, answers, strict=True)) / len(rows))
    # it tokenizes without special tokens, which must make no difference to what the model knows
    assert results["tale_endings"]["acc,none"] == pytest.approx(accuracies[0])
    assert min(accuracies) > 0.7 and abs(accuracies[0] - accuracies[1]) <= 0.05
