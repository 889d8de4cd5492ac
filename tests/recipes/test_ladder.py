"""The ladder of models up to Baby GPT."""

import json
import re

import matplotlib.image
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minigpt.presets import BABY_RUNGS
from hf_minigpt.recipes import ladder


TINY = ["--max_steps", "2", "--eval_steps", "1", "--eval_batches", "1", "--max_examples", "60"]


def run(tmp_path, *flags: str) -> dict[str, float]:
    return ladder.main([*TINY, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), *flags])


@pytest.fixture(scope="module")
def ladder_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    return folder / "out", run(folder)


def test_every_rung_is_trained_saved_and_drawn(ladder_run):
    folder, metrics = ladder_run
    assert json.loads((folder / "all_results.json").read_text()) == metrics
    assert matplotlib.image.imread(folder / "ladder.png").shape[:2] > (400, 800)
    for name in BABY_RUNGS:
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert model.num_parameters() == metrics[f"{name}_parameters"]
        assert model.config.vocab_size == len(tokenizer)
        assert tokenizer.model_max_length == model.config.max_position_embeddings
        assert model.config.num_hidden_layers == {"bigram": 0, "scaled-up": 4}.get(
            name, 1 if name in ("one-head", "several-heads", "feed-forward") else 6
        )
        # two steps teach almost nothing
        assert 2 < metrics[f"{name}_eval_loss"] < 6 and 2 < metrics[f"{name}_eval_train_loss"] < 6
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 2]
        assert [entry["step"] for entry in history if "eval_train_loss" in entry] == [1, 2, 2]


@pytest.mark.slow
def test_each_idea_lowers_the_loss(tmp_path):
    """Attention beats the bigram table, and a deep stack requires residual connections."""
    rungs = ["bigram", "feed-forward", "blocks", "residual"]
    small = ["--max_steps", "1000", "--eval_steps", "1000", "--eval_batches", "40", "--max_examples", "600"]
    metrics = run(tmp_path, "--rungs", *rungs, *small, "--config_overrides", "num_hidden_layers=4")
    bigram, attention, blocks, residual = (metrics[f"{name}_eval_loss"] for name in rungs)
    assert attention < bigram - 0.05
    assert residual < min(attention, blocks) - 0.2


def test_selected_rungs_train_on_another_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Ärger über {i} Äpfel; {i % 7} Öl." for i in range(400)), encoding="utf-8")
    flags = ["--rungs", "one-head", "dropout", "--dataset", str(text), "--config_overrides", "hidden_size=24"]
    metrics = run(tmp_path, *flags)
    assert {key.partition("_")[0] for key in metrics} == {"one-head", "dropout"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dropout").config.hidden_size == 24
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "dropout")
    ids = tokenizer("Öl über Äpfel").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Öl über Äpfel"
    assert re.search(r"^dropout .* \d\.\d{4} ", capsys.readouterr().out, re.MULTILINE)


def test_mistakes_are_found_before_the_data_are_read(tmp_path):
    with pytest.raises(ValueError, match="rung 'heads' is unknown"):
        run(tmp_path, "--rungs", "bigram", "heads")
    with pytest.raises(ValueError, match="hidden_sise"):
        run(tmp_path, "--config_overrides", "hidden_sise=3")
    assert not (tmp_path / "cache").exists()


def test_the_configs_have_the_hyperparameters_of_the_article():
    columns = {
        "baby_cpu": (16, 8, 10000, 500, 100, 16, 4, 2, 2, 0.2, 5e-3),
        "baby_gpu": (64, 256, 10000, 500, 200, 512, 16, 6, 6, 0.2, 1e-3),
    }
    for name, column in columns.items():
        path = ladder.Path(__file__).parents[2] / "recipes" / "configs" / f"{name}.yaml"
        values = yaml.safe_load(path.read_text())
        fields = values["config_overrides"]
        assert column == (
            values["per_device_train_batch_size"],
            fields["max_position_embeddings"],
            values["max_steps"],
            values["eval_steps"],
            values["eval_batches"],
            fields["hidden_size"],
            fields["head_dim"],
            fields["num_hidden_layers"],
            fields["num_attention_heads"],
            fields["resid_pdrop"],
            float(values["learning_rate"]),
        )
        assert values["rungs"] == [rung for rung in BABY_RUNGS if rung != "scaled-up"]
        # the overrides agree with the preset
        preset = ladder.baby_rung("dropout", values["preset"])
        assert ladder.baby_rung("dropout", values["preset"], **fields).to_dict() == preset.to_dict()
