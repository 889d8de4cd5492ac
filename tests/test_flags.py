"""Invalid flags are refused by name before any work, in every recipe."""

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import yaml
from transformers import TrainingArguments

from hf_minigpt.classification.arguments import ClassificationArguments, ReviewArguments, SeedArguments
from hf_minigpt.flags import Needs, OneOf, Range, Unique, check_flags, conditions, number
from hf_minigpt.instructions.arguments import InstructionArguments, SFTArguments
from hf_minigpt.pretraining.arguments import PlanArguments, PretrainArguments
from hf_minigpt.pretraining.ladder import LadderArguments
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.lora import LoraArguments
from hf_minigpt.training.parsing import parse


JOBS = {
    "pretrain": (ModelArguments, DataArguments, PlanArguments, PretrainArguments),
    "classify": (ModelArguments, ReviewArguments, ClassificationArguments, LoraArguments, SeedArguments),
    "sft": (InstructionArguments, SFTArguments, LoraArguments),
    "ladder": (DataArguments, LadderArguments),
}
# job -> flag -> invalid values
WRONG = {
    "pretrain": {
        "seed": ["-1", str(2**32)],
        "data_seed": ["-1"],
        "split_seed": ["-1"],
        "max_steps": ["0", "-2", str(10**30)],
        "num_train_epochs": ["0", "-1", "nan", "inf"],
        "learning_rate": ["-1", "nan", "inf", "1e300"],
        "matrix_learning_rate": ["-0.1", "nan", "1e300"],
        "embedding_learning_rate": ["-1"],
        "weight_decay": ["-0.1", "nan", "1e300"],
        "adam_beta1": ["1", "-0.1"],
        "adam_beta2": ["1", "nan"],
        "adam_epsilon": ["0", "-1"],
        "max_grad_norm": ["-1", "nan"],
        "warmup_steps": ["-1", "nan", "inf"],
        "decay_fraction": ["-0.1", "1.1", "nan"],
        "per_device_train_batch_size": ["0", "-1"],
        "per_device_eval_batch_size": ["0"],
        "gradient_accumulation_steps": ["0", "-1"],
        "logging_steps": ["-1", "nan"],
        "eval_steps": ["0", "-1", "nan"],
        "save_steps": ["0", "-1", "inf"],
        "save_total_limit": ["0", "-1"],
        "eval_max_rows": ["0", "-1"],
        "eval_delay": ["-1"],
        "dataloader_num_workers": ["-1", "1000000"],
        "ddp_timeout": ["0"],
        "cpu_threads": ["0", "-1", "1000000"],
        "max_examples": ["0", "-1"],
        "validation_fraction": ["0", "1", "nan"],
        "streaming_sample": ["0"],
        "shuffle_characters": ["0"],
        "vocab_size": ["0", "-64", "100", "64", "6400000000"],
        "context_length": ["0", "1", "-1"],
        "price_per_hour": ["-1", "nan"],
        "flops_per_second": ["0", "inf"],
        "preset": ["misspelt", ""],
        "attn_implementation": ["misspelt"],
        "dataset": ["", " "],
        "text_column": [""],
        "output_dir": [""],
        "tokenizer": [""],
        "optim": ["misspelt"],
        "lr_scheduler_type": ["misspelt", "cosine_with_min_lr"],
        "lr_scheduler_kwargs": ["misspelt", "[1]", '{"misspelt": 1}'],
        "optim_args": ["misspelt"],
        "eval_strategy": ["misspelt"],
        "save_strategy": ["misspelt", "best"],
        "hub_strategy": ["misspelt"],
        "report_to": ["misspelt"],
        "metric_for_best_model": ["misspelt", "roc_auc"],
        "train_sampling_strategy": ["misspelt"],
        "torch_compile_backend": ["misspelt"],
        "accelerator_config": ["misspelt"],
        "remove_unused_columns": ["true"],
    },
    "classify": {
        "max_examples": ["0", "-1"],
        "test_fraction": ["0", "1", "-0.1"],
        "validation_fraction": ["0", "1"],
        "pipeline_examples": ["-1"],
        "tokens_per_batch": ["0", "-1"],
        "auxiliary_lm_weight": ["-1", "nan"],
        "dropout": ["1", "-0.1", "nan"],
        "attention_dropout": ["1"],
        "token_dropout": ["1", "nan"],
        "adversarial_epsilon": ["1", "-1"],
        "layer_decay": ["0", "1.1", "nan"],
        "frozen_layers": ["-1"],
        "early_stopping_patience": ["0", "-1"],
        "lora_rank": ["-1"],
        "lora_alpha": ["0"],
        "lora_dropout": ["1", "0.5"],
        "seeds": ["-1"],
        "metric_for_best_model": ["misspelt", "perplexity"],
        "eval_strategy": ["no"],
    },
    "sft": {
        "max_examples": ["0", "-1"],
        "validation_fraction": ["0", "1", "nan"],
        "max_lost_fraction": ["1", "-0.1"],
        "context_length": ["0", "-1"],
        "packed_length": ["0"],
        "pretraining_fraction": ["1", "-0.1"],
        "pretraining_dataset": ["text.txt"],
        "lora_rank": ["-1"],
        "lora_alpha": ["0", "8"],
        "learning_rate_factor": ["-1", "nan"],
        "show_examples": ["-1"],
        "eval_answers": ["-1"],
        "max_new_tokens": ["0", "-1"],
        "metric_for_best_model": ["bits_per_byte"],
        "attn_implementation": ["misspelt"],
    },
    "ladder": {"max_steps": ["0", "-1"], "eval_max_rows": ["0"], "metric_for_best_model": ["misspelt"]},
}
CASES = [(job, name, value) for job, flags in WRONG.items() for name, values in flags.items() for value in values]
# valid values at the bounds
RIGHT = {
    "pretrain": {
        "seed": "0",
        "max_steps": "1",
        "learning_rate": "0",
        "max_grad_norm": "0",
        "decay_fraction": "1",
        "vocab_size": "320",
        "context_length": "2",
        "eval_max_rows": "1",
        "save_strategy": "no",
        "attn_implementation": "eager",
        "lr_scheduler_type": "cosine",
        "report_to": "none",
        "metric_for_best_model": "eval_bits_per_byte",
        "include_num_input_tokens_seen": "false",
    },
    "classify": {"max_examples": "1", "pipeline_examples": "0", "frozen_layers": "0", "layer_decay": "1"},
    "sft": {"eval_answers": "0", "show_examples": "0", "lora_rank": "0", "learning_rate_factor": "0"},
}


@pytest.mark.parametrize(("job", "name", "value"), CASES, ids=["-".join(case)[:60] for case in CASES])
def test_invalid_values_are_refused_by_name(job, name, value, capsys):
    # argparse exits for values of another type and unknown choices
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(JOBS[job], [f"--{name}={value}"])
    message = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    assert re.search(rf"\b{name}\b", message)


@pytest.mark.parametrize(
    ("job", "name", "value"), [(job, name, value) for job, flags in RIGHT.items() for name, value in flags.items()]
)
def test_values_at_the_bounds_are_accepted(job, name, value):
    parsed = parse(JOBS[job], [f"--{name}", value])
    (found,) = [getattr(arguments, name) for arguments in parsed if hasattr(arguments, name)]
    assert found is not None


def test_yaml_values_are_checked(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"seed": -1}))
    with pytest.raises(ValueError, match="seed=-1 must be at least 0 and at most 4294967295"):
        parse(JOBS["pretrain"], ["--config", str(path)])


def test_inherited_settings_are_checked():
    with pytest.raises(ValueError, match="learning_rate=-1"):
        parse(JOBS["sft"], [], defaults={"learning_rate": -1.0})


def test_arguments_made_in_python_are_checked():
    with pytest.raises(ValueError, match="seed=-1"):
        PretrainArguments(seed=-1)
    with pytest.raises(ValueError, match="max_examples=0"):
        ReviewArguments(max_examples=0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--save_steps", "30", "--eval_steps", "20"], "multiple of the evaluation"),
        (["--save_steps", "0.3", "--eval_steps", "0.2"], "multiple of the evaluation"),
        (["--save_strategy", "epoch"], "save and eval strategy to match"),
    ],
)
def test_the_best_model_requires_a_checkpoint_for_each_evaluation(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(JOBS["pretrain"], [*argv, "--load_best_model_at_end", "true"])


@pytest.mark.parametrize(
    ("job", "metric", "greater"),
    [
        ("pretrain", "perplexity", False),
        ("pretrain", "eval_bits_per_byte", False),
        ("pretrain", "accuracy", True),
        ("classify", "calibration_error", False),
        ("classify", "f1", True),
    ],
)
def test_greater_is_better_follows_the_metric(job, metric, greater):
    argv = ["--metric_for_best_model", metric]
    args = next(arguments for arguments in parse(JOBS[job], argv) if isinstance(arguments, TrainingArguments))
    assert args.greater_is_better is greater


def test_a_tracker_must_be_installed(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    parse(JOBS["pretrain"], ["--report_to", "tensorboard"])
    with pytest.raises(
        ValueError, match=r"report_to='wandb' requires a package that is not installed\. Run: pip install wandb"
    ):
        parse(JOBS["pretrain"], ["--report_to", "wandb"])


def test_an_optimizer_must_be_installed(monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    with pytest.raises(ValueError, match="optim='adamw_bnb_8bit' with optim_args=None cannot be used here"):
        parse(JOBS["pretrain"], ["--optimizer", "trainer", "--optim", "adamw_bnb_8bit"])


def test_a_warmup_longer_than_the_run_is_warned_about(caplog):
    *_, args = parse(JOBS["pretrain"], ["--warmup_steps", "50", "--max_steps", "10"])
    assert "warmup_steps=50.0 exceeds the 10 steps of this run" in caplog.text
    assert args.scheduler_kwargs(10)["num_decay_steps"] == 0


def test_every_numeric_flag_has_a_range():
    """Also holds for new flags."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    missing = []
    for dataclass_type in {cls for classes in JOBS.values() for cls in classes}:
        declared = conditions(dataclass_type)
        for field in dataclasses.fields(dataclass_type):
            is_number = any(kind in str(field.type) for kind in ("int", "float")) and "Literal" not in str(field.type)
            has_range = any(isinstance(condition, Range) for condition in declared.get(field.name, []))
            if field.name not in inherited and is_number and not has_range:
                missing.append(f"{dataclass_type.__name__}.{field.name}")
    assert not missing


# The conditions themselves


@dataclass
class Example:
    CONDITIONS: ClassVar = {"inherited": (Range(least=1),)}
    fraction: Annotated[float, Range(above=0, below=1)] = 0.1
    size: Annotated[int | None, Range(least=64, most=128, multiple_of=64, also=(-1,))] = None
    adapter: bool = False
    rank: Annotated[int, Range(least=1), Needs("adapter")] = 8
    names: Annotated[list[str], OneOf(["one", "two"]), Unique()] = dataclasses.field(default_factory=list)
    inherited: int = 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fraction": 1.0}, "fraction=1.0 must be above 0 and below 1."),
        ({"fraction": math.nan}, "fraction=nan is not a finite number"),
        ({"size": 96}, "size=96 must be at least 64 and at most 128 and a multiple of 64, or -1."),
        ({"size": 192}, "size=192 must be"),
        ({"size": -1}, None),
        ({"size": 128}, None),
        ({"rank": 4}, "rank=4 requires adapter, which is False"),
        ({"rank": 4, "adapter": True}, None),
        ({"rank": 0, "adapter": True}, "rank=0 must be at least 1"),
        ({"names": ["one", "tvo"]}, r"names=\['one', 'tvo'\] is unknown. Did you mean two\? Choose from: one, two."),
        ({"names": ["one", "one"]}, r"names=\['one', 'one'\] has duplicates"),
        ({"names": ["two", "one"]}, None),
        ({"names": [""]}, "is empty"),
        ({"inherited": -1}, "inherited=-1 must be at least 1"),
        # defaults are not checked
        ({"inherited": 0, "rank": 8}, None),
    ],
)
def test_conditions(values, message):
    values = dataclasses.asdict(Example()) | values
    if message is None:
        check_flags([Example], values)
    else:
        with pytest.raises(ValueError, match=message):
            check_flags([Example], values)


@pytest.mark.parametrize("text", ["0", "-3", "nan", "2.5", "x", str(10**30)])
def test_number_checks_argparse_values(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=number(int, least=1))
    assert parser.parse_args(["--count", "3"]).count == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", text])
    error = capsys.readouterr().err
    assert "argument --count" in error and text in error
