"""transformers' Trainer with batches of like length under a budget of tokens, and an evaluation sorted by length."""

import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..training.callbacks import SetEpoch
from ..training.optimizers import optimizer_cls_and_kwargs
from .adversarial import perturbed_embeddings
from .arguments import ClassificationArguments
from .batching import ReviewCollator, ReviewRows, TokenBudgetBatches, batches_by_length
from .metrics import classification_metrics


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    rows: ReviewRows,
    collator: ReviewCollator,
    tokens_per_batch: int,
    accelerator: Accelerator | None = None,
) -> torch.Tensor:
    """Logits (number of reviews, C) of all reviews, in their order, float32 on the CPU.

    Rows are read sorted by length, shared out over the processes of `accelerator`.
    """
    accelerator = accelerator or Accelerator()
    was_training = model.training
    model.eval()
    batches = batches_by_length(rows.lengths, tokens_per_batch)
    results = []
    for first in range(0, len(batches), accelerator.num_processes):
        place = first + accelerator.process_index
        # a sharded model needs all processes in every forward pass: where batches have run out, one counts for nothing
        indices = batches[place if place < len(batches) else 0]
        input_ids = collator([rows[i] for i in indices])["input_ids"].to(accelerator.device)
        with accelerator.autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits
        if place < len(batches):
            results.append((indices, logits.float().cpu().numpy()))
    model.train(was_training)
    gathered = gather_object(results)
    results_in_order = np.empty((len(rows), gathered[0][1].shape[1]), np.float32)
    for indices, logits in gathered:
        results_in_order[indices] = logits
    return torch.from_numpy(results_in_order)


def classification_optimizer(args: ClassificationArguments) -> tuple[type, dict[str, Any]] | None:
    """The Trainer's `optimizer_cls_and_kwargs`, with `args.layer_decay`."""
    factory = optimizer_cls_and_kwargs(args)
    return factory and (factory[0], factory[1] | {"layer_decay": args.layer_decay})


class ClassificationTrainer(Trainer):
    """
    Trainer of a MiniGPTForSequenceClassification on `ReviewRows`.

    - Batches are those of `TokenBudgetBatches`, `args.tokens_per_batch` tokens for each process.
    - With `args.adversarial_epsilon` texts are learned with `perturbed_embeddings`.
    - `evaluate()` reports `classification_metrics` of the evaluation rows.
    - `warmup_stable_decay` goes down linearly to zero over `args.decay_fraction` of the steps.
    - The training metrics have `train_examples_per_second`, evaluations not counted.
    """

    args: ClassificationArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled and self.args.optimizer == "muon":
            raise ValueError(
                "optimizer='muon' orthogonalises whole matrices, and DeepSpeed's ZeRO makes one long vector of them: "
                "choose --optimizer adamw."
            )
        if self._sharded and self.args.adversarial_epsilon:
            raise ValueError(
                f"adversarial_epsilon={self.args.adversarial_epsilon} needs a whole model on each device, which FSDP "
                "and DeepSpeed shard. Leave one of them out."
            )
        self._seconds_evaluating = 0.0
        self._num_examples = 0

    def get_train_dataloader(self) -> DataLoader:
        rows = self.train_dataset
        assert isinstance(rows, ReviewRows)
        batches = TokenBudgetBatches(rows, self.args.tokens_per_batch, self.args.seed, self.args.world_size)
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        self.args.lr_scheduler_kwargs = self.args.scheduler_kwargs(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args, **kwargs):
        self._seconds_evaluating = 0.0
        self._num_examples = 0
        # train_safely brings its own
        if not any(isinstance(callback, SetEpoch) for callback in self.callback_handler.callbacks):
            self.add_callback(SetEpoch())
        output = super().train(*args, **kwargs)
        seconds = output.metrics["train_runtime"] - self._seconds_evaluating
        (num_examples,) = torch.tensor(gather_object([self._num_examples])).sum(0, keepdim=True).tolist()
        output.metrics["train_examples"] = num_examples
        output.metrics["train_examples_per_second"] = round(num_examples / seconds, 1)
        # these count all epochs, also those that early stopping spares
        for name in ("train_samples_per_second", "train_steps_per_second"):
            output.metrics.pop(name)
        return output

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def compute_loss(self, model, inputs, *args, **kwargs):
        share = self.args.adversarial_epsilon
        if share == 0 or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with perturbed_embeddings(self.accelerator.unwrap_model(model), inputs, share):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs):
        # the Trainer's own waits for the device in every micro-step; the processes' batches are of about one size
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        self._num_examples += inputs["input_ids"].shape[0]

    def predict_logits(self, rows: ReviewRows) -> torch.Tensor:
        """Logits (number of reviews, C), float32 on the CPU, on every process."""
        # only a sharded model must be called through its wrapper
        assert isinstance(self.data_collator, ReviewCollator) and self.model is not None
        model = self.model_wrapped if self._sharded else self.model
        return predict_logits(model, rows, self.data_collator, self.args.tokens_per_batch, self.accelerator)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of `classification_metrics`, each name with the prefix, in the log and for the callbacks."""
        start = time.perf_counter()
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(rows, ReviewRows) and rows.labels is not None
        results = classification_metrics(self.predict_logits(rows), rows.labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._seconds_evaluating += time.perf_counter() - start
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the recipe has written one, which `push_to_hub` would overwrite."""
