"""What checkpoints cost the training loop, at one every 100 steps.

    python recipes/benchmarks/save_cost.py
    python recipes/benchmarks/save_cost.py --preset minigpt-nano --rows_per_step 16 --steps 100

Trains a preset on random tokens and measures three things: a step; how long the loop stands still while the Trainer
writes a checkpoint; and how long it is then sealed (brought to the disk, its checksums and manifest written) in a
thread beside the loop. The share counts the sealing in full, as if it slowed the loop down by all its time: an upper
bound. The last line printed is a JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_minigpt
from hf_minigpt.training.checkpoints import sealing
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.optimizers import muon_adamw
from hf_minigpt.training.processes import use_all_cores


class RandomRows(Dataset):
    """Rows of random ids; as many as asked for."""

    def __init__(self, num_rows: int, length: int, vocab_size: int):
        self.num_rows, self.length, self.vocab_size = num_rows, length, vocab_size

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self.vocab_size, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Seconds of each step, and of each save."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[float] = []
        self.saves: list[float] = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self._end = self._now()
        self.steps.append(self._end - self._begin)

    def on_save(self, args, state, control, **kwargs):
        self.saves.append(self._now() - self._end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minigpt-small")
    parser.add_argument("--rows_per_step", type=int, default=8)
    parser.add_argument("--context_length", type=int, help="default: the preset's")
    parser.add_argument(
        "--steps", type=int, default=4, help="how many to measure; a save comes after every second one"
    )
    parser.add_argument(
        "--every", type=int, default=100, help="steps between two saves of the run that is asked about"
    )
    parser.add_argument("--output_dir", type=Path, help="where to write: the disk counts. Default: a temporary folder")
    args = parser.parse_args()

    use_all_cores()
    torch.manual_seed(0)
    config = hf_minigpt.preset(args.preset)
    length = args.context_length or config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        # one step more, to warm up
        training_args = TrainingArguments(
            folder,
            per_device_train_batch_size=args.rows_per_step,
            max_steps=args.steps + 1,
            save_steps=2,
            save_total_limit=1,
            bf16=torch.cuda.is_available(),
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=1e-2)
        clock = Clock(training_args.device)
        trainer = Trainer(
            model,
            training_args,
            train_dataset=RandomRows((args.steps + 1) * args.rows_per_step, length, config.vocab_size),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            callbacks=[clock],
        )
        seals = []
        seal_checkpoint = sealing.seal_checkpoint

        def timed_seal(*args) -> None:
            begin = time.perf_counter()
            seal_checkpoint(*args)
            seals.append(time.perf_counter() - begin)

        sealing.seal_checkpoint = timed_seal
        train_safely(trainer)
        checkpoint = sealing.newest_sealed(folder)
        size = sum(path.stat().st_size for path in Path(checkpoint).iterdir())

    step, save, seal = (statistics.median(times) for times in (clock.steps[1:], clock.saves, seals))
    still, both = save / (args.every * step), (save + seal) / (args.every * step)
    print(
        f"{args.preset}, {model.num_parameters():,} parameters, {args.rows_per_step} x {length} tokens a step on "
        f"{training_args.device}: {step:.3f} s a step; a checkpoint of {size / 1e6:.0f} MB is written in {save:.3f} s "
        f"and sealed in {seal:.3f} s. One every {args.every} steps: the loop stands still for {still:.2%} of the "
        f"time, with sealing {both:.2%}."
    )
    result = {"step_seconds": step, "save_seconds": save, "seal_seconds": seal, "checkpoint_bytes": size}
    print(json.dumps({**result, "ratios": {"save_cost_share": both}}))


if __name__ == "__main__":
    main()
