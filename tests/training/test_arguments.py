"""The recipes' arguments, from flags and YAML files."""

from pathlib import Path

import pytest
import torch
import yaml

from hf_minigpt.pretraining.arguments import PlanArguments, PretrainArguments
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import check_writable, use_all_cores


ALL = (ModelArguments, DataArguments, PlanArguments, PretrainArguments)
RECIPES = Path(__file__).parents[2] / "recipes"


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_override_yaml_which_overrides_defaults(tmp_path):
    config = write_yaml(
        tmp_path,
        "learning_rate: 1e-4\nmax_steps: 7\njoin_sentences: true\nsave_total_limit:\n"
        "config_overrides: {hidden_size: 32, hidden_act: silu, norm_affine: false, layer_norm_epsilon: 1e-6}\n"
        "lr_scheduler_kwargs: {num_decay_steps: 3}\n",
    )
    model, data, plan, args = parse(ALL, ["--config", config, "--max-steps", "9", "--dataset=some/where", "--plan"])
    assert (args.learning_rate, args.max_steps, args.save_total_limit, args.seed) == (1e-4, 9, None, 42)
    assert (data.join_sentences, data.dataset, plan.plan) == (True, "some/where", True)
    assert model.overrides() == {
        "hidden_size": 32,
        "hidden_act": "silu",
        "norm_affine": False,
        "layer_norm_epsilon": 1e-6,
    }
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 3}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown flag --lerning_rate. Did you mean --learning_rate?"),
        (["--max_step", "3"], "Did you mean --max_steps?"),
        (["--max_steps", "many"], "invalid int value"),
        (["--optimizer", "adamv"], "invalid choice"),
        (["stray"], "unknown flag stray"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_in_flags_end_the_program_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(ALL, argv)
    error = capsys.readouterr().err
    assert message in error
    # the usage of two hundred flags is not printed
    assert len(error.splitlines()) < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1", "unknown key 'lr'"),
        ("datset: x", "Did you mean dataset?"),
        ("max_steps: lots", "invalid int value"),
        ("optimizer: sgd", "invalid choice"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "run.yaml"),
    ],
)
def test_mistakes_in_yaml_end_the_program_with_a_message(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(ALL, ["--config", write_yaml(tmp_path, text)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"), [("max_documents", "max_examples"), ("dataset_split", "train_split"), ("misspelt_split", None)]
)
def test_renamed_flags_are_reported_with_their_new_name(old, new, tmp_path, capsys):
    for arguments in ([f"--{old}", "3"], ["--config", write_yaml(tmp_path, f"{old}: 3")]):
        with pytest.raises(SystemExit):
            parse(ALL, arguments)
        error = capsys.readouterr().err
        assert (f"It was renamed to --{new}." in error or f"It was renamed to {new}." in error) == (new is not None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim", "sgd"], "optim='sgd' requires optimizer='trainer'"),
        (["--precision", "fp32", "--fp16"], "precision='fp32' conflicts with"),
        (["--decay_fraction", "2"], "decay_fraction=2.0"),
        (["--validation_fraction", "1"], "validation_fraction=1.0"),
        (["--dataloader_persistent_workers", "--dataloader_num_workers", "1"], "dataloader_persistent_workers=True"),
        (["--model", "a", "--config_overrides", "hidden_size=3"], "config_overrides="),
        (["--model", "a", "--vocab_size", "320"], "vocab_size=320"),
    ],
)
def test_conflicts_name_field_and_value(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(ALL, argv)


def test_an_unknown_config_override_suggests_the_closest_field():
    model, *_ = parse(ALL, ["--config_overrides", "hiden_size=3"])
    with pytest.raises(ValueError, match=r"'hiden_size=3'.*Did you mean hidden_size\?"):
        model.overrides()


def test_optimizer_trainer_uses_optim():
    *_, args = parse(ALL, ["--optimizer", "trainer", "--optim", "sgd"])
    assert args.optim == "sgd"


def test_the_default_precision_on_a_cpu_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = PretrainArguments()
    assert (args.bf16, args.fp16, args.use_cpu, args.report_to) == (False, False, True, [])
    assert "cpu" in args.describe_hardware() and "fp32" in args.describe_hardware()


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_the_default_precision_on_a_gpu_is_one_that_it_supports(monkeypatch, has_bf16, precision):
    args = PretrainArguments()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    args.use_cpu, args.bf16, args.fp16 = False, False, False
    args._choose_precision()
    assert {"bf16": args.bf16, "fp16": args.fp16} == {"bf16": precision == "bf16", "fp16": precision == "fp16"}


def test_decay_fraction_becomes_a_number_of_steps():
    args = PretrainArguments(warmup_steps=10, decay_fraction=0.6)
    assert args.scheduler_kwargs(100) == {"num_decay_steps": 60, "decay_type": "linear"}
    # at most the steps after the warmup
    assert args.scheduler_kwargs(15)["num_decay_steps"] == 5
    cosine = PretrainArguments(lr_scheduler_type="cosine")
    assert cosine.scheduler_kwargs(100) == {}


def test_threads_are_the_cores_divided_by_the_processes(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        use_all_cores()
        assert torch.get_num_threads() == 3
        use_all_cores(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_file_is_refused_as_output_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*taken"):
        check_writable(str(tmp_path / "taken"))


@pytest.mark.parametrize("path", sorted((RECIPES / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_every_launch_file(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    # the recipes choose the precision
    assert config.mixed_precision == "no"
    assert set(yaml.safe_load(path.read_text())) >= {"distributed_type", "num_processes"}
