"""transformers' Trainer, with an evaluation that is exact for language models and a log that counts tokens."""

import time
from collections.abc import Sized
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer

from ..data.rows import Rows
from .arguments import LanguageModelArguments
from .evaluation import evaluate_language_model
from .flops import flops_per_token, peak_flops_per_second
from .settings import save_settings


class LanguageModelTrainer(Trainer):
    """
    Trainer of a MiniGPTForCausalLM on rows of a token store.

    - `evaluate()` reports `evaluate_language_model` of the evaluation rows: all of them, or while training
      `args.eval_max_rows`.
    - The loss is computed without the logits: outputs have none.
    - The log has `num_input_tokens_seen` and, since the last entry, `tokens_per_second` (without evaluations),
      `tflops_per_second` (model FLOPs, `flops_per_token`), `mfu` (their share of `peak_flops_per_second` of all
      devices) and `accuracy`, the share of the labels that were the most likely token.
    - Beside a saved model are the settings that a run on it inherits (`training_settings.json`).
    - `warmup_stable_decay` goes down linearly to zero over `args.decay_fraction` of the steps.
    """

    args: LanguageModelArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled and self.args.optimizer == "muon":
            raise ValueError(
                "optimizer='muon' orthogonalises whole matrices, and DeepSpeed's ZeRO makes one long vector of them: "
                "choose --optimizer adamw, or shard with recipes/launch/fsdp2.yaml."
            )
        self._seconds_evaluating = 0.0
        self._logged_at: tuple[float, int | None] = (time.perf_counter(), 0)
        self._hits_and_labels = torch.zeros(2, dtype=torch.int64)
        self._flops_per_token: float | None = None

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, Sized) and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last=True with per_device_train_batch_size={self.args.per_device_train_batch_size}: "
                f"the {len(self.train_dataset)} rows fill no batch on {self.args.world_size} processes. Choose a "
                "smaller one."
            )
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        self.args.lr_scheduler_kwargs = self.args.scheduler_kwargs(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args, **kwargs):
        self._seconds_evaluating = 0.0
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
        hits_and_labels = torch.stack([outputs.num_correct, num_labels])
        self._hits_and_labels = self._hits_and_labels.to(hits_and_labels.device) + hits_and_labels
        return (loss, outputs) if return_outputs else loss

    def _track_num_input_tokens(self, inputs):
        # the Trainer's own waits for the device in every micro-step; rows and batches are of one size everywhere
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        if self._flops_per_token is None:
            # with adapters or code from the Hub it is no class of ours
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
            hits, num_labels = self.accelerator.reduce(self._hits_and_labels, "sum").tolist()
            logs["accuracy"] = hits / max(num_labels, 1)
            self._hits_and_labels = torch.zeros_like(self._hits_and_labels)
        # the base class would add a rate that counts evaluations, from start_time
        super().log(logs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of `evaluate_language_model`, each name with the prefix, in the log and for the callbacks."""
        start = time.perf_counter()
        # only a sharded model must be called through its wrapper; DDP's would synchronise buffers for nothing
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert self.model is not None
        max_rows = self.args.eval_max_rows if self.is_in_train else None
        results = self.score(self.model_wrapped if sharded else self.model, dataset, max_rows)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._seconds_evaluating += time.perf_counter() - start
        return metrics

    def score(self, model, dataset, max_rows: int | None) -> dict[str, float]:
        """The metrics of an evaluation, of at most so many rows."""
        assert isinstance(dataset, Rows)
        return evaluate_language_model(
            model, dataset, self.data_collator, self.args.eval_batch_size, self.accelerator, max_rows=max_rows
        )

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_settings(self.args, output_dir or str(self.args.output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the recipe has written one, which `push_to_hub` would overwrite."""


def end_training(accelerator: Accelerator, *trainers: Trainer) -> None:
    """The last thing a recipe does: wait for the other processes, end the tracking, leave the process group.

    DDP's wrappers, those of all trainers, go first. The last one to be freed later would be the group's last owner
    and join gloo's thread while it holds the interpreter's lock, which that thread may be waiting for: the process
    would never end.
    """
    accelerator.wait_for_everyone()
    for trainer in trainers:
        trainer.model_wrapped = trainer.model  # type: ignore[assignment]
        trainer.accelerator.free_memory()
    accelerator.free_memory()
    accelerator.end_training()
