"""Prepare a base model for chat, and read the optimizer settings it was trained with."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals
from transformers import AutoConfig, PreTrainedTokenizerFast

from ..data.corpora import load_documents
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..tokenization import add_chat_template, check_tokenizer_fits, num_ids
from ..training.loading import MULTIPLE
from ..training.settings import INHERITED, LEARNING_RATES, SETTINGS_FILE, load_settings


# Flags of recipes/pretrain.py for the base model of a run without --model. Values that equal the defaults are listed
# too, because these flags are part of the cache key.
EMBEDDED_BASE_FLAGS: tuple[str, ...] = ("--rows", "aligned", "--matrix_learning_rate", "0.01")

# Classes in the `training_args.bin` of version 0.1, at their module paths of that version.
PICKLED_CLASSES = (
    "hf_minigpt.training.arguments.PretrainArguments",
    "hf_minigpt.training.sft.SFTArguments",
    "transformers.trainer_pt_utils.AcceleratorConfig",
    "transformers.trainer_utils.HubStrategy",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.SaveStrategy",
    "transformers.trainer_utils.SchedulerType",
    "transformers.training_args.OptimizerNames",
    "accelerate.state.PartialState",
    "accelerate.utils.dataclasses.DistributedType",
)


class PickledObject:
    """Stand-in for every class in an old `training_args.bin`: keeps attributes and runs no code."""

    def __init__(self, *args: Any):
        pass


def inherited_settings(model: str, learning_rate_factor: float, adapter: bool = False) -> dict[str, Any]:
    """Return optimizer settings for finetuning, taken from the run that trained the base model.

    Args:
        model: folder or Hub name of the base model. Its settings are in `training_settings.json`, or in
            `training_args.bin` for checkpoints of version 0.1.
        learning_rate_factor: factor on the learning rates.
        adapter: whether adapters are trained. They start at zero, so AdamW at 1e-3 is used instead.

    Returns:
        Values by flag; AdamW at 5e-5 if no settings are saved. Warns if `training_args.bin` cannot be read.

    Raises:
        ValueError: `training_settings.json` is damaged.
    """
    if adapter:
        return {"optimizer": "adamw", "learning_rate": 1e-3}
    saved = load_settings(model)
    if saved is None:
        saved = _load_pickled_arguments(Path(model) / "training_args.bin")
    if saved is None:
        return {"optimizer": "adamw", "learning_rate": 5e-5}
    settings = {name: saved[name] for name in INHERITED if name in saved}
    if saved.get("optimizer") == "muon" and settings.get("embedding_learning_rate") is None:
        settings["embedding_learning_rate"] = 0.3 * AutoConfig.from_pretrained(model).initializer_range
    for name in LEARNING_RATES:
        if settings.get(name) is not None:
            settings[name] *= learning_rate_factor
    return settings


def _load_pickled_arguments(path: Path) -> dict[str, Any] | None:
    """Return the fields of the pickled training arguments; None if the file is missing or cannot be read."""
    if not path.is_file():
        return None
    known: list[Any] = [(PickledObject, name) for name in PICKLED_CLASSES]
    try:
        with safe_globals(known):
            return dict(vars(torch.load(path, weights_only=True)))
    except Exception as error:
        # torch's message goes on with advice that does not apply
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        warnings.warn(
            f"{path} cannot be read ({reason:.200}), and there is no {SETTINGS_FILE}. The settings of that run are "
            "unknown, so AdamW at 5e-5 is used. Set --optimizer and --learning_rate to use others.",
            stacklevel=3,
        )
        return None


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as text: "optimizer=muon, learning_rate=0.004"."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )


def prepare_for_chat(
    model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, chat_format: str | None = None
) -> list[int]:
    """Add a chat template to the tokenizer, and embeddings for its new tokens to the model. Both change in place.

    Args:
        chat_format: "roles", "alpaca", or None for the tokenizer's own template, else "roles".

    Returns:
        The new ids. Their embeddings start as the mean of the others. The model now decodes greedily by default.
    """
    first = num_ids(tokenizer)
    add_chat_template(tokenizer, chat_format)
    # new ids follow the largest one, even if the vocabulary has gaps
    new_ids = list(range(first, num_ids(tokenizer)))
    if new_ids:
        model.resize_token_embeddings(num_ids(tokenizer), pad_to_multiple_of=MULTIPLE)
        with torch.no_grad():
            for table in (model.model.embed_tokens.weight, model.lm_head.weight):
                table[new_ids] = table[:first].mean(0)
    check_tokenizer_fits(tokenizer, model.config)
    model.generation_config.do_sample = False
    return new_ids


def embedded_base_folder(cache_dir: str) -> Path:
    """Return the cache folder of the base model of a run without --model; it depends on the tales and the flags."""
    content = f"{load_documents().fingerprint} {EMBEDDED_BASE_FLAGS}"
    return Path(cache_dir) / "base_models" / hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
