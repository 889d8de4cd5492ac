"""Both pretraining recipes, from the flags to the files that they write."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.recipes import chat, generate, pretrain, pretrain_loop
from hf_minigpt.training.checkpoints.signals import StopSignals


ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--context_length 32 --vocab_size 320 --per_device_train_batch_size 4 --cpu_threads 1 --disable_tqdm true "
    "--config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def corpus(folder) -> Path:
    books = folder / "books"
    books.mkdir()
    for i in range(6):
        words = [
            f"In the town {i} a cat met {j % 7} mice and said to the {j % 3}rd: run, or I eat you!" for j in range(60)
        ]
        (books / f"{i}.txt").write_text("\n\n".join(words))
    return books


@pytest.fixture(scope="module")
def pretrained(folder, corpus) -> Path:
    output = folder / "pretrained"
    metrics = pretrain.main([*SMALL, *flags(folder, output, corpus), "--max_steps", "8"])
    assert metrics["eval_loss"] > 0
    return output


def flags(folder: Path, output: Path, corpus: Path) -> list[str]:
    return ["--dataset", str(corpus), "--output_dir", str(output), "--cache_dir", str(folder / "cache")]


def run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.smoke
def test_pretrain_writes_a_model_that_stock_classes_load(pretrained):
    results = json.loads((pretrained / "all_results.json").read_text())
    assert {"eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy", "train_tokens_per_second"} <= set(
        results
    )
    for name in ("README.md", "loss.png", "generation_config.json", "modeling_minigpt.py", "tokenizer.json"):
        assert (pretrained / name).is_file(), name
    card = (pretrained / "README.md").read_text()
    assert f"{results['eval_bits_per_byte']:.4f}" in card
    # the card shows no path of this machine, except in the command
    assert "Dataset: books" in card
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    assert model.config.use_cache and model.dtype == torch.float32
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (320, 32)
    assert AutoTokenizer.from_pretrained(pretrained).model_max_length == 32
    text = pipeline("text-generation", model=str(pretrained))("In the town", max_new_tokens=5)[0]["generated_text"]
    assert text.startswith("In the town")


def test_training_continues_from_a_model_with_its_tokenizer_on_a_single_file(pretrained, corpus, folder):
    output = folder / "continued"
    small = ["--per_device_train_batch_size", "4", "--max_steps", "3", "--disable_tqdm", "true", "--cpu_threads", "1"]
    first = json.loads((pretrained / "all_results.json").read_text())
    metrics = pretrain.main(["--model", str(pretrained), *flags(folder, output, corpus / "0.txt"), *small])
    assert (output / "tokenizer.json").read_text() == (pretrained / "tokenizer.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(output).config.hidden_size == 32
    assert metrics["eval_loss"] < first["eval_loss"]


@pytest.mark.parametrize("recipe", [pretrain, pretrain_loop])
def test_a_stopped_run_resumes_to_the_same_weights(recipe, corpus, folder, monkeypatch):
    arguments = [*SMALL, "--max_steps", "6", "--save_steps", "2", "--cache_dir", str(folder / "cache")]
    arguments += ["--dataset", str(corpus), "--resume_from_checkpoint", "auto"]
    outputs = [folder / f"{recipe.__name__}_{kind}" for kind in ("untouched", "stopped")]
    expected = recipe.main([*arguments, "--output_dir", str(outputs[0])])
    with monkeypatch.context() as patch:
        # a signal in the third step of each run, also in the last step
        count = itertools.count(1)
        patch.setattr(
            StopSignals, "requested", lambda self: setattr(self, "agreed", next(count) % 3 == 0) or self.agreed
        )
        for _ in range(2):
            with pytest.raises(SystemExit, match="75"):
                recipe.main([*arguments, "--output_dir", str(outputs[1])])
            assert not (outputs[1] / "model.safetensors").exists()
    found = recipe.main([*arguments, "--output_dir", str(outputs[1])])
    name = "loss" if recipe is pretrain_loop else "eval_loss"
    assert found[name] == expected[name]
    weights = [(output / "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("recipe", [pretrain, pretrain_loop])
def test_a_folder_with_checkpoints_is_refused_before_any_work(recipe, corpus, folder, monkeypatch):
    output = folder / f"{recipe.__name__}_taken"
    arguments = [*SMALL, *flags(folder, output, corpus), "--max_steps", "2"]
    recipe.main(arguments)
    # more steps are a changed run
    with pytest.raises(ValueError, match=r"max_steps: 2 in the checkpoint, 3 now.*--allow_changed_run"):
        recipe.main([*arguments, "--max_steps", "3", "--resume_from_checkpoint", "auto"])
    more = ["--max_steps", "3", "--resume_from_checkpoint", "auto", "--allow_changed_run"]
    recipe.main([*arguments, *more])
    monkeypatch.setattr(recipe, "open_documents", lambda args: pytest.fail("the corpus was opened"))
    remedies = f"output_dir={output} holds checkpoint-3.*--resume_from_checkpoint auto.*another --output_dir"
    with pytest.raises(ValueError, match=remedies):
        recipe.main(arguments)


@pytest.mark.smoke
def test_without_arguments_pretraining_uses_the_tales(folder, monkeypatch):
    """All flags but the size of the job are the defaults."""
    monkeypatch.chdir(folder)
    small = ["--max_examples", "80", "--max_steps", "2", "--context_length", "64", "--cpu_threads", "1"]
    metrics = pretrain.main([*small, "--cache_dir", str(folder / "cache"), "--disable_tqdm", "true"])
    assert (folder / "runs/pretrain/model.safetensors").is_file()
    assert 0 < metrics["eval_entropy_bits_per_byte"] < metrics["eval_bits_per_byte"]
    assert metrics["eval_bits_per_byte_over_entropy"] > 1
    assert 0 <= metrics["eval_sentences_parsed"] <= 1 and 0 <= metrics["eval_claims_true"] <= 1


def test_the_loop_trains_like_the_trainer(corpus, folder):
    """The order of the rows differs, so the model does, but the loss is about the same."""
    arguments = [*SMALL, "--max_steps", "30", "--optimizer", "adamw", "--learning_rate", "0.01"]
    by_trainer = pretrain.main([*arguments, *flags(folder, folder / "trainer", corpus)])
    accumulated = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"]
    results = pretrain_loop.main([*arguments, *accumulated, *flags(folder, folder / "loop", corpus)])
    assert results["loss"] == pytest.approx(by_trainer["eval_loss"], rel=0.1)
    assert json.loads((folder / "loop/all_results.json").read_text()) == results
    assert AutoModelForCausalLM.from_pretrained(folder / "loop").config.hidden_size == 32


def test_the_compiled_loop_is_the_eager_one(corpus, folder):
    """And the eager loop resumes its checkpoint."""
    arguments = [*SMALL, "--max_steps", "4", "--save_steps", "2", "--gradient_accumulation_steps", "2"]
    eager = pretrain_loop.main([*arguments, *flags(folder, folder / "eager", corpus)])
    counters.clear()
    compiled_flags = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
    output = folder / "compiled"
    compiled = pretrain_loop.main([*arguments, *compiled_flags, *flags(folder, output, corpus)])
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    shutil.rmtree(output / "checkpoint-4")
    resumed = pretrain_loop.main([*arguments, "--resume_from_checkpoint", "auto", *flags(folder, output, corpus)])
    assert resumed["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_two_processes_are_one_run(corpus, folder):
    """Two processes with half the batch each train like one process."""
    arguments = [*SMALL, "--max_steps", "4", "--dataset", str(corpus), "--cache_dir", str(folder / "cache")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "tests.programs.pretraining_recipes", str(folder), *arguments]
    printed = run(command, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "recipes")]))
    assert printed.count("2 processes") == 2
    assert printed.count("broadcasts of buffers: 0;") == 2

    larger = [*arguments, "--per_device_train_batch_size", "8"]
    alone = pretrain.main([*larger, "--output_dir", str(folder / "one")])
    together = json.loads((folder / "two/all_results.json").read_text())
    assert together["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert together["train_tokens"] == alone["train_tokens"]
    alone = pretrain_loop.main([*larger, "--output_dir", str(folder / "one_by_loop")])
    together = json.loads((folder / "two_by_loop/all_results.json").read_text())
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["tokens"] == alone["tokens"]


@pytest.mark.slow
def test_accelerate_launch_starts_the_recipe(corpus, folder):
    output = folder / "launched"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/launch/cpu.yaml"]
    arguments = [*SMALL, *flags(folder, output, corpus), "--max_steps", "2", "--optimizer", "adamw"]
    printed = run([*launch, "recipes/pretrain.py", *arguments], PYTHONPATH=str(ROOT))
    assert f"python recipes/generate.py {output}" in printed


def test_plan_needs_no_corpus_and_trains_nothing(folder, capsys):
    output = folder / "planned"
    arguments = [*SMALL, "--dataset", "nobody/nothing", "--output_dir", str(output), "--max_steps", "10"]
    pretrain.main([*arguments, "--plan", "--flops_per_second", "1e9", "--price_per_hour", "3.6"])
    printed = capsys.readouterr().out
    assert "tokens per step   128" in printed and "1,280 in 10 steps" in printed
    assert not output.exists()
    # 2 blocks of 12 * 32 ** 2, head and embedding of 320 * 32; the embedding is only looked up in
    parameters = 2 * 12 * 32**2 + 2 * 320 * 32
    flops = 1280 * (6 * (parameters - 320 * 32) + 12 * 2 * 32 * 32)
    assert f"parameters        {parameters:,}" in printed
    assert f"FLOPs             {flops:.3g}" in printed
    assert f"price, about      {flops / 1e9 / 3600 * 3.6:,.2f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpt9"], "gpt9"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint='nowhere'"),
        (["--context_length", "100000"], "context_length"),
    ],
)
def test_mistakes_are_found_before_training(arguments, message, corpus, folder):
    with pytest.raises(ValueError, match=message):
        pretrain.main([*SMALL, *flags(folder, folder / "wrong", corpus), *arguments])
    assert not (folder / "wrong/config.json").exists()


def test_generate_streams_the_text(pretrained, capsys):
    arguments = [str(pretrained), "--prompt", "In the town", "--max_new_tokens", "12", "--seed", "3"]
    text = generate.main([*arguments, "--top_k", "5", "--top_p", "0.9"])
    assert text.startswith("In the town")
    assert capsys.readouterr().out.strip() == text.strip()
    assert generate.main([*arguments, "--top_k", "5", "--top_p", "0.9"]) == text
    greedy = [str(pretrained), "--prompt", "In the town", "--max_new_tokens", "12", "--greedy"]
    assert generate.main(greedy) == generate.main([*greedy, "--seed", "7"])


def test_generate_slides_over_a_learned_table(corpus, folder, capsys):
    output = folder / "learned"
    learned = ["position_embedding_type=learned", "qk_norm=false"]
    pretrain.main([*SMALL, *learned, *flags(folder, output, corpus), "--max_steps", "1", "--context_length", "16"])
    capsys.readouterr()
    generate.main([str(output), "--prompt", "In the town", "--max_new_tokens", "60", "--greedy"])
    printed = capsys.readouterr()
    assert "context is 16 tokens" in printed.err


def test_a_character_cut_by_a_window_is_printed_whole(pretrained, monkeypatch, capsys):
    """Windows of two tokens end within the bytes of every character, and the text ends within one."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    written = tokenizer("天地玄黃 👍 ", add_special_tokens=False)["input_ids"]
    written += tokenizer("宇", add_special_tokens=False)["input_ids"][:2]
    assert "\ufffd" in tokenizer.decode(written)
    rest = iter(written)

    def generate_next(model, ids, generation_config, streamer, **kwargs):
        new = torch.tensor([next(rest) for _ in range(generation_config.max_new_tokens)])
        streamer.put(ids)
        for token in new:
            streamer.put(token[None])
        streamer.end()
        return torch.cat([ids, new[None]], 1)

    monkeypatch.setattr(MiniGPTForCausalLM, "generate", generate_next)
    monkeypatch.setattr(generate, "windows", lambda length, num, context: [(1, 2)] * (num // 2) + [(1, 1)] * (num % 2))
    text = generate.main([str(pretrained), "--prompt", "The", "--max_new_tokens", str(len(written))])
    assert text.removeprefix("The") == "天地玄黃 👍 "
    assert capsys.readouterr().out.rstrip("\n") == "The天地玄黃 👍 "


def test_windows_never_pass_the_context():
    assert list(generate.windows(5, 100, None)) == [(5, 100)]
    for length, max_new_tokens, context in ((3, 50, 8), (8, 5, 8), (20, 9, 8), (1, 7, 1)):
        written = 0
        for kept, num in generate.windows(length, max_new_tokens, context):
            assert 1 <= kept <= min(context, length + written) and kept + num - 1 <= context
            written += num
        assert written == max_new_tokens


@pytest.mark.parametrize("program", [generate, chat], ids=["generate", "chat"])
@pytest.mark.parametrize(
    "flag",
    [
        *(["--temperature", "0"], ["--temperature", "nan"], ["--max_new_tokens", "0"], ["--top_k", "-1"]),
        *(["--top_p", "0"], ["--top_p", "1.5"], ["--top_p", "inf"], ["--seed", "-1"]),
    ],
)
def test_invalid_flags_are_refused_before_the_model_is_loaded(program, flag, capsys):
    with pytest.raises(SystemExit):
        program.main(["no/model", *flag])
    error = capsys.readouterr().err
    assert flag[0] in error and flag[1] in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save_strategy", "epoch"], "save_strategy='epoch': this loop counts steps"),
        (["--eval_strategy", "epoch"], "eval_strategy='epoch'"),
        (["--load_best_model_at_end", "true", "--save_steps", "0.1"], "load_best_model_at_end=True"),
        (["--optimizer", "trainer"], "optimizer='trainer': this loop has no Trainer"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "lr_scheduler_type='reduce_lr_on_plateau'"),
    ],
)
def test_the_loop_refuses_flags_that_it_does_not_support(flags, message, monkeypatch):
    monkeypatch.setattr(pretrain_loop, "open_documents", lambda args: pytest.fail("the corpus was opened"))
    with pytest.raises(ValueError, match=message):
        pretrain_loop.main([*SMALL, *flags])


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (
            pretrain_loop,
            ["--gradient_accumulation_steps", "100000"],
            "gradient_accumulation_steps=100000 makes steps",
        ),
        (
            pretrain,
            ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "100000"],
            "fill no batch on 1 processes",
        ),
    ],
)
def test_a_step_larger_than_the_corpus_is_refused(recipe, flags, message, corpus, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main(
            [
                *SMALL,
                "--dataset",
                str(corpus),
                "--cache_dir",
                str(folder / "cache"),
                "--output_dir",
                str(tmp_path),
                *flags,
            ]
        )
