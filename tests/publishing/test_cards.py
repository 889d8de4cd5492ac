"""Model cards carry the run's numbers and metadata that the Hub's own classes read back."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_minigpt.publishing.cards import TrainingReport, format_metrics, save_model_card
from hf_minigpt.publishing.plots import plot_losses


METRICS = {"loss": 1.25, "perplexity": 3.49, "bits_per_byte": 0.5, "accuracy": 0.625, "tokens_per_second": 12345.6}


def report(**changes) -> TrainingReport:
    fields = {
        "name": "tiny-gpt",
        "description": "A test.",
        "num_parameters": 1_234_567,
        "architecture": {"layers": 2, "width": 32},
        "dataset": "somebody/books",
        "dataset_on_hub": True,
        "data": {"Held out": "3 documents"},
        "hyperparameters": {"learning_rate": 0.003},
        "hardware": "a toaster",
        "seconds": 90.0,
        "metrics": METRICS,
        "sample": 'It "was" {a} dark night.',
        "command": "accelerate launch recipes/pretrain.py",
        "plot": "loss.png",
        "limits": ["Small."],
        "license": "mit",
        "language": "en",
        "base_model": "somebody/base",
    }
    return TrainingReport(**(fields | changes))


def test_metadata_is_read_back(tmp_path):
    save_model_card(report(), tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert (data.datasets, data.base_model, data.language) == (["somebody/books"], "somebody/base", "en")
    assert data.model_name == "tiny-gpt"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {name: METRICS[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}


def test_text_holds_what_a_reader_needs(tmp_path):
    text = save_model_card(report(), tmp_path).read_text()
    for part in (
        "1.23 million parameters: layers 2, width 32",
        "| Held-out bits per byte | 0.5000 |",
        "| Next-token accuracy | 62.50% |",
        'It "was" {a} dark night.',
        'pipeline("text-generation", model="tiny-gpt", trust_remote_code=True)',
        "accelerate launch recipes/pretrain.py",
        "1.5 minutes on a toaster",
        "| `learning_rate` | 0.003 |",
        "![Loss against tokens](loss.png)",
        "- Small.",
        "Code and weights are under the MIT licence.",
    ):
        assert part in text, part


def test_a_corpus_on_disk_is_no_dataset_of_the_hub(tmp_path):
    path = save_model_card(
        report(dataset="my.txt", dataset_on_hub=False, license="unknown", language=None, base_model=None, plot=None),
        tmp_path,
    )
    data = ModelCard.load(path).data
    assert (data.datasets, data.base_model, data.language) == (None, None, None)
    assert "its terms decide" in path.read_text() and "loss.png" not in path.read_text()


def test_metrics_are_formatted_in_order_and_unknown_ones_left_out():
    formatted = format_metrics({"claims_true": 0.5, "loss": 2.0, "nonsense": 1.0})
    assert list(formatted.items()) == [
        ("Held-out loss (nats per token)", "2.0000"),
        ("Sampled claims that are true", "50.0%"),
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_an_image(tmp_path: Path, suffix):
    history = [
        {"num_input_tokens_seen": 10, "loss": 3.0},
        {"num_input_tokens_seen": 20, "loss": 2.0},
        {"num_input_tokens_seen": 20, "eval_loss": 2.5},
        {"train_runtime": 1.0},
    ]
    path = tmp_path / f"loss.{suffix}"
    plot_losses(history, path, floor=1.5, title="a run")
    content = path.read_bytes()
    assert content[:4] == b"\x89PNG" if suffix == "png" else b"entropy of the source" in content
