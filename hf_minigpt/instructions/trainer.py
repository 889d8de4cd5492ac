"""Trainer for instruction finetuning."""

import math

import torch

from ..training.evaluation import score_rows
from ..training.trainer import LanguageModelTrainer


class InstructionTrainer(LanguageModelTrainer):
    """`LanguageModelTrainer` whose evaluation covers the tokens with a label: the responses.

    The model may be wrapped by PEFT. Token counts include padding.
    """

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return a step's batches, on a GPU with `num_targets`, so that the loss skips the prompts."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if device.type != "cpu" and batches:
            counts = torch.stack([(batch["shift_labels"] != -100).sum() for batch in batches])
            # The only wait for the GPU in a step.
            for batch, num_targets in zip(batches, counts.tolist(), strict=True):
                batch["num_targets"] = num_targets
        return batches, num_items

    def score(self, model, dataset, max_rows):
        nats, hits, tokens = score_rows(
            model, dataset, self.data_collator, self.args.eval_batch_size, self.accelerator, max_rows=max_rows
        )
        loss = nats / max(tokens, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": hits / max(tokens, 1),
            "tokens": int(tokens),
        }
