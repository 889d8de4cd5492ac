"""What concerns the processes of a run: rank, printing once, threads, a writable output folder, the end."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


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


def use_exact_reductions(accelerator: Any) -> None:
    """Make FSDP2 reduce gradients and return losses in float32 in a run with mixed precision.

    accelerate's default does both in half precision: a loss of 6.793 becomes 6.781 in bfloat16. With this policy a run
    computes as under DDP: weights are gathered in half precision, and activations between the layers stay in float32,
    so that every forward pass must run under `accelerator.autocast()`. A policy that the user has set is kept.

    Args:
        accelerator: an `accelerate.Accelerator`, before its `prepare`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is None:
        return
    half = plugin.mixed_precision_policy.param_dtype
    if plugin.mixed_precision_policy == MixedPrecisionPolicy(half, half, half):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            half, torch.float32, torch.float32, cast_forward_inputs=False
        )


def class_before_sharding(model: Any) -> Any:
    """Return the class of a model, for one that FSDP2 shards the class that it had before."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


@contextlib.contextmanager
def with_own_class(model: Any) -> Iterator[None]:
    """Give a model that FSDP2 shards its own class while it is saved.

    `save_pretrained` copies the file of a model's class into the folder, which would be FSDP2's file instead of the
    code of the model.
    """
    sharded_class = type(model)
    model.__class__ = class_before_sharding(model)
    try:
        yield
    finally:
        model.__class__ = sharded_class


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
