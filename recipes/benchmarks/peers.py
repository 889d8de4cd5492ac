"""What the benchmarks share: the peer of a shape, and a Trainer that is timed step by step."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_minigpt import MiniGPTForCausalLM, preset


NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def gpt2_peer(layers: int, width: int, vocab_size: int, context: int, tied: bool = True) -> GPT2LMHeadModel:
    """transformers' GPT-2 of a shape, heads of 64, without dropout."""
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
    """The same architecture as ours."""
    config = preset(
        "gpt2",
        vocab_size=vocab_size,
        max_position_embeddings=context,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        **NO_DROPOUT,
    )
    return MiniGPTForCausalLM(config)


class RandomRows(Dataset):
    """Rows of random ids; as many as asked for."""

    def __init__(self, num_rows: int, length: int, vocab_size: int):
        self.num_rows, self.length, self.vocab_size = num_rows, length, vocab_size

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self.vocab_size, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class StepClock(TrainerCallback):
    """Seconds from each step's end to the next one's: data, forward, backward and optimizer."""

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
    """The median second count of `steps` steps of transformers' Trainer, after `warmup` more."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        training_args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps + warmup + 1,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **arguments,
        )
        Trainer(model, training_args, train_dataset=rows, callbacks=[clock]).train()
    return statistics.median(clock.seconds[warmup:])


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Run both in turn.

    Returns:
        The medians of ours and theirs, and the median over the rounds of theirs over ours.
    """
    pairs = []
    for i in range(rounds):
        if i % 2:
            second, first = theirs(), ours()
        else:
            first, second = ours(), theirs()
        pairs.append((first, second))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def resident(field: str) -> int:
    """Bytes, from Linux' own account: VmRSS is now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux, or a GPU.")
