"""Trainer for instruction finetuning."""

import math

from ..training.evaluation import score_rows
from ..training.trainer import LanguageModelTrainer


class InstructionTrainer(LanguageModelTrainer):
    """`LanguageModelTrainer` whose evaluation covers the tokens with a label: the responses.

    The model may be wrapped by PEFT. Token counts include padding.
    """

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
