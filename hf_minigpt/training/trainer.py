"""The recipes' Trainers: what all jobs share, and the one for language models."""

import math
import time
from collections.abc import Sized
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer

from .arguments import LanguageModelArguments, RecipeArguments
from .checkpoints.sharded import FsdpCheckpointsMixin
from .console import ConsoleCallback, without_progress_bars
from .evaluation import evaluate_language_model
from .flops import flops_per_token, peak_flops_per_second
from .processes import use_exact_reductions, with_own_class
from .settings import save_settings


class RecipeTrainer(FsdpCheckpointsMixin, Trainer):
    """
    What the Trainers of all recipes share.

    - Subclasses evaluate with `score`. Evaluations do not count as training time.
    - The progress is shown by `ConsoleCallback`.
    - `warmup_stable_decay` decays linearly to zero over `args.decay_fraction` of the steps.
    - The settings that a later run inherits are saved next to the model (`training_settings.json`).
    - Checkpoints of FSDP are resumed from with or without it (`FsdpCheckpointsMixin`).
    """

    args: RecipeArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        use_exact_reductions(self.accelerator)
        replaced = [self.pop_callback(callback) for callback in (PrinterCallback, ProgressCallback)]
        # a notebook has a progress bar of its own
        if any(replaced):
            self.add_callback(ConsoleCallback())
        self._seconds_evaluating = 0.0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # accelerate would enable TF32 for every compiled model in fp32
        self.args.apply_tf32()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        # accelerate autocasts the forward of every model except a sharded one
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed splits the model over the processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def model_to_score(self) -> nn.Module:
        """The model to evaluate: the wrapper of a sharded one. DDP's wrapper would synchronise buffers for nothing."""
        model = self.model_wrapped if self.is_sharded else self.model
        assert model is not None
        return model

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        steps_per_epoch = max(math.ceil(self.batches_per_epoch / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * steps_per_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of one process in an epoch."""
        assert isinstance(self.train_dataset, Sized)
        batches = len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size)
        return math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        self.args.lr_scheduler_kwargs = self.args.scheduler_kwargs(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args, **kwargs):
        self._seconds_evaluating = 0.0
        return super().train(*args, **kwargs)

    def _track_num_input_tokens(self, inputs):
        # The Trainer's own method waits for the device in every micro-batch. All processes have batches of about the
        # same size.
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the metrics of `score` with the prefix. They are logged and passed to the callbacks."""
        start = time.perf_counter()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        max_rows = getattr(self.args, "eval_max_rows", None) if self.is_in_train else None
        results = self.score(self.model_to_score, dataset, max_rows)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._seconds_evaluating += time.perf_counter() - start
        return metrics

    def score(self, model: Any, dataset: Any, max_rows: int | None) -> dict[str, float]:
        """Return the metrics of a model on a dataset, of which at most `max_rows` rows are read."""
        raise NotImplementedError

    def _save(self, output_dir=None, state_dict=None) -> None:
        with without_progress_bars(), with_own_class(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_settings(self.args, output_dir or str(self.args.output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """Do nothing: `push_to_hub` calls this and would overwrite the card that the recipe has written."""


class LanguageModelTrainer(RecipeTrainer):
    """
    Trainer of a MiniGPTForCausalLM on rows of a token store.

    - `evaluate()` reports `evaluate_language_model` of the evaluation rows: all of them, or during training
      `args.eval_max_rows`.
    - The loss is computed without the logits: outputs have none.
    - The log has `num_input_tokens_seen` and, since the last entry, `tokens_per_second` (without evaluations),
      `tflops_per_second` (model FLOPs, `flops_per_token`), `mfu` (model FLOPs utilization: their share of
      `peak_flops_per_second` of all devices) and the `accuracy` of the next-token predictions.
    """

    args: LanguageModelArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._logged_at: tuple[float, int | None] = (time.perf_counter(), 0)
        self._correct_and_labels = torch.zeros(2, dtype=torch.int64)
        self._flops_per_token: float | None = None

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, Sized) and len(loader) == 0:
            raise ValueError(
                f"per_device_train_batch_size={self.args.per_device_train_batch_size} with dataloader_drop_last=True: "
                f"the {len(self.train_dataset)} rows fill no batch on {self.args.world_size} processes. Set a smaller "
                "batch size."
            )
        return loader

    def train(self, *args, **kwargs):
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self._peak_flops = peak_flops_per_second(self.args.device, dtype) * self.args.world_size
        self._logged_at = (time.perf_counter(), None)
        output = super().train(*args, **kwargs)
        tokens = self.state.num_input_tokens_seen - self._initial_num_input_tokens_seen
        seconds = output.metrics["train_runtime"] - self._seconds_evaluating
        output.metrics["train_tokens"] = self.state.num_input_tokens_seen
        output.metrics["train_tokens_per_second"] = round(tokens / seconds, 1)
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs_and_options = {**inputs, "skip_logits": True, "count_correct": True}
        loss, outputs = super().compute_loss(
            model, inputs_and_options, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        num_labels = (inputs["shift_labels"] != -100).sum()
        correct_and_labels = torch.stack([outputs.num_correct, num_labels])
        self._correct_and_labels = self._correct_and_labels.to(correct_and_labels.device) + correct_and_labels
        return (loss, outputs) if return_outputs else loss

    def _track_num_input_tokens(self, inputs):
        super()._track_num_input_tokens(inputs)
        if self._flops_per_token is None:
            # an adapter, or a model with code from the Hub, is no MiniGPT class
            model: Any = self.model
            length = inputs["input_ids"].shape[-1]
            self._flops_per_token = flops_per_token(model.config, model.num_parameters(), length)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.perf_counter() - self._seconds_evaluating, self.state.num_input_tokens_seen
            then, tokens_before = self._logged_at
            if tokens_before is None:
                tokens_before = self._initial_num_input_tokens_seen
            logs["tokens_per_second"] = round((tokens - tokens_before) / (now - then), 1)
            if self._flops_per_token is not None:
                flops = logs["tokens_per_second"] * self._flops_per_token
                logs["tflops_per_second"] = round(flops / 1e12, 6)
                logs["mfu"] = round(flops / self._peak_flops, 5)
            self._logged_at = (now, tokens)
            num_correct, num_labels = self.accelerator.reduce(self._correct_and_labels, "sum").tolist()
            logs["accuracy"] = num_correct / max(num_labels, 1)
            self._correct_and_labels = torch.zeros_like(self._correct_and_labels)
        # without start_time: the base class would add a rate that includes the evaluations
        super().log(logs)

    def score(self, model: Any, dataset: Any, max_rows: int | None) -> dict[str, float]:
        return evaluate_language_model(
            model, dataset, self.data_collator, self.args.eval_batch_size, self.accelerator, max_rows=max_rows
        )
