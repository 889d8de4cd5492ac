"""Each launch file runs the recipes to their end in two processes, with the results of one process."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.data.tales.reviews import tale_reviews
from hf_minigpt.instructions.trainer import InstructionTrainer
from hf_minigpt.model import modeling_minigpt
from hf_minigpt.recipes import sft
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.loading import whole_model
from hf_minigpt.training.processes import use_exact_reductions
from tests.programs.launched_recipes import TIMED_OUT, wait_for
from tests.tiny import tiny_config


ROOT = Path(__file__).parents[2]
SECONDS = 120
QUIET = shlex.split("--cpu_threads 1 --disable_tqdm true --logging_steps 1 --use_cpu true")
# two processes with one batch each take the steps of one process with two
STEPS = shlex.split("--max_steps 4 --save_steps 2 --eval_steps 2")
ALONE = ["--gradient_accumulation_steps", "2"]
# the weights stay as they are, so that they are the same in both precisions
FROZEN = shlex.split("--bf16 true --learning_rate 0 --matrix_learning_rate 0 --embedding_learning_rate 0")


def make_jobs(folder: Path) -> list[dict[str, Any]]:
    model = ["--model", str(folder / "base"), *QUIET, *STEPS]
    rows = [*model, "--per_device_train_batch_size", "4"]
    cache = ["--cache_dir", str(folder / "cache")]
    text = [*rows, "--dataset", str(folder / "books"), *cache]
    answers = ["--dataset", str(folder / "records.json"), "--max_new_tokens", "8"]
    reviews = [*model, "--dataset", str(folder / "reviews.csv"), "--context_length", "32", "--pipeline_examples", "4"]
    reviews += ["--adversarial_epsilon", "0"]
    resume = ["--resume_from_checkpoint", "auto"]
    jobs = [
        ("alone", None, "pretrain", [*text, *ALONE]),
        ("cpu", "cpu.yaml", "pretrain", text),
        ("gpu", "gpu.yaml", "pretrain", text),
        ("ddp", "ddp.yaml", "pretrain", text),
        ("fsdp2", "fsdp2.yaml", "pretrain", text),
        ("fsdp2_resumed", "fsdp2.yaml", "pretrain", [*text, *resume]),
        ("fsdp2_loop", "fsdp2.yaml", "pretrain_loop", text),
        ("fsdp2_loop_resumed", "fsdp2.yaml", "pretrain_loop", [*text, *resume]),
        ("ddp_sft_without_model", "ddp.yaml", "sft", [*QUIET, *STEPS, *answers, *cache]),
        ("alone_sft", None, "sft", [*rows, *answers, *ALONE]),
        ("fsdp2_sft", "fsdp2.yaml", "sft", [*rows, *answers]),
        ("alone_finetune_imdb", None, "finetune_imdb", [*reviews, *ALONE]),
        ("fsdp2_finetune_imdb", "fsdp2.yaml", "finetune_imdb", reviews),
        ("alone_bf16", None, "pretrain", [*text, *ALONE, *FROZEN]),
        ("fsdp2_bf16", "fsdp2.yaml", "pretrain", [*text, *FROZEN]),
        ("alone_bf16_loop", None, "pretrain_loop", [*text, *ALONE, *FROZEN]),
        ("fsdp2_bf16_loop", "fsdp2.yaml", "pretrain_loop", [*text, *FROZEN]),
    ]
    return [
        {
            "name": name,
            "launch": launch,
            "recipe": recipe,
            "flags": [*flags, "--output_dir", str(folder / name)],
            "checkpoint": f"{name.removesuffix('_resumed')}/checkpoint-2" if name.endswith("_resumed") else None,
            "seconds": SECONDS,
        }
        for name, launch, recipe, flags in jobs
    ]


def write_base(folder: Path) -> None:
    """A model that the recipes start from. Its weights are those of a bfloat16 model, and no branch is zero."""
    books = folder / "books"
    books.mkdir()
    for i in range(6):
        words = [f"In the town {i} a cat met {j % 7} mice and said to the {j % 3}rd: run!" for j in range(60)]
        (books / f"{i}.txt").write_text("\n\n".join(words))
    texts = [path.read_text() for path in books.iterdir()]
    tokenizer = train_tokenizer(texts, 320, model_max_length=64, show_progress=False)
    sizes = {"vocab_size": 320, "unpadded_vocab_size": len(tokenizer), "max_position_embeddings": 64}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = MiniGPTForCausalLM(tiny_config("modern", **sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.bfloat16().float().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    records = [
        {"instruction": f"Say {color} {number}.", "output": color} for color in ("red", "blue") for number in range(48)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    texts, labels = tale_reviews(80)
    pd.DataFrame({"text": texts, "label": labels}).to_csv(folder / "reviews.csv", index=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folders of all jobs: one start of Python takes longer than a job."""
    folder = tmp_path_factory.mktemp("launched")
    write_base(folder)
    jobs = make_jobs(folder)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.programs.launched_recipes", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=len(jobs) * SECONDS) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A function that returns the folder of a job, and fails if the job did not reach its end."""
    codes = json.loads((folder / "codes.json").read_text())

    def folder_of(name: str) -> Path:
        logs = "".join(f"\n{path.name}: {path.read_text()[-2000:]}" for path in folder.glob(f"{name}.*.log"))
        assert codes[name] == 0, ("did not end in time" if codes[name] == TIMED_OUT else "failed") + logs
        return folder / name

    return folder_of


def results(folder: Path) -> dict[str, float]:
    """The metrics of a run, except times and what is estimated from the number of batches."""
    metrics = json.loads((folder / "all_results.json").read_text())
    left_out = ("_runtime", "_per_second", "total_flos", "num_input_tokens_seen", "train_tokens", "epoch")
    return {name: value for name, value in metrics.items() if not name.endswith(left_out)}


def logged(folder: Path, name: str) -> list[float]:
    if (folder / "trainer_state.json").is_file():
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    else:
        history = json.loads((folder / "checkpoint-4/loop.json").read_text())["history"]
    return [entry[name] for entry in history if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "_run.lock"}


def card(folder: Path) -> list[str]:
    """The lines of a model card, except those that name the folder, the processes or the time. Its metadata have all
    digits of the metrics, which `results` compares."""
    lines = (folder / "README.md").read_text().splitlines()
    varying = (folder.name, "per second", "minutes on cpu", "gradient_accumulation_steps", "value: ")
    return [line for line in lines if not any(words in line for words in varying)]


def assert_same_run(found: Path, expected: Path) -> None:
    assert results(found) == pytest.approx(results(expected), rel=1e-5)
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-5)
    assert files(found) == files(expected)
    assert card(found) == card(expected)
    expected_weights = weights(expected)
    assert weights(found).keys() == expected_weights.keys()
    for name, tensor in weights(found).items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["cpu", "gpu", "ddp", "fsdp2"])
def test_a_launch_file_pretrains_as_one_process(finished, name):
    found, expected = finished(name), finished("alone")
    assert_same_run(found, expected)
    # it comes from the same weights, as the equal cards show
    assert "An unedited sample" in (found / "README.md").read_text()


def test_sft_pretrains_its_base_in_the_same_processes(finished):
    assert results(finished("ddp_sft_without_model"))["eval_loss"] > 0


@pytest.mark.parametrize("recipe", ["sft", "finetune_imdb"])
def test_finetuning_under_fsdp2_is_that_of_one_process(finished, recipe):
    assert_same_run(finished(f"fsdp2_{recipe}"), finished(f"alone_{recipe}"))


def test_a_model_trained_under_fsdp2_loads_in_one_process(finished):
    ids = torch.arange(1, 21)[None]
    expected = AutoModelForCausalLM.from_pretrained(finished("alone"))(ids).logits
    for name in ("fsdp2", "fsdp2_resumed"):
        model = AutoModelForCausalLM.from_pretrained(finished(name))
        assert type(model) is MiniGPTForCausalLM
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    # others load it with the code in its folder, and the loop saves the same code
    code = {path.name for path in Path(modeling_minigpt.__file__).parent.glob("*_minigpt.py")}
    for name in ("fsdp2", "fsdp2/checkpoint-4", "fsdp2_loop"):
        assert {path.name for path in (finished(name.split("/")[0]).parent / name).glob("*.py")} == code


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_loop"])
def test_a_run_under_fsdp2_resumes_exactly(finished, name):
    found, expected = finished(f"{name}_resumed"), finished(name)
    assert "checkpoint-2" in {path.name for path in found.iterdir()}
    assert logged(found, "loss") == logged(expected, "loss")
    expected_weights = weights(expected)
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights(found).items())


@pytest.mark.parametrize("recipe", ["", "_loop"])
def test_bf16_under_fsdp2_is_that_of_one_process(finished, recipe):
    """The weights are exact in bfloat16 and not trained. So all losses must agree to the precision of their sums."""
    found, expected = finished(f"fsdp2_bf16{recipe}"), finished(f"alone_bf16{recipe}")
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-6)
    assert results(found) == pytest.approx(results(expected), rel=1e-6)
    assert logged(found, "eval_loss") == pytest.approx(logged(expected, "eval_loss"), rel=1e-6)


def test_mixed_precision_of_fsdp2():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    use_exact_reductions(accelerator)
    assert plugin.mixed_precision_policy is None
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        plugin.set_mixed_precision(name, override=True)
        use_exact_reductions(accelerator)
        policy = plugin.mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, torch.float32)
    own = plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.float32)
    use_exact_reductions(accelerator)
    assert plugin.mixed_precision_policy is own
    # nothing is sharded
    use_exact_reductions(SimpleNamespace(state=SimpleNamespace()))


def test_merging_sharded_adapters_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(InstructionTrainer, "is_sharded", True)
    flags = ["--model", str(folder / "base"), "--dataset", str(folder / "records.json"), *QUIET]
    flags += ["--output_dir", str(tmp_path), "--lora_rank", "2", "--merge_lora", "true"]
    with pytest.raises(ValueError, match=r"merge_lora=True: .*save_merged"):
        sft.main(flags)


def test_zero_3_models_are_not_run_in_one_process(tmp_path):
    model = MiniGPTForCausalLM(tiny_config("modern"))
    assert whole_model(model, tmp_path) is model
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="zero_stage=3"):
        whole_model(model, tmp_path)


def test_a_job_that_hangs_fails():
    hanging = subprocess.Popen(["sleep", "60"])
    start = time.monotonic()
    assert wait_for([hanging.pid], seconds=0.1) == TIMED_OUT
    assert time.monotonic() - start < 10
    # a process that waits for one that has failed is ended at once
    processes = [subprocess.Popen(command) for command in (["sleep", "60"], ["false"])]
    assert wait_for([process.pid for process in processes], seconds=30) == 1
    assert time.monotonic() - start < 10
