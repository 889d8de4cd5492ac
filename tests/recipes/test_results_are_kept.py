"""What comes after the training may fail: the weights, the metrics and the card are there all the same."""

import json
import logging

import finetune_imdb
import ladder
import pandas as pd
import pretrain
import pretrain_loop
import pytest
import sft
from transformers import AutoModel, AutoTokenizer

from hf_minigpt.data.tales.reviews import tale_reviews


QUICK = ["--cpu_threads", "1", "--disable_tqdm", "true", "--max_steps", "2", "--save_strategy", "no"]
TINY = ["--context_length", "32", "--vocab_size", "320", "--config_overrides", "hidden_size=16"]
TINY += ["num_attention_heads=2", "num_hidden_layers=1"]

# recipe -> its steps after the training: the function that is made to fail, and what the warning says
PUSH = ("push_run", "Pushing to the Hub")
CARD = "Writing the model card"
STEPS = {
    pretrain: [
        ("sample_texts", "Sampling a text"),
        ("tale_metrics", "Reading the model's tales"),
        ("plot_losses", "Drawing loss.png"),
        ("save_model_card", CARD),
        PUSH,
    ],
    pretrain_loop: [("sample_texts", "Sampling a text"), ("plot_losses", "Drawing loss.png"), PUSH],
    finetune_imdb: [
        ("draw_figures", "Drawing the figures"),
        ("compare_with_baseline", "The baseline"),
        ("evaluate_pipeline", "The evaluation through the pipeline"),
        ("save_classification_card", CARD),
        PUSH,
    ],
    sft: [
        ("generate_answers", "Answering after the training"),
        ("plot_losses", "Drawing loss.png"),
        ("save_sft_card", CARD),
        PUSH,
    ],
    ladder: [("plot_rungs", "Drawing ladder.png"), PUSH],
}
FIGURES = {pretrain: "loss.png", finetune_imdb: "confusion_matrix.png", sft: "loss.png"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The flags of a quick run of each recipe, but for the output folder."""
    folder = tmp_path_factory.mktemp("kept")
    cache = ["--cache_dir", str(folder / "cache")]
    no_evaluation = ["--eval_strategy", "no"]
    tales = [*QUICK, *cache, "--max_examples", "40", "--per_device_train_batch_size", "2", *no_evaluation, *TINY]
    base = folder / "base"
    pretrain.main([*tales, "--output_dir", str(base)])
    records = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(20)]
    (folder / "records.json").write_text(json.dumps(records))
    texts, labels = tale_reviews(40)
    pd.DataFrame({"text": texts, "label": labels}).to_csv(folder / "reviews.csv", index=False)
    asked = ["--max_new_tokens", "4", "--eval_answers", "2"]
    (folder / "reviews.yaml").write_text("early_stopping_patience: null\nload_best_model_at_end: false\n")
    compared = ["--config", str(folder / "reviews.yaml"), "--baseline", "true", "--pipeline_examples", "2"]
    compared += ["--tokens_per_batch", "512", *no_evaluation]
    rungs = ["--rungs", "bigram", "one-head", "--eval_batches", "1", "--max_examples", "40"]
    return {
        pretrain: tales,
        pretrain_loop: tales,
        finetune_imdb: [*QUICK, *compared, "--dataset", str(folder / "reviews.csv"), *TINY],
        sft: [*QUICK, *no_evaluation, "--model", str(base), "--dataset", str(folder / "records.json"), *asked],
        ladder: [*QUICK, *cache, *rungs, "--config_overrides", "hidden_size=8", "num_hidden_layers=1"],
    }


def run(recipe, shared, output, caplog) -> dict[str, float]:
    with caplog.at_level(logging.WARNING):
        metrics = recipe.main([*shared[recipe], "--output_dir", str(output)])
    assert json.loads((output / "all_results.json").read_text()) == pytest.approx(metrics, nan_ok=True)
    model = output / "bigram" if recipe is ladder else output
    AutoModel.from_pretrained(model)
    AutoTokenizer.from_pretrained(model)
    return metrics


def fail(*args, **kwargs):
    raise RuntimeError("made to fail")


@pytest.mark.parametrize("recipe", STEPS, ids=lambda recipe: recipe.__name__)
def test_every_step_may_fail_and_leaves_a_warning(recipe, shared, tmp_path, monkeypatch, caplog):
    for name, _ in STEPS[recipe]:
        monkeypatch.setattr(recipe, name, fail)
    metrics = run(recipe, shared, tmp_path, caplog)
    assert any("loss" in metric for metric in metrics)
    for _, warning in STEPS[recipe]:
        assert f"{warning} failed" in caplog.text
    assert "RuntimeError: made to fail" in caplog.text
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("recipe", FIGURES, ids=lambda recipe: recipe.__name__)
def test_a_card_shows_no_picture_that_is_not_there(recipe, shared, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recipe, "draw_figures" if recipe is finetune_imdb else "plot_losses", fail)
    run(recipe, shared, tmp_path, caplog)
    assert [record.message.split(" failed")[0] for record in caplog.records if " failed" in record.message] == [
        "Drawing the figures" if recipe is finetune_imdb else "Drawing loss.png"
    ]
    card = (tmp_path / "README.md").read_text()
    assert "## Results" in card and ".png" not in card


@pytest.mark.parametrize("recipe", [pretrain, finetune_imdb, sft], ids=lambda recipe: recipe.__name__)
def test_tokens_need_not_be_logged(recipe, shared, tmp_path, caplog):
    shared = {recipe: [*shared[recipe], "--include_num_input_tokens_seen", "false"]}
    run(recipe, shared, tmp_path, caplog)
    assert "failed" not in caplog.text
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert not any("num_input_tokens_seen" in entry for entry in history)
    assert f"({FIGURES[recipe]})" in (tmp_path / "README.md").read_text()
    assert (tmp_path / FIGURES[recipe]).is_file()


def test_no_answer_need_be_compared(shared, tmp_path, caplog):
    metrics = run(sft, {sft: [*shared[sft], "--eval_answers", "0"]}, tmp_path, caplog)
    assert "failed" not in caplog.text and "eval_exact_match" not in metrics
    assert "Held-out response perplexity" in (tmp_path / "README.md").read_text()
