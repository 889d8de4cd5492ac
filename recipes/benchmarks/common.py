"""What the benchmarks share: models of one shape, timing in turns, quiet Trainers and the JSON line at the end."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_minigpt import MiniGPTForCausalLM, preset


Result = TypeVar("Result")

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def make_parser(description: str | None, rounds: int | None = None, threads: bool = False) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring.

    Args:
        description: the docstring.
        rounds: the default of `--rounds`; None leaves the flag out.
        threads: whether there is `--threads`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="how often each side runs")
    if threads:
        parser.add_argument("--threads", type=int, help="default: all cores")
    return parser


def print_result(**result: Any) -> None:
    """Print the last line of a benchmark: its figures as one JSON object."""
    print(json.dumps(result))


def gpt2_peer(layers: int, width: int, vocab_size: int, context: int, tied: bool = True) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with heads of 64 and no dropout."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=max(width // 64, 1),
        tie_word_embeddings=tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **NO_DROPOUT,
    )
    return GPT2LMHeadModel(config)


def our_gpt2(layers: int, width: int, vocab_size: int, context: int) -> MiniGPTForCausalLM:
    """Return the MiniGPT of the same architecture. It computes the loss without logits, as in the recipes."""
    config = preset(
        "gpt2",
        vocab_size=vocab_size,
        max_position_embeddings=context,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        skip_logits=True,
        **NO_DROPOUT,
    )
    return MiniGPTForCausalLM(config)


class RandomRows(Dataset):
    """`num_rows` rows of random token ids."""

    def __init__(self, num_rows: int, length: int, vocab_size: int):
        self.num_rows, self.length, self.vocab_size = num_rows, length, vocab_size

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self.vocab_size, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def quiet_arguments(folder: str) -> dict[str, Any]:
    """Return `TrainingArguments` of a run that neither saves, logs nor shows a bar."""
    return {
        "output_dir": folder,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


class StepClock(TrainerCallback):
    """Records the seconds from the end of each step to the end of the next: data, forward, backward, optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def seconds_per_step(
    model: torch.nn.Module, rows: Dataset, batch_size: int, steps: int, warmup: int = 1, **arguments: Any
) -> float:
    """Return the median seconds of `steps` steps of transformers' Trainer, after `warmup` steps."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        training_args = TrainingArguments(
            **quiet_arguments(folder),
            per_device_train_batch_size=batch_size,
            max_steps=steps + warmup + 1,
            **arguments,
        )
        Trainer(model, training_args, train_dataset=rows, callbacks=[clock]).train()
    return statistics.median(clock.seconds[warmup:])


def timed(function: Callable[..., object], *args: Any) -> float:
    """Return the seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(sides: dict[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Run every side once a round, in an order that is reversed from one round to the next.

    Returns:
        The results of each side, one a round.
    """
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            results[name].append(sides[name]())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of one side's figure over the other's."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def resident(field: str) -> int:
    """Return bytes of resident memory as Linux reports them: VmRSS is the present, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}. Run this benchmark on Linux, or on a GPU.")
