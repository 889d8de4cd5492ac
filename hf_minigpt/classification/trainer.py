"""The Trainer of classifiers: batches of texts of similar length within a token budget."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from ..training.callbacks import SetEpoch
from ..training.optimizers import optimizer_cls_and_kwargs
from ..training.trainer import RecipeTrainer
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
    """Return the logits of all texts, (N, C), in their order, float32 on the CPU, on every process.

    Batches hold texts of similar length and are split over the processes of `accelerator`.
    """
    accelerator = accelerator or Accelerator()
    was_training = model.training
    model.eval()
    batches = batches_by_length(rows.lengths, tokens_per_batch)
    results = []
    for first in range(0, len(batches), accelerator.num_processes):
        place = first + accelerator.process_index
        # a sharded model needs all processes in every forward pass: a process without batches left repeats the first
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
    """Return the Trainer's `optimizer_cls_and_kwargs`, with `args.layer_decay`."""
    factory = optimizer_cls_and_kwargs(args)
    return factory and (factory[0], factory[1] | {"layer_decay": args.layer_decay})


class ClassificationTrainer(RecipeTrainer):
    """
    Trainer of a MiniGPTForSequenceClassification on `ReviewRows`.

    - Batches are those of `TokenBudgetBatches`, `args.tokens_per_batch` tokens on each process.
    - `args.adversarial_epsilon` trains with `perturbed_embeddings`.
    - `evaluate()` reports `classification_metrics` of the evaluation rows.
    - The training metrics have `train_examples_per_second`, without evaluations.
    """

    args: ClassificationArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_sharded and self.args.adversarial_epsilon:
            raise ValueError(
                f"adversarial_epsilon={self.args.adversarial_epsilon} requires the whole model on each device, but "
                "FSDP and DeepSpeed shard it. Set adversarial_epsilon=0, or launch without sharding."
            )
        self._num_examples = 0

    def _train_batches(self) -> TokenBudgetBatches:
        assert isinstance(self.train_dataset, ReviewRows)
        return TokenBudgetBatches(self.train_dataset, self.args.tokens_per_batch, self.args.seed, self.args.world_size)

    @property
    def batches_per_epoch(self) -> int:
        return len(self._train_batches()) // self.args.world_size

    def get_train_dataloader(self) -> DataLoader:
        assert isinstance(self.train_dataset, ReviewRows)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._train_batches(),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def train(self, *args, **kwargs):
        self._num_examples = 0
        # train_safely adds its own
        if not any(isinstance(callback, SetEpoch) for callback in self.callback_handler.callbacks):
            self.add_callback(SetEpoch())
        output = super().train(*args, **kwargs)
        seconds = output.metrics["train_runtime"] - self._seconds_evaluating
        (num_examples,) = torch.tensor(gather_object([self._num_examples])).sum(0, keepdim=True).tolist()
        output.metrics["train_examples"] = num_examples
        output.metrics["train_examples_per_second"] = round(num_examples / seconds, 1)
        # these assume all epochs, even if early stopping ends the run
        for name in ("train_samples_per_second", "train_steps_per_second"):
            output.metrics.pop(name)
        return output

    def compute_loss(self, model, inputs, *args, **kwargs):
        epsilon = self.args.adversarial_epsilon
        if epsilon == 0 or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with perturbed_embeddings(self.accelerator.unwrap_model(model), inputs, epsilon):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs):
        super()._track_num_input_tokens(inputs)
        self._num_examples += inputs["input_ids"].shape[0]

    def predict_logits(self, rows: ReviewRows) -> torch.Tensor:
        """Return the logits of all texts, (N, C), float32 on the CPU, on every process."""
        assert isinstance(self.data_collator, ReviewCollator)
        tokens_per_batch = self.args.tokens_per_batch
        return predict_logits(self.model_to_score, rows, self.data_collator, tokens_per_batch, self.accelerator)

    def score(self, model, dataset, max_rows) -> dict[str, float]:
        assert isinstance(dataset, ReviewRows) and dataset.labels is not None
        return classification_metrics(self.predict_logits(dataset), dataset.labels)
