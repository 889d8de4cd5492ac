"""Checks 9 and 10: the recipes train on the device as on the CPU, and several processes train like one."""

import contextlib
import copy
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_minigpt.data.tales import reviews
from hf_minigpt.training.optimizers import muon_adamw

from .harness import Finding, Machine, Report, Skip, check
from .models import difference, disturbed_model, random_ids


RECIPES = Path(__file__).parents[2]
CPU_LOSSES = Path(__file__).with_name("cpu_losses.json")

# Mean relative difference of two curves of losses. On a CPU, bf16 gives 0.003 in pretraining and 0.001 in finetuning;
# in pretraining another seed gives 0.027, an acausal model 0.11, a fifth of Muon's learning rate 0.44.
CURVE = 0.02
# The same after a resume; a missing step gives 0.019.
RESUMED = 0.01

COMMON = ["--logging_steps", "1", "--disable_tqdm", "true"]
FLAGS = {
    "pretrain": ["--eval_strategy", "no"],
    "pretrain_loop": ["--eval_strategy", "no"],
    "sft": ["--eval_strategy", "no", "--eval_answers", "0"],
    "finetune_imdb": [],
}


@check(9, "recipes")
def recipes(machine: Machine) -> Iterator[Report]:
    """The default pretraining beside the CPU's losses, its resume, and 20 steps of the other recipes on both."""
    steps, few = (8, 6) if machine.dry_run else (200, 20)
    folder, half = machine.empty_folder("recipes"), steps // 2
    base = folder / "pretrain"
    saving = ["--max_steps", str(steps), "--save_steps", str(half)]
    found = losses(machine, "pretrain", base, *saving)
    if machine.dry_run:
        expected = losses(machine, "pretrain", folder / "pretrain-cpu", *saving, on_cpu=True)
    else:
        expected = stored()
    yield curves("pretrain", found, expected)

    checkpoint = folder / "resumed" / f"checkpoint-{half}"
    shutil.copytree(base / f"checkpoint-{half}", checkpoint)
    resume = ["--resume_from_checkpoint", str(checkpoint)]
    resumed = losses(machine, "pretrain", checkpoint.parent, *saving, *resume)
    figure = deviation(resumed[half:], found[half:])
    control = deviation([*resumed[half + 1 :], resumed[-1]], found[half:])
    yield Finding(f"pretrain: losses after resuming at step {half}", figure, RESUMED, control, "a step is missing")

    for recipe in ("pretrain_loop", "sft", "finetune_imdb"):
        flags = ["--max_steps", str(few)] + (["--model", str(base)] if recipe != "pretrain_loop" else [])
        found = losses(machine, recipe, folder / recipe, *flags)
        expected = losses(machine, recipe, folder / f"{recipe}-cpu", *flags, on_cpu=True)
        yield curves(recipe, found, expected)


def curves(recipe: str, found: list[float], expected: list[float], against: str = "CPU") -> Finding:
    half_speed = [expected[i // 2] for i in range(len(expected))]
    return Finding(
        f"{recipe}: losses of {len(expected)} steps against the {against} run's",
        deviation(found, expected),
        CURVE,
        deviation(half_speed, expected),
        "every other step skipped",
    )


def deviation(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the mean over the steps of the relative difference."""
    return sum(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) / len(expected)


def stored() -> list[float]:
    """Return the losses of `python recipes/pretrain.py --max_steps 200` on a CPU in float32, step by step."""
    return json.loads(CPU_LOSSES.read_text())["losses"]


def losses(machine: Machine, recipe: str, output: Path, *flags: str, on_cpu: bool = False) -> list[float]:
    """Run a recipe in this process, with its output in recipes.log, and return the loss of each step."""
    argv = [*FLAGS[recipe], *COMMON, *flags, "--output_dir", str(output)]
    if on_cpu:
        argv += ["--use_cpu", "true"]
    if machine.dry_run:
        argv += tiny_flags(output.parent, recipe)
    main = importlib.import_module(f"hf_minigpt.recipes.{recipe}").main
    with (machine.folder / "recipes.log").open("a") as log:
        log.write(f"\n{recipe} {' '.join(argv)}\n")
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            main(argv)
    if recipe == "pretrain_loop":
        checkpoint = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((checkpoint / "loop.json").read_text())["history"]
    else:
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def tiny_flags(folder: Path, recipe: str) -> list[str]:
    """Return flags for a small model and few documents, which are written to `folder`."""
    data = folder / "data"
    flags = ["--cpu_threads", "1", "--dataset"]
    if recipe == "finetune_imdb":
        texts, labels = reviews.tale_reviews(64)
        rows: list[dict[str, Any]] = [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]
        return [*flags, write_lines(data / "reviews.jsonl", rows), "--tokens_per_batch", "512"]
    flags = ["--cache_dir", str(folder / "cache"), *flags]
    if recipe == "sft":
        rows = [{"instruction": f"Say {word} {i}.", "output": word} for word in ("red", "blue") for i in range(32)]
        return [*flags, write_lines(data / "instructions.jsonl", rows), "--max_new_tokens", "8"]
    rows = [{"text": f"In the town {i} a cat met {i % 7} mice, and said: run, or I eat you! " * 8} for i in range(64)]
    sizes = ["--config_overrides", "hidden_size=32", "num_attention_heads=2", "num_hidden_layers=1"]
    lengths = ["--context_length", "64", "--vocab_size", "320"]
    return [*flags, write_lines(data / "texts.jsonl", rows), *lengths, *sizes]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    # once: a file that is newer is another dataset, which a resume refuses
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Relative difference of what three steps change in the weights. Muon's iteration runs in bf16 on GPUs, which enlarges
# the rounding of sums in another order.
SAME_STEPS = 1e-2
NUM_STEPS = 3


@check(10, "several processes as one")
def processes(machine: Machine) -> Iterator[Report]:
    """FSDP2 with one process, DDP and FSDP2 with two, each against plain training, and the recipe under both."""
    folder = machine.empty_folder("processes")
    dist.init_process_group(backend(machine), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield from (Finding(**finding) for finding in compare(machine, ["FSDP2"]))
    finally:
        dist.destroy_process_group()

    num_gpus = 2 if machine.dry_run else torch.cuda.device_count()
    if num_gpus >= 2:
        results = folder / "findings.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(RECIPES / "benchmarks" / "gpu.py"), "--worker", str(results)]
        run(machine, [*command, *(["--dry_run"] if machine.dry_run else [])])
        yield from (Finding(**finding) for finding in json.loads(results.read_text()))
    else:
        yield Skip("DDP and FSDP2 with two processes: this machine has one GPU")

    if machine.dry_run:
        yield Skip("pretrain.py under recipes/launch/fsdp2.yaml: accelerate starts FSDP2 on GPUs only")
        return
    expected = launched(machine, folder / "alone", None, 1)
    launches = [("fsdp2", 1)] + ([("ddp", 2), ("fsdp2", 2)] if num_gpus >= 2 else [])
    for file, number in launches:
        found = launched(machine, folder / f"{file}-{number}", file, number)
        yield curves(f"pretrain.py under {file}.yaml, {number} process(es)", found, expected, "plain")


def backend(machine: Machine) -> str:
    return "gloo" if machine.dry_run else "nccl"


def run(machine: Machine, command: list[str], limit: float = 180) -> None:
    """Run a command that may hang: after `limit` seconds it is killed, with its children."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (machine.folder / "processes.log").open("a+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise TimeoutError(f"{' '.join(command[-4:])} did not end within {limit:.0f} s; see {log.name}") from None
    if status:
        raise RuntimeError(f"{' '.join(command[-4:])} ended with status {status}; see {log.name}")


def launched(machine: Machine, output: Path, file: str | None, number: int) -> list[float]:
    """Return the losses of 20 steps of pretrain.py under a launch file, of the same 8 rows a step."""
    launcher = [sys.executable]
    if file is not None:
        config = str(RECIPES / "launch" / f"{file}.yaml")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        launcher += ["--num_processes", str(number)]
    flags = [*FLAGS["pretrain"], *COMMON, "--max_steps", "20", "--save_strategy", "no", "--output_dir", str(output)]
    flags += ["--per_device_train_batch_size", str(8 // number)]
    run(machine, [*launcher, str(RECIPES / "pretrain.py"), *flags])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def worker(machine: Machine, results: Path) -> None:
    """Compare DDP and FSDP2 with plain training, as one of several processes of torchrun."""
    dist.init_process_group(backend(machine))
    findings = compare(machine, ["DDP", "FSDP2"])
    if dist.get_rank() == 0:
        results.write_text(json.dumps(findings))
    dist.destroy_process_group()


def compare(machine: Machine, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Train all rows in this process, and each process its share. Return findings as dictionaries."""
    expected = trained(machine, nn.Module.train, 0, 1)
    findings = []
    for way in ways:
        wrap = {"DDP": data_parallel, "FSDP2": sharded}[way]
        found = trained(machine, wrap, dist.get_rank(), dist.get_world_size())
        skipped = trained(machine, wrap, dist.get_rank(), dist.get_world_size(), num_steps=NUM_STEPS - 1)
        control, broken = difference(skipped, expected), "a skipped step"
        if dist.get_world_size() > 1:
            unreduced = trained(machine, nn.Module.train, dist.get_rank(), dist.get_world_size())
            control, broken = min(control, difference(unreduced, expected)), "a skipped step, or no reduction"
        findings.append(
            {
                "name": f"{way}, {dist.get_world_size()} process(es): change in {NUM_STEPS} steps",
                "figure": difference(found, expected),
                "most": SAME_STEPS,
                "control": control,
                "broken": broken,
            }
        )
    return findings


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Any) -> nn.Module:
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(
    machine: Machine, wrap: Callable[[Any], nn.Module], rank: int, world_size: int, num_steps: int = NUM_STEPS
) -> torch.Tensor:
    """Train on this process's share of the rows. Return how much all weights have changed, on the CPU."""
    device = machine.device
    start = disturbed_model(machine, "gpt2" if machine.dry_run else "minigpt-small")
    model = copy.deepcopy(start).to(device).train()
    wrapped = wrap(model)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.01)
    ids = random_ids(start, 4 * num_steps, 32).to(device)
    for batch in islice(ids.split(4), num_steps):
        rows = batch[rank::world_size]
        loss = wrapped(input_ids=rows, labels=rows, num_items_in_batch=batch.numel(), use_cache=False).loss
        # DDP and FSDP2 average the gradients, which are to be summed
        (loss * world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = []
    for name, before in start.state_dict().items():
        weight = after[name].full_tensor() if isinstance(after[name], DTensor) else after[name]
        changed.append((weight.cpu() - before).flatten())
    return torch.cat(changed)
