"""Build the classifier and its tokenizer from the arguments, and load a trained classifier."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..deploy import conversion
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForSequenceClassification
from ..tokenization import load_tokenizer, train_tokenizer
from ..training.arguments import ModelArguments
from ..training.loading import DEFAULT_VOCAB_SIZE, build_config, context_length, load_base_model
from ..training.lora import LoraArguments
from .arguments import ClassificationArguments, Truncation
from .batching import model_truncation
from .data import TALE_REVIEWS, ReviewSplits


# The vocabulary of the tale reviews is about 200 words.
TALE_REVIEWS_VOCAB_SIZE = 512


def frame_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that cleans texts like `clean_text` and adds end-of-text on both sides like `ReviewRows`.

    A pipeline with this tokenizer prepares raw texts in the same way as the training. The tokenizer has no
    `model_max_length`, because the model truncates long texts (`config.truncation_length`).
    """
    frame = f"{tokenizer.eos_token} $A {tokenizer.eos_token}"
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    cleaning = [
        normalizers.Replace(Regex(r"(?i)\s*<br\s*/?>\s*"), "\n"),
        normalizers.Replace(Regex(r"\n{2,}"), "\n"),
        normalizers.Strip(),
    ]
    backend.normalizer = normalizers.Sequence([*cleaning, *([backend.normalizer] if backend.normalizer else [])])
    backend.post_processor = TemplateProcessing(
        single=frame, special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    # A model-specific class such as GPT2Tokenizer would replace the post-processor when it is loaded.
    framed = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    assert len(framed) == len(tokenizer)
    return framed


def build_classifier(
    model_args: ModelArguments, args: ClassificationArguments, splits: ReviewSplits, truncation: Truncation
) -> tuple[MiniGPTForSequenceClassification, PreTrainedTokenizerFast]:
    """Return the classifier to train, in float32, and its tokenizer (`frame_with_end_of_text`).

    Args:
        model_args: the pretrained model to start from (`model`), or the architecture of a new one.
        splits: the classes, and the texts on which a new tokenizer is trained.
        truncation: how the model truncates long texts.

    Raises:
        ValueError: `frozen_layers` exceeds the number of layers, or `context_length` is below 4 or exceeds the learned
            positions.
    """
    fields: dict[str, Any] = {
        "num_labels": len(splits.class_names),
        "id2label": dict(enumerate(splits.class_names)),
        "label2id": {name: number for number, name in enumerate(splits.class_names)},
        # The pretrained model may have been trained for another type of problem.
        "problem_type": "single_label_classification",
        "pooling": args.pooling,
        "auxiliary_lm_weight": args.auxiliary_lm_weight,
        "truncation": model_truncation(truncation),
    }
    if args.dropout is not None:
        fields |= {"embd_pdrop": args.dropout, "resid_pdrop": args.dropout}
    if args.attention_dropout is not None:
        fields["attn_pdrop"] = args.attention_dropout
    if model_args.model is not None:
        model, tokenizer = load_base_model(
            MiniGPTForSequenceClassification,
            model_args.model,
            tokenizer=model_args.tokenizer,
            trust_remote_code=model_args.trust_remote_code,
            attn_implementation=model_args.attn_implementation,
            **fields,
        )
        length = _extend_context(model.config, model_args)
    else:
        length = context_length(model_args)
        tokenizer = _load_or_train_tokenizer(model_args, splits, length)
        config = build_config(model_args, tokenizer)
        config.update(fields)
        if model_args.attn_implementation is not None:
            config._attn_implementation = model_args.attn_implementation
        model = MiniGPTForSequenceClassification(config)
    if args.frozen_layers > model.config.num_hidden_layers:
        raise ValueError(
            f"frozen_layers={args.frozen_layers} exceeds the {model.config.num_hidden_layers} layers of the model. "
            f"Set it to at most {model.config.num_hidden_layers}."
        )
    if args.frozen_layers:
        embeddings = [module for name, module in model.model.named_children() if name.startswith("embed")]
        for module in [*embeddings, *model.model.layers[: args.frozen_layers]]:
            module.requires_grad_(False)
    if length < 4:
        raise ValueError(f"context_length={length} leaves no room for text. Set it to at least 4.")
    model.config.truncation_length = length
    return model, frame_with_end_of_text(tokenizer)


def _extend_context(config: MiniGPTConfig, model_args: ModelArguments) -> int:
    """Return the context length, after raising `max_position_embeddings` to it if the positions are not learned."""
    length = model_args.context_length or config.max_position_embeddings
    if length > config.max_position_embeddings:
        if config.position_embedding_type == "learned":
            raise ValueError(
                f"context_length={length} exceeds the {config.max_position_embeddings} learned positions of "
                f"{model_args.model}. Set it to at most {config.max_position_embeddings}."
            )
        config.max_position_embeddings = length
    return length


def _load_or_train_tokenizer(model_args: ModelArguments, splits: ReviewSplits, length: int) -> PreTrainedTokenizerFast:
    if model_args.tokenizer is not None:
        return load_tokenizer(
            model_args.tokenizer, model_max_length=length, trust_remote_code=model_args.trust_remote_code
        )
    default = TALE_REVIEWS_VOCAB_SIZE if splits.name == TALE_REVIEWS else DEFAULT_VOCAB_SIZE
    vocab_size = model_args.vocab_size or default
    return train_tokenizer(splits.pretraining_texts, vocab_size, model_max_length=length, show_progress=False)


def check_lora_possible(lora_args: LoraArguments, model_args: ModelArguments) -> None:
    """Raise ValueError if the run would save an adapter that cannot be loaded again."""
    if not lora_args.saves_adapter:
        return
    if model_args.model is None:
        raise ValueError(
            f"lora_rank={lora_args.lora_rank} without --model would save an adapter without its base model. Set "
            "--model, or add --merge_lora true."
        )
    if conversion.detect_layout(model_args.model) != "minigpt":
        raise ValueError(
            f"lora_rank={lora_args.lora_rank}: adapters of a converted model do not fit the original model "
            f"{model_args.model!r}. Convert it first with recipes/convert.py, or add --merge_lora true."
        )


def load_classifier(folder: str | Path) -> Any:
    """Load a classifier from the output folder of a run, with its base model if the folder holds a LoRA adapter."""
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        return MiniGPTForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    from peft import PeftModel

    base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = MiniGPTConfig.from_pretrained(path)
    model = MiniGPTForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(path)).eval()
