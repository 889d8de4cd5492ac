"""Stock trainers go on from a trained checkpoint where our own left it."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import pipeline

from hf_minigpt.classification.arguments import ReviewArguments
from hf_minigpt.classification.data import load_reviews
from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.recipes import finetune_imdb
from tests.test_readme import SNIPPETS


TEXTS = [text[:300] for text in tales.tales(32, seed=2029)]


@torch.no_grad()
def nats(model, rows: list[list[int]], num_prompt_tokens: list[int]) -> float:
    """Nats per token of the tokens of each row after its prompt."""
    total = count = 0.0
    for ids, skipped in zip(rows, num_prompt_tokens, strict=True):
        ids = torch.tensor([ids])
        losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")[skipped - 1 :]
        total, count = total + losses.sum().item(), count + losses.numel()
    return total / count


def first_loss(folder, records: dict[str, list[str]], output_dir, **options) -> float:
    """The loss that TRL's SFTTrainer logs for its first step, over all records, by AutoTokenizer's tokenizer."""
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output_dir=str(output_dir),
        max_steps=1,
        per_device_train_batch_size=len(TEXTS),
        logging_steps=1,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = trl.SFTTrainer(model=str(folder), args=arguments, train_dataset=Dataset.from_dict(records))
    for row in trainer.train_dataset["input_ids"][:3]:
        assert row[0] == trainer.processing_class.bos_token_id and row[1] != row[0]
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("packing", [False, True])
def test_trl_on_texts(model, tokenizer, trained_folder, tmp_path, packing):
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    expected = nats(model, rows, [1] * len(rows))
    options = {"packing": True, "packing_strategy": "bfd"} if packing else {}
    loss = first_loss(trained_folder, {"text": TEXTS}, tmp_path, max_length=512, **options)
    assert loss == pytest.approx(expected, rel=2e-3)


def test_trl_on_prompts_and_completions(model, tokenizer, trained_folder, tmp_path):
    prompts = [" ".join(text.split()[:8]) for text in TEXTS]
    completions = [text[len(prompt) :] for text, prompt in zip(TEXTS, prompts, strict=True)]
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    expected = nats(model, rows, [len(tokenizer(prompt).input_ids) for prompt in prompts])
    loss = first_loss(trained_folder, {"prompt": prompts, "completion": completions}, tmp_path, max_length=512)
    assert loss == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_the_readme_s_classifier_is_as_good_as_the_recipe(trained_folder, tmp_path, monkeypatch):
    splits = load_reviews(ReviewArguments())
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        split = getattr(splits, name)
        Dataset.from_dict({"text": split.texts, "label": split.labels}).to_csv(f"{name}.csv")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pretrain").symlink_to(trained_folder)
    (snippet,) = [snippet for snippet in SNIPPETS if "SequenceClassification" in snippet]
    exec(snippet, {})
    flags = ["--model", str(trained_folder), "--output_dir", "runs/recipe", "--save_strategy", "epoch"]
    recipe = finetune_imdb.main([*flags, "--pipeline_examples", "0", "--disable_tqdm", "true"])
    for folder, names in (("runs/classifier", ["LABEL_0", "LABEL_1"]), ("runs/recipe", splits.class_names)):
        answers = pipeline("text-classification", model=folder)(splits.test.texts, batch_size=32)
        right = [names.index(a["label"]) == label for a, label in zip(answers, splits.test.labels, strict=True)]
        accuracy = sum(right) / len(right)
        assert accuracy > recipe["test_accuracy"] - (0.01 if folder == "runs/classifier" else 1e-6), folder
