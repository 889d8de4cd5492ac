"""Compares the settings and data of a run with those of the checkpoint that it resumes from."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from ...data.rows import Rows
from ...data.streaming import StreamedRows
from ..processes import print_once
from .sealing import read_manifest


RUN_FIELDS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_steps", "num_train_epochs"),
    *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip"),
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
)
# fields of subclasses of TrainingArguments that do not affect the weights
HARMLESS_FIELDS = {"allow_changed_run", "cpu_threads", "precision", "dataset_num_proc", "eval_max_rows"}
HARMLESS_CONFIG = {"_name_or_path", "architectures", "transformers_version", "use_cache"}
# set by the first labels, or affecting only how the loss is computed
HARMLESS_CONFIG |= {"problem_type", "skip_logits"}
SAMPLED_ITEMS = 64
# Fields in manifests of earlier versions -> their present names
RENAMED_FIELDS = {"arguments.adversarial_share": "arguments.adversarial_epsilon"}


def dataset_fingerprint(dataset: Any) -> str | None:
    """Return a digest of a training set.

    It covers the settings and the token store of `Rows`, and of other datasets the length and a sample of the items.
    For an iterable dataset it is None: its fingerprint must come from elsewhere.
    """
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        return None
    if isinstance(dataset, StreamedRows):
        return dataset.fingerprint()
    items: Any = dataset
    content: list[Any] = [len(items)]
    if isinstance(dataset, Rows):
        # the current epoch changes during a run
        settings = {k: v for k, v in vars(dataset).items() if isinstance(v, int) and k != "epoch"}
        content += [type(dataset).__name__, settings, dataset.store.manifest]
    else:
        content += [items[i] for i in range(0, len(items), max(1, len(items) // SAMPLED_ITEMS))]
    text = json.dumps(content, default=lambda item: item.tolist() if hasattr(item, "tolist") else type(item).__name__)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run_fingerprint(args: Any, model: Any, dataset: str | None, optimizer: str) -> dict[str, Any]:
    """Return everything that determines the weights: batches, data, seed, configuration, optimizer, schedule.

    Args:
        args: TrainingArguments. The fields that a subclass adds are included.
        model: a PreTrainedModel.
        dataset: fingerprint of the training set.
        optimizer: class name of the optimizer.

    Returns:
        JSON values by field.
    """
    own = {field.name for field in dataclasses.fields(args)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)} | HARMLESS_FIELDS
    run = {
        "arguments": {name: getattr(args, name) for name in [*RUN_FIELDS, *sorted(own)]},
        "config": {k: v for k, v in model.config.to_dict().items() if k not in HARMLESS_CONFIG},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer": optimizer,
        "dataset": dataset,
    }
    return _as_json(run)


def optimizer_name(trainer: Trainer) -> str:
    """Return the class name of a Trainer's optimizer, which may not exist yet."""
    optimizer: Any = trainer.optimizer
    model: Any = trainer.model
    if trainer.optimizer_cls_and_kwargs:
        return trainer.optimizer_cls_and_kwargs[0].__name__
    if optimizer is None:
        return trainer.get_optimizer_cls_and_kwargs(trainer.args, model)[0].__name__
    # wrapped after a first training
    return type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer).__name__


def _as_json(run: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(run, sort_keys=True, default=str))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}
    return {name: value}


def check_same_run(checkpoint: str | Path, run: Mapping[str, Any], allow_changed_run: bool = False) -> None:
    """Compare the fingerprint of a run with the one in its checkpoint.

    Args:
        run: as passed to `seal_checkpoint`.
        allow_changed_run: print the differences and resume.

    Raises:
        ValueError: they differ. The message names all fields.
    """
    then, now = _flat(read_manifest(checkpoint)["run"] or {}), _flat(_as_json(run))
    then = {RENAMED_FIELDS.get(name, name): value for name, value in then.items()}
    absent = "(absent)"
    changes = [
        f"{name}: {then.get(name, absent)} in the checkpoint, {now.get(name, absent)} now"
        for name in sorted({*then, *now} - {""})
        if then.get(name, absent) != now.get(name, absent)
    ]
    if not changes:
        return
    text = "; ".join(changes)
    if not allow_changed_run:
        raise ValueError(
            f"{checkpoint} belongs to a different run: {text}. Restore these settings, choose another output_dir, or "
            "resume with the change by --allow_changed_run."
        )
    print_once(f"Resuming a changed run from {checkpoint}: {text}")
