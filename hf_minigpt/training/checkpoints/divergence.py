"""Stops a run whose loss or gradient explodes or is NaN, and reports the step and its rows."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from .sealing import CheckpointSealer, newest_sealed


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is NaN, or far too large.

    Attributes:
        step: the optimizer step, counted from 1.
        rows: indices into the training set of this process's rows in that step, or None if the order is unknown.
        checkpoint: the last sealed checkpoint, or None.
    """

    def __init__(self, step: int, what: str, output_dir: str | Path, rows: list[int] | None = None):
        self.step = step
        self.rows = rows
        self.checkpoint = newest_sealed(output_dir)
        where = f"in rows {rows}" if rows else "(rows unknown)"
        super().__init__(
            f"{what} at step {step} {where}. Last valid checkpoint: {self.checkpoint}. Inspect these rows, lower the "
            "learning rate or lower max_grad_norm."
        )


class LossGuard:
    """Finds the first step whose loss is NaN or far above the first loss.

    `record` does not wait for the device, `first_bad` does.

    Args:
        output_dir: folder of the run's checkpoints, for the message.
        max_loss: default: three times the first loss, and at least 10 (a uniform guess among 22,000 tokens).
    """

    def __init__(self, output_dir: str | Path, max_loss: float | None = None):
        self.output_dir = output_dir
        self.max_loss = max_loss
        self._losses: list[tuple[int, torch.Tensor]] = []

    def record(self, step: int, loss: torch.Tensor) -> None:
        """Add the mean loss of a step, a 0-dim tensor."""
        self._losses.append((step, loss.detach().clone()))

    def first_bad(self) -> tuple[int, float] | None:
        """Return step and loss of the first bad step since the last call, or None."""
        if not self._losses:
            return None
        steps, tensors = zip(*self._losses, strict=True)
        self._losses.clear()
        losses = torch.stack(tensors).tolist()
        if self.max_loss is None and math.isfinite(losses[0]):
            self.max_loss = max(3 * losses[0], 10.0)
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss) or (self.max_loss is not None and loss > self.max_loss):
                return step, loss
        return None

    def check(self) -> None:
        """Raise TrainingDiverged if there is a bad step."""
        bad = self.first_bad()
        if bad is not None:
            raise TrainingDiverged(bad[0], f"The loss is {bad[1]:.6g}", self.output_dir)


def rows_of_step(dataloader: Any, step: int, gradient_accumulation_steps: int) -> list[int] | None:
    """Return the training set indices of this process's rows in an optimizer step of the Trainer, counted from 1.

    Returns:
        None if the order cannot be reproduced.
    """
    batch_sampler = dataloader.batch_sampler
    if batch_sampler is None:
        return None
    sharded = batch_sampler.batch_sampler if hasattr(batch_sampler, "batch_sampler") else batch_sampler
    if not isinstance(getattr(sharded, "sampler", None), (SeedableRandomSampler, SequentialSampler)):
        return None
    steps_per_epoch = -(-len(dataloader) // gradient_accumulation_steps)
    epoch, step_in_epoch = divmod(step - 1, steps_per_epoch)
    if isinstance(sharded.sampler, SeedableRandomSampler):
        sharded.sampler.set_epoch(epoch)
    first = step_in_epoch * gradient_accumulation_steps
    batches = islice(batch_sampler, first, first + gradient_accumulation_steps)
    return [row for batch in batches for row in batch]


class StopOnDivergence(TrainerCallback):
    """Raises TrainingDiverged before a diverged model is logged, evaluated or saved.

    Args:
        trainer: the Trainer.
        sealer: of its checkpoints.
        max_loss: as in `LossGuard`.
        max_grad_norm: limit of the gradient norm before clipping.
    """

    CHECK_EVERY = 100

    def __init__(
        self,
        trainer: Trainer,
        sealer: CheckpointSealer,
        max_loss: float | None = None,
        max_grad_norm: float = 1e5,
    ):
        self.trainer = trainer
        self.sealer = sealer
        self.losses = LossGuard(sealer.output_dir, max_loss)
        self.max_grad_norm = max_grad_norm

    def on_train_begin(self, args, state, control, **kwargs):
        # the filter would replace a NaN in the log
        args.logging_nan_inf_filter = False
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if logged and self.losses.max_loss is None:
            self.losses.max_loss = max(3 * logged[0], 10.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._sum_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args, state, control, train_dataloader: Any = None, **kwargs):
        self.losses.record(state.global_step, self.trainer._tr_loss - self._sum_before)
        due = control.should_log or control.should_evaluate or control.should_save
        if due or state.global_step % self.CHECK_EVERY == 0:
            self._check(args, train_dataloader)

    def on_epoch_end(self, args, state, control, train_dataloader: Any = None, **kwargs):
        self._check(args, train_dataloader)

    def on_log(self, args, state, control, logs: Any = None, train_dataloader: Any = None, **kwargs):
        norm = logs.get("grad_norm", 0.0)
        # a loss scaler overflows to find its scale, and skips such steps
        skipped = args.fp16 and not math.isfinite(norm)
        if not norm <= self.max_grad_norm and not skipped:
            self._stop(args, state.global_step, f"The norm of the gradient is {norm:.6g}", train_dataloader)

    def _check(self, args: TrainingArguments, train_dataloader: Any) -> None:
        bad = self.losses.first_bad()
        if bad is not None:
            self._stop(args, bad[0], f"The loss is {bad[1]:.6g}", train_dataloader)

    def _stop(self, args: TrainingArguments, step: int, what: str, train_dataloader: Any) -> None:
        self.sealer.wait()
        rows = rows_of_step(train_dataloader, step, args.gradient_accumulation_steps)
        raise TrainingDiverged(step, what, self.sealer.output_dir, rows)
