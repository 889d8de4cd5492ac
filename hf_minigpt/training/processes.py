"""What concerns the processes of a run: rank, printing once, threads, a writable output folder, the end."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """Return the index of this process in the process group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process prints for all. Also right before the process group exists, under torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def print_once(message: str) -> None:
    """Print a message in the main process only."""
    if is_main_process():
        print(message, flush=True)


def use_all_cores(cpu_threads: int | None = None) -> None:
    """Give torch its share of the cores: `accelerate launch` and `torchrun` set one thread for each process.

    Args:
        cpu_threads: number of threads. Default: the cores that this process may use, divided by the number of
            processes on this machine.
    """
    if cpu_threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cpu_threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(cpu_threads)


def check_writable(folder: str) -> None:
    """Raise ValueError if a run could not write to its output folder. Called before any long work starts."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={folder} cannot be written ({error.strerror}): choose another.") from error


def end_training(accelerator: Any, *trainers: Any) -> None:
    """Wait for the other processes, end the tracking and leave the process group. The last call of a recipe.

    The DDP wrappers of all trainers are freed first. A wrapper that is freed later would be the last owner of the
    process group. It would join gloo's thread while it holds the interpreter's lock, which that thread may be waiting
    for, and the process would never end.

    Args:
        accelerator: an `accelerate.Accelerator`.
        trainers: every `transformers.Trainer` of the run.
    """
    accelerator.wait_for_everyone()
    for trainer in trainers:
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
    accelerator.free_memory()
    accelerator.end_training()
