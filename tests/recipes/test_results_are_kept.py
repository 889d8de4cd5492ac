"""A failure after the training loses neither the weights nor the metrics nor the card."""

import json
import logging

import pandas as pd
import pytest
from transformers import AutoModel, AutoTokenizer

from hf_minigpt.data.tales.reviews import tale_reviews
from hf_minigpt.recipes import finetune_imdb, ladder, pretrain, pretrain_loop, sft


QUICK = ["--cpu_threads", "1", "--disable_tqdm", "true", "--max_steps", "2", "--save_strategy", "no"]
TINY = ["--context_length", "32", "--vocab_size", "320", "--config_overrides", "hidden_size=16"]
TINY += ["num_attention_heads=2", "num_hidden_layers=1"]

# recipe -> its steps after the training: the function that is made to fail, and what the warning says
PUSH = ("push_run", "Pushing to the Hub")
CARD = "Writing the model card"
STEPS = {
    pretrain: [
        ("sample_texts", "Sampling a text"),
        ("tale_metrics", "Evaluating the model's tales"),
        ("plot_losses", "Drawing loss.png"),
        ("save_model_card", CARD),
        PUSH,
    ],
    pretrain_loop: [("sample_texts", "Sampling a text"), ("plot_losses", "Drawing loss.png"), PUSH],
    finetune_imdb: [
        ("hf_minigpt.classification.results.draw_figures", "Drawing the figures"),
        ("hf_minigpt.classification.results.compare_with_baseline", "The baseline"),
        ("hf_minigpt.classification.results.evaluate_pipeline", "The evaluation through the pipeline"),
        ("hf_minigpt.classification.results.save_classification_card", CARD),
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
    """The flags of a quick run of each recipe, without the output folder."""
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


def recipe_name(recipe):
    return recipe.__name__.rpartition(".")[2]


@pytest.mark.parametrize("recipe", STEPS, ids=recipe_name)
def test_a_step_that_fails_leaves_a_warning(recipe, shared, tmp_path, monkeypatch, caplog):
    for name, _ in STEPS[recipe]:
        monkeypatch.setattr(name if "." in name else f"{recipe.__name__}.{name}", fail)
    metrics = run(recipe, shared, tmp_path, caplog)
    assert any("loss" in metric for metric in metrics)
    for _, warning in STEPS[recipe]:
        assert f"{warning} failed" in caplog.text
    assert "RuntimeError: made to fail" in caplog.text
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("recipe", FIGURES, ids=recipe_name)
def test_a_card_shows_only_pictures_that_exist(recipe, shared, tmp_path, monkeypatch, caplog):
    figures = "hf_minigpt.classification.results.draw_figures"
    monkeypatch.setattr(figures if recipe is finetune_imdb else f"{recipe.__name__}.plot_losses", fail)
    run(recipe, shared, tmp_path, caplog)
    assert [record.message.split(" failed")[0] for record in caplog.records if " failed" in record.message] == [
        "Drawing the figures" if recipe is finetune_imdb else "Drawing loss.png"
    ]
    card = (tmp_path / "README.md").read_text()
    assert "## Results" in card and ".png" not in card


@pytest.mark.parametrize(
    "recipe", [pretrain, finetune_imdb, sft], ids=lambda recipe: recipe.__name__.rpartition(".")[2]
)
def test_tokens_and_answers_are_optional(recipe, shared, tmp_path, caplog):
    answers = ["--eval_answers", "0"] if recipe is sft else []
    shared = {recipe: [*shared[recipe], "--include_num_input_tokens_seen", "false", *answers]}
    metrics = run(recipe, shared, tmp_path, caplog)
    assert "eval_exact_match" not in metrics
    assert "failed" not in caplog.text
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert not any("num_input_tokens_seen" in entry for entry in history)
    assert f"({FIGURES[recipe]})" in (tmp_path / "README.md").read_text()
    assert (tmp_path / FIGURES[recipe]).is_file()
