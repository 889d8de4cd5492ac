"""Runs under accelerate's FSDP2 with processes on CPUs, for tests/training/checkpoints/test_sharded.py.

Started from the repository's root: `python -m tests.programs.sharded_checkpoints FOLDER`. The processes of each run
are forked, so that the libraries are imported once for all runs.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerFast

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.programs.distributed_training import open_store
from tests.programs.forked_processes import launch_environment, run_forked
from tests.tiny import tiny_config


ROWS_PER_STEP = 8
STEPS = 6
SAVED = 3


def make_trainer(folder: Path, output_dir: Path, model: str = "modern", **arguments) -> LanguageModelTrainer:
    torch.manual_seed(0)
    args = PretrainArguments(
        str(output_dir),
        per_device_train_batch_size=ROWS_PER_STEP // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=STEPS,
        learning_rate=1e-2,
        save_steps=SAVED,
        save_total_limit=None,
        logging_steps=1,
        dataloader_drop_last=True,
        eval_strategy="no",
        disable_tqdm=True,
        allow_changed_run=True,
        resume_from_checkpoint="auto",
        **arguments,
    )
    return LanguageModelTrainer(
        MiniGPTForCausalLM(tiny_config(model)),
        args,
        train_dataset=ShuffledDocumentRows(open_store(folder / "store"), 16, seed=3),
        data_collator=LanguageModelCollator(pad_token_id=1),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )


def train(folder: Path, name: str, **arguments) -> None:
    """Train to the end, from the newest checkpoint in the folder of this name, and save the model there."""
    trainer = make_trainer(folder, folder / name, **arguments)
    train_safely(trainer, allow_changed_run=True)
    trainer.save_model()


def gloo_as_gpus() -> None:
    """accelerate has FSDP for GPUs only."""
    init = PartialState.__init__

    def patched(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


def as_launched(job: Callable[[], None], launch_file: str) -> Callable[[int], None]:
    """What each process does that `accelerate launch` starts with a launch file."""

    def launched(rank: int) -> None:
        os.environ |= launch_environment(launch_file)
        gloo_as_gpus()
        if os.environ["WORLD_SIZE"] == "1":
            # accelerate makes no group of one CPU process
            dist.init_process_group("gloo")
        job()

    return launched


def refused(folder: Path) -> None:
    trainer = make_trainer(folder, folder / "sharded_after_plain")
    with pytest.raises(ValueError, match=r"was written without FSDP.*--model"):
        train_safely(trainer, allow_changed_run=True)


def main(folder: Path) -> None:
    open_store(folder / "store")
    tokenizer = train_tokenizer(["a mill"] * 20, 320, model_max_length=16, show_progress=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    sharded, whole = "fsdp2_sharded.yaml", "fsdp2.yaml"
    runs = (
        # name, processes, launch file, run whose checkpoint it resumes from
        ("two", 2, sharded, None),
        ("two_resumed", 2, sharded, "two"),
        ("four_after_two", 4, sharded, "two"),
        ("one_after_two", 1, sharded, "two"),
        ("one", 1, sharded, None),
        ("two_after_one", 2, sharded, "one"),
        ("alone_after_two", 1, None, "two"),
        ("whole_after_sharded", 2, whole, "two"),
        ("whole", 2, whole, None),
        ("sharded_after_whole", 2, sharded, "whole"),
        ("alone_after_whole", 1, None, "whole"),
        ("alone", 1, None, None),
    )
    for name, number, launch_file, source in runs:
        if source is not None:
            shutil.copytree(folder / source / f"checkpoint-{SAVED}", folder / name / f"checkpoint-{SAVED}")
        start(name, number, lambda name=name: train(folder, name), launch_file)
    shutil.copytree(folder / "alone" / f"checkpoint-{SAVED}", folder / "sharded_after_plain" / f"checkpoint-{SAVED}")
    start("refused", 2, lambda: refused(folder), sharded)


def start(name: str, number: int, job: Callable[[], None], launch_file: str | None) -> None:
    print(name, flush=True)
    codes = run_forked(number, as_launched(job, launch_file) if launch_file else lambda rank: job())
    if any(codes):
        sys.exit(f"{name}: exit codes {codes}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
