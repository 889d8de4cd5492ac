"""Trains with checkpoints that survive any crash. A resumed run ends bit for bit like an uninterrupted one.

The Trainer writes checkpoints in place and resumes from the highest number, even if it is incomplete. Here only sealed
checkpoints count, see `sealing`.

With any Trainer, including TRL's, one call replaces `trainer.train`:

    train_safely(trainer)

A custom loop uses the parts from `sealing`, `signals`, `divergence` and `fingerprints`, here with Accelerate:

    losses = LossGuard(output_dir)
    with run_lock(output_dir), StopSignals() as stop, CheckpointSealer(output_dir, run=run) as sealer:
        checkpoint = resolve_resume("auto", output_dir)
        if checkpoint is not None:
            check_same_run(checkpoint, run)
            accelerator.load_state(checkpoint)
        for step in ...:
            losses.record(step, loss)
            stopping = stop.requested()
            if stopping or step % save_steps == 0:
                losses.check()
                with sealer.saving(step) as folder:
                    accelerator.save_state(folder)
            if stopping:
                break
    stop.exit_if_requested()
"""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ...data.streaming import StreamedRows
from ..callbacks import SetEpoch, StreamPosition
from ..processes import print_once
from .divergence import StopOnDivergence, TrainingDiverged
from .fingerprints import check_same_run, dataset_fingerprint, optimizer_name, run_fingerprint
from .sealing import CheckpointSealer, resolve_resume, run_lock
from .signals import StopOnSignal, StopSignals


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class SealedCheckpoints(TrainerCallback):
    """Seals the checkpoints that the Trainer saves, and deletes the old ones in its place."""

    def __init__(self, sealer: CheckpointSealer):
        self.sealer = sealer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.save_total_limit is not None:
            self.sealer.keep, args.save_total_limit = args.save_total_limit, None

    def on_step_end(self, args, state, control, **kwargs):
        self.sealer.check()
        if control.should_save:
            self.sealer.wait()

    def on_save(self, args, state, control, **kwargs):
        best = [state.best_model_checkpoint] if state.best_model_checkpoint else []
        self.sealer.seal(self.sealer.output_dir / f"checkpoint-{state.global_step}", protected=best)

    def on_train_end(self, args, state, control, **kwargs):
        self.sealer.wait()


class _StopAtMaxSteps(TrainerCallback):
    """Keeps a run that is resumed after its last step from training one more, as the Trainer does within an epoch."""

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self._is_finished = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_finished = state.global_step >= state.max_steps
        if self._is_finished:
            self.trainer._run_epoch = self._stop

    def _stop(self, **kwargs):
        self.trainer.control.should_training_stop = True

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if self._is_finished and "train_loss" in logs and losses:
            # the mean over zero steps would be 0
            logs["train_loss"] = state.log_history[-1]["train_loss"] = losses[-1]

    def on_train_end(self, args, state, control, **kwargs):
        if self._is_finished:
            del self.trainer._run_epoch


def train_safely(trainer: Trainer, *, dataset: str | None = None, allow_changed_run: bool = False) -> TrainOutput:
    """Call `trainer.train` with safe checkpoints.

    - Resumes from `args.resume_from_checkpoint` (`resolve_resume`) if the run has not changed (`check_same_run`).
    - Locks the output folder, seals the checkpoints and keeps `args.save_total_limit` of them.
    - On SIGTERM or SIGINT, saves after the step and ends the process with exit code 75.

    Args:
        trainer: any transformers Trainer.
        dataset: fingerprint of the training set, required for an iterable one. Default: `dataset_fingerprint`.
        allow_changed_run: resume a changed run. The changes are printed.

    Raises:
        ValueError: no valid checkpoint, a changed run, a folder in use, or an argument that sealing does not support.
        OSError: a checkpoint could not be written.
        TrainingDiverged: the loss or the gradient exploded.
        MemoryError: the device is out of memory. The message says what needs less.
    """
    args = trainer.args
    for name in ("enable_jit_checkpoint", "save_on_each_node"):
        if getattr(args, name):
            raise ValueError(f"{name}=True is not supported: sealed checkpoints replace it. Leave it out.")
    output_dir = str(args.output_dir)
    with run_lock(output_dir):
        checkpoint = resolve_resume(args.resume_from_checkpoint, output_dir)
        dataset = dataset or dataset_fingerprint(trainer.train_dataset)
        run = run_fingerprint(args, trainer.model, dataset, optimizer_name(trainer))
        if checkpoint is not None:
            if args.save_only_model:
                raise ValueError(
                    f"save_only_model=True: {checkpoint} has no optimizer state to resume from. Start from its "
                    "weights with --model in another output_dir."
                )
            check_same_run(checkpoint, run, allow_changed_run)
            print_once(f"Resuming from {checkpoint}")
        sealer = CheckpointSealer(output_dir, args.save_total_limit, run)
        with StopSignals(args.ddp_timeout) as signals, sealer:
            # in this order: the first may request a checkpoint, the second forbid it, the third seals it
            callbacks: list[TrainerCallback] = [StopOnSignal(signals), StopOnDivergence(trainer, sealer)]
            callbacks += [SealedCheckpoints(sealer), _StopAtMaxSteps(trainer)]
            if hasattr(trainer.train_dataset, "set_epoch"):
                callbacks.append(SetEpoch())
            if isinstance(trainer.train_dataset, StreamedRows):
                # the position must be saved before the checkpoint is sealed
                callbacks.insert(0, StreamPosition(trainer.train_dataset, checkpoint))
            with _added(trainer, callbacks):
                try:
                    output = trainer.train(resume_from_checkpoint=checkpoint)
                except TrainingDiverged:
                    raise
                except (OSError, RuntimeError, SafetensorError) as error:
                    sealer.wait()
                    if should_reduce_batch_size(error):
                        raise MemoryError(_out_of_memory(args, error)) from error
                    if sealer.unfinished() is None and getattr(error, "errno", None) not in DISK_ERRORS:
                        raise
                    raise sealer.write_error(error) from error
            signals.exit_if_requested()
    return output


def _out_of_memory(args: TrainingArguments, error: Exception) -> str:
    batch_size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    remedy = "--auto_find_batch_size true (halves it until it fits), --gradient_checkpointing true, or shorter rows"
    if batch_size % 2 == 0:
        same = f"--per_device_train_batch_size {batch_size // 2} --gradient_accumulation_steps {2 * accumulated}"
        remedy = f"{same} (the same steps), or {remedy}"
    reason = str(error).splitlines()[0]
    return f"Out of memory with per_device_train_batch_size={batch_size}: {reason} Try {remedy}."


@contextlib.contextmanager
def _added(trainer: Trainer, callbacks: list[TrainerCallback]) -> Iterator[None]:
    keep = trainer.args.save_total_limit
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)
        trainer.args.save_total_limit = keep
