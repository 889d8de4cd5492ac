"""Model cards contain the results of the run, and metadata that the Hub accepts."""

import math
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from transformers.pipelines import PIPELINE_REGISTRY

from hf_minigpt.classification.report import format_classification_metrics, save_classification_card
from hf_minigpt.instructions.report import save_sft_card
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.pretraining.report import format_metrics, save_model_card
from hf_minigpt.publishing.plots import plot_losses
from hf_minigpt.training.report import TrainingReport, public_name, training_report
from tests.tiny import tiny_model


METRICS = {"loss": 1.25, "perplexity": 3.49, "bits_per_byte": 0.5, "accuracy": 0.625, "tokens_per_second": 12345.6}


# ids from hf.co/docs/hub/repositories-licenses that these cards may use
LICENSES = {"mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "other", "unknown"}
# required fields of a model-index (github.com/huggingface/hub-docs, modelcard.md)
MODEL_INDEX = {"task": {"type"}, "dataset": {"type", "name"}, "metrics": {"type", "value"}}


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


def test_metadata_can_be_read_back(tmp_path):
    save_model_card(report(), tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert (data.datasets, data.base_model, data.language) == (["somebody/books"], "somebody/base", "en")
    assert data.model_name == "tiny-gpt"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {name: METRICS[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}


def test_the_card_contains_results_and_usage(tmp_path):
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


def test_a_local_dataset_is_not_linked_to_the_hub(tmp_path):
    path = save_model_card(
        report(dataset="my.txt", dataset_on_hub=False, license="unknown", language=None, base_model=None, plot=None),
        tmp_path,
    )
    data = ModelCard.load(path).data
    assert (data.datasets, data.base_model, data.language) == (None, None, None)
    assert "whose terms decide" in path.read_text() and "loss.png" not in path.read_text()


def test_metrics_are_formatted_in_order_without_unknown_ones():
    formatted = format_metrics({"claims_true": 0.5, "loss": 2.0, "nonsense": 1.0})
    assert list(formatted.items()) == [
        ("Held-out loss (nats per token)", "2.0000"),
        ("Sampled claims that are true", "50.0%"),
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_loss_plot_is_an_image(tmp_path: Path, suffix):
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


def check_metadata(path: Path) -> dict:
    """Check what the Hub validates on its server."""
    metadata = metadata_load(path)
    # no Python objects, which only the unsafe YAML loaders read
    assert yaml.safe_load(yaml.safe_dump(metadata)) == metadata
    assert metadata["license"] in LICENSES
    assert metadata["pipeline_tag"] in PIPELINE_REGISTRY.get_supported_tasks()
    assert metadata["library_name"] == "transformers"
    assert all(isinstance(tag, str) and tag for tag in metadata["tags"])
    assert re.fullmatch(r"[a-z]{2,3}", metadata.get("language", "en"))
    for name in (*metadata.get("datasets", []), *([metadata["base_model"]] if "base_model" in metadata else [])):
        validate_repo_id(name)
    for model in metadata.get("model-index", []):
        assert model["name"] and model["results"]
        for result in model["results"]:
            for part, needed in MODEL_INDEX.items():
                for entry in result[part] if part == "metrics" else [result[part]]:
                    assert needed <= entry.keys() and all(entry[name] not in (None, "") for name in needed)
            assert all(type(m["value"]) in (int, float) and math.isfinite(m["value"]) for m in result["metrics"])
        name, results = model_index_to_eval_results([model])
        assert name == model["name"] and results
    return metadata


CLASSIFIER_METRICS = {"accuracy": 0.9, "f1": 0.89, "roc_auc": 0.95, "calibration_error": 0.02, "loss": 0.3}
SFT_METRICS = {"eval_loss": 1.0, "eval_perplexity": 2.7, "before_loss": 2.0, "before_perplexity": 7.4}


@pytest.mark.parametrize("on_hub", [True, False])
@pytest.mark.parametrize("job", ["pretraining", "classification", "instructions"])
def test_the_hub_accepts_the_card_of_every_job(tmp_path, job, on_hub):
    changes = {} if on_hub else {"dataset": "my.txt", "dataset_on_hub": False, "language": None, "base_model": None}
    changes["name"] = "you/a model: with | signs, 'quotes' & more" if not on_hub else "you/tiny-gpt"
    if job == "pretraining":
        path = save_model_card(report(**changes), tmp_path)
    elif job == "classification":
        path = save_classification_card(report(metrics=CLASSIFIER_METRICS, **changes), tmp_path)
    else:
        path = save_sft_card(report(sample="", **changes), SFT_METRICS, [], [], tmp_path)
    metadata = check_metadata(path)
    assert metadata["pipeline_tag"] == ("text-classification" if job == "classification" else "text-generation")
    assert metadata["model-index"][0]["name"] == changes["name"]
    text = path.read_text()
    for section in ("Results", "How to use", "Data", "Training", "Intended use", "Limits", "Licence"):
        assert text.count(f"\n## {section}\n") == 1, section
    for part in ("1.5 minutes on a toaster", "| `learning_rate` | 0.003 |", "recipes/pretrain.py", ".png)"):
        assert part in text, part


def test_the_hub_accepts_the_published_cards():
    cards = [*Path(__file__).parents[2].glob("model_cards/minigpt-*.md")]
    assert cards
    for path in cards:
        check_metadata(path)


def test_metrics_that_are_not_finite_are_left_out_of_the_metadata(tmp_path):
    path = save_model_card(report(metrics={"loss": 800.0, "perplexity": float("inf")}), tmp_path)
    (result,) = check_metadata(path)["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["loss"]
    metadata = check_metadata(save_model_card(report(metrics={}), tmp_path))
    assert not {"model-index", "model_name"} & metadata.keys()


def test_samples_and_values_are_escaped(tmp_path):
    sample = "He said:\n```\n# no heading\n````\n"
    text = save_model_card(report(sample=sample, hyperparameters={"a": "x|y\nz"}), tmp_path).read_text()
    assert f"`````text\n{sample.strip()}\n`````\n" in text
    assert "| `a` | x\\|y z |" in text


def test_the_confidence_interval_is_one_row():
    rows = format_classification_metrics({"accuracy": 0.9, "accuracy_low": 0.88, "accuracy_high": 0.92})
    assert rows == {"Accuracy": "90.00%", "Accuracy, 95% confidence interval": "88.00% to 92.00%"}
    assert format_classification_metrics({"accuracy_low": 0.88}) == {}


def test_private_folders_stay_out_of_the_card(tmp_path):
    (tmp_path / "my.txt").write_text("text")
    assert public_name(str(tmp_path / "my.txt")) == "my.txt"
    assert public_name("somebody/books") == "somebody/books"

    def make(**changes):
        options = {
            "dataset": None,
            "embedded_dataset": "tales",
            "base_model": None,
            "hyperparameters": {"dropout": None},
        }
        fields = {"description": "", "data": {}, "seconds": 1.0, "metrics": {}, "sample": "", "command": ""}
        args = PretrainArguments(str(tmp_path / "run"), optimizer="adamw")
        return training_report(args, tiny_model("modern"), **(options | fields | changes))

    embedded, hub = make(), make(dataset="somebody/books", base_model="somebody/base")
    assert (embedded.name, embedded.dataset, embedded.license, embedded.language) == ("run", "tales", "mit", "en")
    assert not {"dropout", "matrix_learning_rate"} & embedded.hyperparameters.keys()
    assert (hub.dataset, hub.dataset_on_hub, hub.base_model) == ("somebody/books", True, "somebody/base")
    assert (hub.license, hub.language) == ("unknown", None)
    local = make(dataset=str(tmp_path / "my.txt"), base_model=str(tmp_path))
    assert (local.dataset, local.dataset_on_hub, local.base_model) == ("my.txt", False, None)
