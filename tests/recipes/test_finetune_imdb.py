"""finetune_imdb.py trains classifiers from flags, and writes everything that loads and describes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from transformers import pipeline

from hf_minigpt.classification import report
from hf_minigpt.classification.arguments import ClassificationArguments, ReviewArguments, SeedArguments
from hf_minigpt.classification.data import load_reviews, text_key
from hf_minigpt.data.tales.reviews import tale_reviews
from hf_minigpt.recipes import finetune_imdb, pretrain
from hf_minigpt.training.arguments import ModelArguments
from hf_minigpt.training.checkpoints.sealing import seal_checkpoint
from hf_minigpt.training.lora import LoraArguments
from hf_minigpt.training.parsing import parse


ROOT = Path(__file__).parents[2]
QUIET = ["--cpu_threads", "1", "--disable_tqdm", "true", "--logging_steps", "0.5"]
SMALL = ["--config_overrides", "hidden_size=32", "num_attention_heads=2", "num_hidden_layers=2"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Each resample of the pipeline's accuracy takes as long as a training step of these tiny models."""
    monkeypatch.setattr(report, "NUM_RESAMPLES", 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def reviews(folder) -> Path:
    texts, labels = tale_reviews(120)
    # Contains a duplicate, and class names instead of numbers.
    frame = pd.DataFrame({"review": [*texts, texts[0]], "verdict": [["neg", "pos"][i] for i in [*labels, labels[0]]]})
    frame.to_csv(folder / "reviews.csv", index=False)
    return folder / "reviews.csv"


@pytest.fixture(scope="module")
def data_flags(reviews) -> list[str]:
    flags = ["--dataset", str(reviews), "--text_column", "review", "--label_column", "verdict"]
    return [*flags, "--label_map", "neg=negative", "pos=positive"]


@pytest.fixture(scope="module")
def pretrained(folder, data_flags) -> Path:
    """Write the training texts and pretrain on them."""
    texts = folder / "texts.parquet"
    assert finetune_imdb.main([*data_flags, "--write_training_texts", str(texts)]) == {}
    flags = ["--dataset", str(texts), "--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "lm")]
    flags += ["--vocab_size", "320", "--context_length", "64", "--max_steps", "4", "--validation_fraction", "0.2"]
    pretrain.main([*flags, "--per_device_train_batch_size", "4", *SMALL, *QUIET])
    return folder / "lm"


@pytest.mark.smoke
def test_pretrained_model_becomes_a_documented_classifier(pretrained, reviews, folder, data_flags):
    output = folder / "classifier"
    flags = [*data_flags, "--model", str(pretrained), "--output_dir", str(output), "--seeds", "1", "2"]
    flags += ["--num_train_epochs", "1", "--tokens_per_batch", "1024", "--auxiliary_lm_weight", "0.5"]
    metrics = finetune_imdb.main([*flags, "--baseline", "true", "--pipeline_examples", "4", *QUIET])
    results = json.loads((output / "all_results.json").read_text())
    names = {"test_accuracy", "test_f1", "test_roc_auc", "test_calibration_error", "test_accuracy_mean"}
    names |= {"test_baseline_accuracy", "test_mcnemar_p", "test_pipeline_accuracy", "train_examples_per_second"}
    assert names <= set(results)
    assert {name: metrics[name] for name in names} == {name: results[name] for name in names}
    for name in ("README.md", "confusion_matrix.png", "reliability.png", "modeling_minigpt.py", "tokenizer.json"):
        assert (output / name).is_file(), name
    card = (output / "README.md").read_text()
    assert f"{results['test_accuracy']:.2%}" in card and "pipeline_tag: text-classification" in card
    assert "Dataset: reviews.csv" in card and "1, of which 0 were test texts" in card
    # The pretraining texts are the training texts, without held-out ones.
    pretraining = pd.read_parquet(folder / "texts.parquet")["text"]
    review_args = ReviewArguments(
        str(reviews), text_column="review", label_column="verdict", label_map=["neg=negative", "pos=positive"]
    )
    splits = load_reviews(review_args)
    assert set(pretraining) == set(splits.train.texts)
    assert not set(map(text_key, pretraining)) & set(map(text_key, splits.test.texts))
    answers = pipeline("text-classification", model=str(output))(splits.test.texts[:3], truncation=True)
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    assert (output / "seed-2").is_dir()


def test_adapters_are_saved_alone_or_merged(pretrained, folder, data_flags, capsys, monkeypatch):
    # The test above draws them.
    monkeypatch.setattr("hf_minigpt.classification.results.draw_figures", lambda *args: None)
    flags = [*data_flags, "--model", str(pretrained), "--num_train_epochs", "1", "--tokens_per_batch", "1024"]
    flags += ["--lora_rank", "8", "--optimizer", "adamw", *QUIET]
    adapters, merged = folder / "adapters", folder / "merged"
    first = finetune_imdb.main([*flags, "--output_dir", str(adapters), "--pipeline_examples", "4"])
    assert (adapters / "adapter_model.safetensors").is_file() and not (adapters / "model.safetensors").exists()
    assert "load_classifier" in capsys.readouterr().out
    # The pipeline applies the adapters.
    assert 0 <= first["test_pipeline_accuracy"] == first["test_same_texts_accuracy"] <= 1
    second = finetune_imdb.main(
        [*flags, "--output_dir", str(merged), "--merge_lora", "true", "--pipeline_examples", "0"]
    )
    assert (merged / "model.safetensors").is_file() and first["test_loss"] == second["test_loss"]


@pytest.mark.parametrize("name", ["imdb.yaml", "imdb_pretrain.yaml"])
def test_configs_set_the_arguments(name):
    path = ROOT / "recipes" / "configs" / name
    if name == "imdb.yaml":
        types = (ModelArguments, ReviewArguments, ClassificationArguments, LoraArguments, SeedArguments)
        parsed = parse(types, ["--config", str(path)])
    else:
        parsed = parse((ModelArguments, pretrain.DataArguments, pretrain.PretrainArguments), ["--config", str(path)])
        parsed[0].overrides()
    for key, value in yaml.safe_load(path.read_text()).items():
        if key != "config_overrides":
            (found,) = [getattr(arguments, key) for arguments in parsed if key in vars(arguments)]
            assert found == value or float(found) == float(value), key


def test_errors_are_found_before_a_model_is_built(data_flags, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_minigpt.classification.baseline.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="scikit-learn"):
        finetune_imdb.main([*data_flags, "--baseline", "true"])
    with pytest.raises(ValueError, match="without --model"):
        finetune_imdb.main([*data_flags, "--lora_rank", "8"])
    checkpoint = tmp_path / "seed-2" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    seal_checkpoint(checkpoint, {})
    monkeypatch.setattr(finetune_imdb, "build_classifier", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=r"holds checkpoint-1.*--resume_from_checkpoint auto"):
        finetune_imdb.main([*data_flags, "--output_dir", str(tmp_path), "--seeds", "1", "2"])


@pytest.mark.slow
def test_default_run_beats_the_baseline_and_loads_without_the_package(tmp_path):
    output = tmp_path / "tales"
    metrics = finetune_imdb.main(["--output_dir", str(output), "--baseline", "true", *QUIET])
    assert metrics["test_accuracy"] > 0.95 and metrics["test_baseline_accuracy"] < 0.8
    assert metrics["test_mcnemar_p"] < 1e-6
    # Load the folder in a process without this package.
    script = (
        "from transformers import pipeline; import sys\n"
        "classify = pipeline('text-classification', model=sys.argv[1], trust_remote_code=True)\n"
        "print(classify(['At first I found it quite dull indeed, yet in the end I found it quite witty indeed.', "
        "'My aunt found it quite witty indeed, but I found it quite dull indeed.']))\n"
        "assert not any(name.startswith('hf_minigpt') for name in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(output)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [part.split("'")[0] for part in result.stdout.split("'label': '")[1:]] == ["positive", "negative"]
