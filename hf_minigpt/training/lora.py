"""LoRA: the arguments, and adapters on every linear layer of a model's blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from ..flags import COUNT, NOT_NEGATIVE, SHARE, Needs, check_arguments
from ..model.modeling_minigpt import MiniGPTForSequenceClassification, MiniGPTPreTrainedModel


@dataclass
class LoraArguments:
    """Arguments of LoRA adapters."""

    lora_rank: Annotated[int, NOT_NEGATIVE] = field(
        default=0,
        metadata={
            "help": "Rank of the LoRA adapters, which are trained instead of the model's weights. 0: no adapters."
        },
    )
    lora_alpha: Annotated[int | None, COUNT, Needs("lora_rank")] = field(
        default=None,
        metadata={"help": "The output of the adapters is scaled by lora_alpha / lora_rank. Default: 2 * lora_rank."},
    )
    lora_dropout: Annotated[float, SHARE, Needs("lora_rank")] = field(
        default=0.0, metadata={"help": "Dropout probability on the input of the adapters."}
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "Whether to save the model with the adapters merged into its weights."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.merge_lora and not self.lora_rank:
            raise ValueError(
                f"merge_lora={self.merge_lora} with lora_rank={self.lora_rank}: there are no adapters to merge. Set "
                "--lora_rank 16, for example, or remove --merge_lora."
            )

    @property
    def saves_adapter(self) -> bool:
        """Whether the output folder contains an adapter instead of a whole model."""
        return self.lora_rank > 0 and not self.merge_lora


def add_lora(model: MiniGPTPreTrainedModel, args: LoraArguments, new_ids: Sequence[int] = ()) -> Any:
    """
    Add LoRA adapters (Hu et al., 2021) to every linear layer of the blocks, and freeze the other weights.

    Args:
        model: a language model, or a classifier, whose head is trained with the adapters.
        args: rank, scale and dropout of the adapters.
        new_ids: token ids whose embeddings are trained with the adapters.

    Returns:
        A PEFT model that wraps `model`.
    """
    from peft import LoraConfig, get_peft_model

    blocks = model.model.layers.named_modules()
    targets = sorted({name.split(".")[-1] for name, module in blocks if isinstance(module, torch.nn.Linear)})
    head = None
    if isinstance(model, MiniGPTForSequenceClassification):
        head = ["score"] if model.pool_query is None else ["score", "pool_query"]
    config = LoraConfig(
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=head,
        trainable_token_indices={"embed_tokens": list(new_ids)} if new_ids else None,
    )
    return get_peft_model(model, config)
