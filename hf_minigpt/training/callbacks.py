"""What the Trainer does not do by itself while it trains a language model."""

from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.state import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..data.streaming import StreamedRows
from .evaluation import sample_texts
from .safeguards import optional, printable


class SetEpoch(TrainerCallback):
    """Tells the training rows which epoch it is.

    accelerate's data loader does so in the plain case only: not where the sampler is sharded over processes, and not
    after a resume in the middle of an epoch.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader: Any = None, **kwargs):
        # whole at an epoch's beginning, and a fraction after a resume within it
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class StreamPosition(TrainerCallback):
    """Saves with each checkpoint where the stream of training rows goes on after it, and goes on there.

    Args:
        rows: that the Trainer trains on.
        checkpoint: to resume from.
    """

    def __init__(self, rows: StreamedRows, checkpoint: str | None):
        self.rows = rows
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if self.checkpoint is not None:
            self.rows.load_position(self.checkpoint)

    def on_save(self, args, state, control, **kwargs):
        # of those that were read: the data loader is ahead of the training
        num_trained_on = state.global_step * args.gradient_accumulation_steps * self.rows.rows_per_batch
        self.rows.save_position(Path(args.output_dir, f"checkpoint-{state.global_step}"), num_trained_on)

    def on_train_end(self, args, state, control, **kwargs):
        self.rows.close()


class PrintSample(TrainerCallback):
    """Prints what the model writes after each evaluation in training: watching it learn is half the fun.

    Where that fails there is a warning, and the training goes on.

    Args:
        prompt: what the text begins with.
        max_new_tokens: its length, which the model's context bounds.
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
            tqdm.write(printable(f"step {state.global_step}: {text.strip()!r}"))
