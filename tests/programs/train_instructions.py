"""Train a tiny chat model for two steps in two processes, and save its losses and weights.

    python -m tests.programs.train_instructions FOLDER

writes FOLDER/processes.json and FOLDER/processes.pt.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch

from hf_minigpt.instructions.arguments import SFTArguments
from hf_minigpt.instructions.rows import ConversationRows, InstructionCollator
from hf_minigpt.instructions.trainer import InstructionTrainer
from hf_minigpt.training.processes import end_training
from tests.instructions.tiny_chat import chat_model, tokenized


def train(folder: Path, name: str, batch_size: int, accumulation: int) -> InstructionTrainer:
    """Take two steps of plain gradient descent over the same records, with any batch size."""
    model, tokenizer, _ = chat_model()
    args = SFTArguments(
        str(folder / name),
        optimizer="trainer",
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = tokenized(tokenizer)
    trainer = InstructionTrainer(
        model,
        args,
        train_dataset=ConversationRows(data),
        eval_dataset=ConversationRows(data),
        data_collator=InstructionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{name}.json").write_text(json.dumps([losses, metrics["eval_loss"], metrics["eval_tokens"]]))
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return trainer


def run_rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    trainer = train(Path(folder), "processes", 2, 2)
    # a process that exits without leaving its group is sometimes aborted
    end_training(trainer.accelerator, trainer)


if __name__ == "__main__":
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # fork: the processes share the imports, which take longer than the training
    torch.multiprocessing.start_processes(run_rank, (sys.argv[1], port), nprocs=2, start_method="fork")
