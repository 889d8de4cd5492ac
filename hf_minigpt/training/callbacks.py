"""Callbacks for the Trainer: the epoch of the rows, the position of a stream, samples during training."""

from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.state import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..data.streaming import StreamedRows
from .console import print_line
from .evaluation import sample_texts
from .safeguards import optional


class SetEpoch(TrainerCallback):
    """Sets the epoch of the training rows.

    accelerate's data loader does this only in the simple case: not if the sampler is split over processes, and not
    after a resume in the middle of an epoch.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader: Any = None, **kwargs):
        # an integer at the beginning of an epoch, a fraction after a resume within it
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class StreamPosition(TrainerCallback):
    """Saves the position of the stream of training rows with each checkpoint, and restores it on resume.

    Args:
        rows: the training rows.
        checkpoint: to resume from.
    """

    def __init__(self, rows: StreamedRows, checkpoint: str | None):
        self.rows = rows
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if self.checkpoint is not None:
            self.rows.load_position(self.checkpoint)

    def on_save(self, args, state, control, **kwargs):
        # the rows that were trained on; the data loader has read further
        num_trained_on = state.global_step * args.gradient_accumulation_steps * self.rows.rows_per_batch
        self.rows.save_position(Path(args.output_dir, f"checkpoint-{state.global_step}"), num_trained_on)

    def on_train_end(self, args, state, control, **kwargs):
        self.rows.close()


class PrintSample(TrainerCallback):
    """Prints a sample of the model, in one line, after each evaluation during training.

    A failure becomes a warning, and the training continues.

    Args:
        prompt: the beginning of the text.
        max_new_tokens: length of the text, limited by the model's context.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str = "", max_new_tokens: int = 48):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.in_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.in_training = False

    def on_evaluate(self, args, state, control, model: Any = None, **kwargs):
        # a sharded model would need all processes
        is_sharded = PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if is_sharded or not self.in_training or not state.is_world_process_zero:
            return
        with optional("printing a sample"):
            room = model.config.max_position_embeddings - 1 - len(self.tokenizer(self.prompt)["input_ids"])
            max_new_tokens = min(self.max_new_tokens, room)
            (text,) = sample_texts(
                model, self.tokenizer, 1, prompt=self.prompt, max_new_tokens=max_new_tokens, seed=state.global_step
            )
            print_line(f"sample: {' '.join(text.split())}", max_width=100)
