"""recipes/sft.py from flags to files, on a small base model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_minigpt.adapters import load_causal_lm
from hf_minigpt.recipes import chat, pretrain, sft
from hf_minigpt.tokenization import check_tokenizer_fits


CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("sft_*.yaml"))
QUICK = shlex.split("--disable_tqdm true --cpu_threads 1 --max_new_tokens 12 --eval_strategy no --save_strategy no")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def base(folder):
    text = folder / "text.txt"
    lines = [f"Say {word} twice. {word} {word}, and {word} once more." for word in ("red", "blue", "green")]
    text.write_text("\n\n".join(lines * 40))
    flags = "--context_length 48 --vocab_size 320 --per_device_train_batch_size 4 --max_steps 20 --cpu_threads 1"
    flags += " --disable_tqdm true --eval_strategy no --save_strategy no --config_overrides hidden_size=32"
    flags += " num_attention_heads=2 num_hidden_layers=2"
    output = folder / "base"
    paths = ["--dataset", str(text), "--output_dir", str(output), "--cache_dir", str(folder / "cache")]
    pretrain.main([*shlex.split(flags), *paths])
    return output


@pytest.fixture(scope="module")
def records(folder):
    path = folder / "instructions.json"
    colors = ("red", "blue", "green")
    rows = [
        {"instruction": f"Say {color} {number}.", "input": "" if number % 2 else "Now", "output": color}
        for color in colors
        for number in range(20)
    ]
    path.write_text(json.dumps([*rows, rows[0], {**rows[1], "output": ""}]))
    return path


def flags(base, records, output, *more):
    return ["--model", str(base), "--dataset", str(records), "--output_dir", str(output), *QUICK, *more]


@pytest.mark.smoke
def test_a_finetuned_model_answers_and_stops(base, records, folder, capsys):
    output = folder / "assistant"
    more = [
        "--num_train_epochs",
        "25",
        "--eval_strategy",
        "steps",
        "--learning_rate_factor",
        "1",
        "--show_examples",
        "1",
    ]
    metrics = sft.main(flags(base, records, output, *more))
    out = capsys.readouterr().out
    assert "62 records, 2 left out (1 duplicate, 1 empty)" in out
    assert "context_length=48" in out and "optimizer=muon" in out and "matrix_learning_rate=0.01" in out
    assert "\033[32m" in out and "<|endoftext|>\033[0m" in out
    assert metrics["eval_perplexity"] < 0.5 * metrics["before_perplexity"]
    assert metrics["eval_exact_match"] > 0.5 and metrics["eval_answers_ended"] == 1
    assert {"eval_exact_match/with input", "eval_exact_match/without input"} <= set(metrics)
    assert json.loads((output / "all_results.json").read_text())["eval_exact_match"] == metrics["eval_exact_match"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    check_tokenizer_fits(tokenizer, model.config)
    assert model.config.use_cache and not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # the answer ends by itself: no length limit is given
    turns = pipeline("text-generation", model=str(output))([{"role": "user", "content": "Say red 1."}])
    answer = turns[0]["generated_text"][-1]["content"]
    assert len(answer) < 20
    # the command that the recipe prints
    command = shlex.split(next(line for line in out.splitlines() if "recipes/chat.py" in line))
    assert command[:2] == ["python", "recipes/chat.py"]
    assert chat.main([*command[2:], "--max_new_tokens", "8"])[-1]["role"] == "assistant"

    card = (output / "README.md").read_text()
    figure = f"{metrics['before_perplexity']:.2f} | {metrics['eval_perplexity']:.2f}"
    assert figure in card and "before: " in card and "62 records, 2 left out" in card and "recipes/sft.py" in card
    assert "## How to use" in card and str(folder) not in card.replace(shlex.join(flags(base, records, output)), "")


@pytest.mark.parametrize("merge", [False, True])
def test_lora(merge, base, records, folder, capsys):
    output = folder / f"lora_{merge}"
    more = ["--lora_rank", "4", "--max_steps", "6", "--merge_lora", str(merge)]
    metrics = sft.main(flags(base, records, output, *more))
    assert "optimizer=adamw, learning_rate=0.001" in capsys.readouterr().out
    assert (output / "adapter_config.json").is_file() != merge
    assert (output / "model.safetensors").is_file() == merge
    assert metrics["eval_loss"] < metrics["before_loss"]
    messages = chat.main([str(output), "--greedy", "--prompt", "Say red 1.", "--max_new_tokens", "8"])
    assert messages[-1]["role"] == "assistant"
    model = load_causal_lm(str(output))
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = [
        name for name, tensor in weights.items() if not torch.equal(tensor, model.state_dict()[name][: len(tensor)])
    ]
    assert any("q_proj" in name for name in changed) and not any("norm" in name for name in changed)


def test_a_resumed_run_ends_like_an_uninterrupted_one(base, records, folder):
    output = folder / "resumed"
    more = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval_answers", "0"]
    expected = sft.main(flags(base, records, output, *more))
    with pytest.raises(ValueError, match="holds checkpoint-4"):
        sft.main(flags(base, records, output, *more))
    # as if the run had stopped after its first checkpoint
    shutil.rmtree(output / "checkpoint-4")
    found = sft.main(flags(base, records, output, *more, "--resume_from_checkpoint", "auto"))
    assert found["eval_loss"] == expected["eval_loss"]


def test_padded_rows_with_pretraining_text(base, records, folder):
    output = folder / "mixed"
    more = ["--packing", "false", "--pretraining_fraction", "0.3", "--pretraining_dataset", str(folder / "text.txt")]
    cache = ["--cache_dir", str(folder / "cache"), "--chat_format", "alpaca", "--context_length", "300"]
    metrics = sft.main(flags(base, records, output, *more, *cache, "--max_steps", "4"))
    assert metrics["eval_loss"] < metrics["before_loss"]
    assert "### Response:" in AutoTokenizer.from_pretrained(output).chat_template
    # Alpaca's headers are plain text, so there are no new tokens
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 320


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context_length", "12"], "over-long.*more than max_lost_fraction"),
        (["--max_lost_fraction", "0.01"], "1 duplicate, 1 empty.*more than max_lost_fraction=1%"),
        (["--merge_lora", "true"], "merge_lora=True with lora_rank=0"),
        (["--validation_fraction", "0"], "leaves the held-out set empty"),
        (["--dataset", "nothing.json"], "no file or folder nothing.json"),
    ],
)
def test_impossible_flags_are_refused(more, message, base, records, folder):
    with pytest.raises(ValueError, match=message):
        sft.main(flags(base, records, folder / "refused", *more))


def test_without_a_dataset_it_answers_questions_about_the_tales(folder, monkeypatch):
    """All flags but the sizes are the defaults. The base model is cached."""
    monkeypatch.chdir(folder)
    small = ["--max_examples", "60", "--max_steps", "2", "--context_length", "32", "--eval_strategy", "no"]
    monkeypatch.setattr("hf_minigpt.instructions.model.EMBEDDED_BASE_FLAGS", tuple(small))
    monkeypatch.setattr(sft, "EMBEDDED_BASE_FLAGS", tuple(small))
    monkeypatch.setattr("hf_minigpt.instructions.records.NUM_HELD_OUT_TALE_RECORDS", 16)
    more = ["--cache_dir", str(folder / "cache")]
    more += shlex.split("--context_length 256 --max_examples 40 --max_steps 2 --eval_answers 8")
    metrics = sft.main([*QUICK, *more])
    assert (folder / "runs/sft/model.safetensors").is_file()
    assert len([name for name in metrics if name.startswith("eval_exact_match/")]) == 8
    monkeypatch.setattr(pretrain, "main", lambda argv: pytest.fail("pretrained again"))
    cached = sft.embedded_base(sft.InstructionArguments(cache_dir=str(folder / "cache")), sft.SFTArguments())
    assert Path(cached, "model.safetensors").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains(path, base, records, folder):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert re.search(r"recipes/sft\.py", path.read_text(encoding="utf-8")) and "dataset" in values
    small = ["--max_steps", "2", "--context_length", "400", "--per_device_train_batch_size", "2"]
    small += ["--gradient_accumulation_steps", "1", "--eval_answers", "4"]
    metrics = sft.main(["--config", str(path), *flags(base, records, folder / path.stem, *small)])
    assert metrics["eval_loss"] > 0


def test_other_users_can_read_the_cached_base_model(tmp_path, monkeypatch):
    folder = sft.embedded_base_folder(str(tmp_path))

    def pretrain_as_safetensors_writes(flags, another_run_follows):
        assert another_run_follows
        assert flags[flags.index("--output_dir") + 1] == str(folder)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch(mode=0o600)
        (folder / "all_results.json").write_text("{}")

    monkeypatch.setattr(sft.pretrain, "main", pretrain_as_safetensors_writes)
    new = tmp_path / "new"
    new.touch()
    assert sft.embedded_base(sft.InstructionArguments(cache_dir=str(tmp_path)), sft.SFTArguments()) == str(folder)
    assert (folder / "model.safetensors").stat().st_mode == new.stat().st_mode
