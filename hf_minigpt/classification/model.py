"""From flags to the classifier that is trained, and from its folder back to it."""

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
from .arguments import ClassificationArguments
from .data import ReviewSplits, Truncation, model_truncation


# the tale reviews have some 200 words
TALE_REVIEWS_VOCAB_SIZE = 512


def frame_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that cleans a text as `clean_text` and puts end-of-text around it as `ReviewRows`.

    So a pipeline that is given a raw text reads what the training read. The tokenizer has no `model_max_length`: the
    model cuts long texts itself (`config.truncation_length`).
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
    # a class of its own (GPT2Tokenizer) would set the post-processor anew when it is loaded
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
    """The classifier to train, in float32, from `--model` or `--preset`, and its tokenizer, framed.

    Raises:
        ValueError: more frozen layers than there are, or a context beyond the learned positions.
    """
    fields: dict[str, Any] = {
        "num_labels": len(splits.class_names),
        "id2label": dict(enumerate(splits.class_names)),
        "label2id": {name: number for number, name in enumerate(splits.class_names)},
        # of a base model that was a regressor it is another one
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
        length = _stretch(model.config, model_args)
    else:
        length = context_length(model_args)
        tokenizer = _tokenizer(model_args, splits, length)
        config = build_config(model_args, tokenizer)
        config.update(fields)
        if model_args.attn_implementation is not None:
            config._attn_implementation = model_args.attn_implementation
        model = MiniGPTForSequenceClassification(config)
    if args.frozen_layers > model.config.num_hidden_layers:
        raise ValueError(
            f"frozen_layers={args.frozen_layers}, but the model has {model.config.num_hidden_layers}: choose at most "
            "that."
        )
    if args.frozen_layers:
        trunk = model.model
        modules = [module for name, module in trunk.named_children() if name.startswith("embed")]
        for module in [*modules, *trunk.layers[: args.frozen_layers]]:
            module.requires_grad_(False)
    if length < 4:
        raise ValueError(f"context_length={length} leaves no room for text: choose at least 4.")
    model.config.truncation_length = length
    return model, frame_with_end_of_text(tokenizer)


def _stretch(config: MiniGPTConfig, model_args: ModelArguments) -> int:
    length = model_args.context_length or config.max_position_embeddings
    if length > config.max_position_embeddings:
        if config.position_embedding_type == "learned":
            raise ValueError(
                f"context_length={length} is beyond the {config.max_position_embeddings} learned positions of "
                f"{model_args.model}: choose at most {config.max_position_embeddings}."
            )
        config.max_position_embeddings = length
    return length


def _tokenizer(model_args: ModelArguments, splits: ReviewSplits, length: int) -> PreTrainedTokenizerFast:
    if model_args.tokenizer is not None:
        return load_tokenizer(
            model_args.tokenizer, model_max_length=length, trust_remote_code=model_args.trust_remote_code
        )
    on_tales = splits.name == "reviews of tales"
    vocab_size = model_args.vocab_size or (TALE_REVIEWS_VOCAB_SIZE if on_tales else DEFAULT_VOCAB_SIZE)
    return train_tokenizer(splits.pretraining_texts, vocab_size, model_max_length=length, show_progress=False)


def check_lora_possible(lora_args: LoraArguments, model_args: ModelArguments) -> None:
    """Raise ValueError for an adapter that nobody could load, before anything takes long."""
    if not lora_args.saves_adapter:
        return
    if model_args.model is None:
        raise ValueError(
            f"lora_rank={lora_args.lora_rank} without --model: an adapter is saved without its base model. Name one "
            "with --model, or add --merge_lora true."
        )
    if conversion.detect_layout(model_args.model) != "minigpt":
        raise ValueError(
            f"lora_rank={lora_args.lora_rank}: adapters of a converted model do not fit {model_args.model!r}. "
            "Convert the model first (recipes/convert.py), or add --merge_lora true."
        )


def load_classifier(folder: str | Path) -> Any:
    """A classifier that the recipe has saved: a whole one, or adapters, which are put on their base model again."""
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        return MiniGPTForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    from peft import PeftModel

    base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = MiniGPTConfig.from_pretrained(path)
    model = MiniGPTForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(path)).eval()
