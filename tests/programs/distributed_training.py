"""Jobs of two processes on CPUs with gloo, for tests/training/test_distributed.py.

Started by torchrun from the repository's root: `-m tests.programs.distributed_training FOLDER JOB ...`
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.classification.arguments import ClassificationArguments
from hf_minigpt.classification.batching import ReviewCollator, ReviewRows
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.data.token_store import TokenStore, TokenStoreWriter
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.checkpoints.sealing import CheckpointSealer, resolve_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.optimizers import adamw_decaying_matrices, muon_adamw, optimizer_cls_and_kwargs
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.programs.interrupted_training import At, assert_same_weights, make_trainer, weights, write_store
from tests.tiny import tiny_config


OPTIMIZERS = ("muon", "adamw")
ROWS_PER_STEP = 8
STEPS = 14
# an epoch has 10
SAVED = 7


def open_store(folder: Path) -> TokenStore:
    if not folder.is_dir():
        writer = TokenStoreWriter(folder, eos_token_id=0, vocab_size=67)
        rng = np.random.default_rng(0)
        for length in rng.integers(3, 40, 60):
            # each token depends on the previous one, so that there is something to learn
            writer.add(1 + np.cumsum(rng.integers(1, 4, length)) % 66, num_bytes=int(length))
        writer.close()
    return TokenStore.open(folder)


# DDP, with the Trainer


class KillAt(TrainerCallback):
    """SIGKILL, in one process, before torchrun has restarted it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        is_victim = args.process_index == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_victim and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, output_dir: str, optimizer: str, **arguments) -> LanguageModelTrainer:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    callbacks = [KillAt(arguments.pop("kill_at"))] if "kill_at" in arguments else []
    args = PretrainArguments(
        str(folder / output_dir),
        optimizer=optimizer,
        per_device_train_batch_size=ROWS_PER_STEP // 2 // world_size,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_steps=SAVED,
        save_total_limit=None,
        logging_steps=1,
        # accelerate would fill the last batch of an epoch with rows of the first
        dataloader_drop_last=True,
        eval_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    trainer = LanguageModelTrainer(
        MiniGPTForCausalLM(tiny_config("modern")),
        args,
        train_dataset=ShuffledDocumentRows(open_store(folder / "store"), 16, seed=3),
        data_collator=LanguageModelCollator(pad_token_id=1),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
        callbacks=callbacks,
    )
    train_safely(trainer, allow_changed_run=args.allow_changed_run)
    if args.process_index == 0:
        torch.save(trainer.model.state_dict(), folder / output_dir / "weights.pt")
    return trainer


def copy_checkpoint(folder: Path, source: str, target: str) -> None:
    shutil.copytree(folder / source / f"checkpoint-{SAVED}", folder / target / f"checkpoint-{SAVED}")


def ddp(folder: Path) -> None:
    for optimizer in OPTIMIZERS:
        train(folder, f"together_{optimizer}", optimizer)
        if dist.get_rank() == 0:
            copy_checkpoint(folder, f"together_{optimizer}", f"resumed_{optimizer}")
            copy_checkpoint(folder, f"alone_{optimizer}", f"joined_{optimizer}")
        dist.barrier()
        train(folder, f"resumed_{optimizer}", optimizer, resume_from_checkpoint="auto")
        # resume what one process has begun
        resume = {"resume_from_checkpoint": "auto", "allow_changed_run": True}
        train(folder, f"joined_{optimizer}", optimizer, **resume)


def classify(folder: Path) -> torch.Tensor:
    """Final weights of a classifier, in one vector; every process's must be the same."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    texts = ["good " * (1 + i % 7) + "film" if i % 2 else "a bad " * (1 + i % 5) for i in range(40)]
    tokenizer = train_tokenizer(texts, 320, model_max_length=24, show_progress=False)
    args = ClassificationArguments(
        str(folder / f"classifier_{world_size}"),
        adversarial_epsilon=0.01,
        auxiliary_lm_weight=0.5,
        tokens_per_batch=64,
        gradient_accumulation_steps=2 // world_size,
        max_steps=6,
        cpu_threads=1,
        disable_tqdm=True,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
    )
    torch.manual_seed(0)
    config = tiny_config("modern", vocab_size=320, unpadded_vocab_size=len(tokenizer), auxiliary_lm_weight=0.5)
    config.pad_token_id = tokenizer.pad_token_id
    labels = [i % 2 for i in range(40)]
    trainer = ClassificationTrainer(
        model=MiniGPTForSequenceClassification(config),
        args=args,
        train_dataset=ReviewRows(texts, labels, tokenizer, 24, training=True),
        data_collator=ReviewCollator(tokenizer.pad_token_id),
        optimizer_cls_and_kwargs=classification_optimizer(args),
    )
    # with an odd number, one batch would be split over two processes
    assert len(trainer.get_train_dataloader()) * world_size % 2 == 0
    trainer.train()
    weights = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    torch.save(weights, folder / f"classifier_{world_size}_{args.process_index}.pt")
    return weights


def killed(folder: Path) -> None:
    train(folder, "restarted", "muon", kill_at=13, resume_from_checkpoint="auto")


def signals(folder: Path) -> None:
    """A signal to one process stops both at the same step. The resumed run is exact."""
    store = write_store(folder / "signals_store")
    uninterrupted = make_trainer(store, folder / "signals_uninterrupted", max_steps=16)
    train_safely(uninterrupted)
    kill = [At(9, lambda model: os.kill(os.getpid(), signal.SIGTERM))] if dist.get_rank() == 1 else []
    stopped = make_trainer(store, folder / "signals", max_steps=16, callbacks=kill)
    with pytest.raises(SystemExit, match="75"):
        train_safely(stopped)
    assert stopped.state.global_step == 9
    # an unfinished checkpoint, newer than the one to resume from
    if dist.get_rank() == 0:
        (folder / "signals" / "checkpoint-12").mkdir()
    resumed = make_trainer(store, folder / "signals", max_steps=16, resume_from_checkpoint="auto")
    train_safely(resumed)
    assert_same_weights(resumed, weights(uninterrupted))
    again = make_trainer(store, folder / "signals", max_steps=16)
    with pytest.raises(ValueError, match="earlier run"):
        train_safely(again)
    print(f"signals: rank {dist.get_rank()} done", flush=True)


# FSDP2 and distributed checkpoints, without accelerate, which requires a GPU for them


def build(optimizer: str, sharded: bool):
    torch.manual_seed(0)
    model = MiniGPTForCausalLM(tiny_config("modern"))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if optimizer == "muon":
        return model, muon_adamw(model, learning_rate=1e-2, matrix_learning_rate=2e-2, weight_decay=0.1)
    return model, adamw_decaying_matrices(model, learning_rate=1e-2, weight_decay=0.1)


def take_steps(model, optimizer, store: TokenStore, steps: range) -> None:
    rows = ShuffledDocumentRows(store, 16, seed=3)
    collator = LanguageModelCollator(pad_token_id=1)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in steps:
        batch = collator([rows[i] for i in range(ROWS_PER_STEP * step + rank, ROWS_PER_STEP * (step + 1), world_size)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fsdp(folder: Path) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    store = open_store(folder / "store")
    for kind in OPTIMIZERS:
        output_dir = folder / f"fsdp_{kind}"
        model, optimizer = build(kind, sharded=True)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        take_steps(model, optimizer, store, range(5))
        with CheckpointSealer(output_dir) as sealer, sealer.saving(5) as checkpoint:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=checkpoint)
        take_steps(model, optimizer, store, range(5, 10))
        results = {"uninterrupted": model}

        model, optimizer = build(kind, sharded=True)
        weights, states = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": states}
        dcp.load(content, checkpoint_id=resolve_resume("auto", output_dir))
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
        take_steps(model, optimizer, store, range(5, 10))
        results["resumed"] = model

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        for name, trained in results.items():
            weights = get_model_state_dict(trained, options=options)
            if dist.get_rank() == 0:
                torch.save(weights, output_dir / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    job_folder, *names = sys.argv[1:]
    jobs = {"ddp": ddp, "classify": classify, "killed": killed, "signals": signals, "fsdp": fsdp}
    for name in names:
        jobs[name](Path(job_folder))
    dist.barrier()
    # a process that exits with its group alive is sometimes aborted, and one that destroys FSDP2's groups as well
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
