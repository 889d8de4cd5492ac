"""The arguments and the training of one rung of `recipes/ladder.py`, a sequence of ever more complete small GPTs."""

from dataclasses import dataclass, field, fields
from typing import Literal

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from ..data.collators import LanguageModelCollator
from ..data.rows import RandomWindowRows
from ..data.token_store import PreparedCorpus
from ..model.configuration_minigpt import MiniGPTConfig
from ..training.checkpoints.train_safely import train_safely
from ..training.console import ConsoleCallback
from ..training.optimizers import optimizer_cls_and_kwargs
from ..training.trainer import LanguageModelTrainer
from .arguments import PretrainArguments


HELP = {f.name: f.metadata for f in fields(PretrainArguments)}


@dataclass
class LadderArguments(PretrainArguments):
    """`PretrainArguments` with the defaults of a small model and a constant learning rate."""

    output_dir: str | None = field(default="runs/ladder", metadata=HELP["output_dir"])
    max_steps: int = field(default=2000, metadata=HELP["max_steps"])
    per_device_train_batch_size: int = field(default=32, metadata=HELP["per_device_train_batch_size"])
    per_device_eval_batch_size: int = field(default=256, metadata=HELP["per_device_eval_batch_size"])
    learning_rate: float = field(default=5e-3, metadata=HELP["learning_rate"])
    weight_decay: float = field(default=0.01, metadata=HELP["weight_decay"])
    adam_beta2: float = field(default=0.999, metadata=HELP["adam_beta2"])
    lr_scheduler_type: str = field(default="constant", metadata=HELP["lr_scheduler_type"])
    warmup_steps: float = field(default=0, metadata=HELP["warmup_steps"])
    optimizer: Literal["muon", "adamw", "trainer"] = field(default="adamw", metadata=HELP["optimizer"])
    eval_steps: float | None = field(default=500, metadata=HELP["eval_steps"])
    eval_max_rows: int | None = field(default=None, metadata=HELP["eval_max_rows"])
    logging_steps: float = field(default=500, metadata=HELP["logging_steps"])
    save_strategy: str = field(default="no", metadata=HELP["save_strategy"])
    disable_tqdm: bool | None = field(default=True, metadata=HELP["disable_tqdm"])
    # in models this small, threads wait for each other longer than they compute
    cpu_threads: int | None = field(default=1, metadata=HELP["cpu_threads"])

    def __post_init__(self):
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint={self.resume_from_checkpoint!r} is not supported. Train the remaining rungs "
                "with --rungs."
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: random windows have no epochs. Set it to at least 1.")
        super().__post_init__()


class LadderTrainer(LanguageModelTrainer):
    """A `LanguageModelTrainer` that also evaluates on windows of the training text."""

    def __init__(self, *args, train_windows: RandomWindowRows, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_windows = train_windows
        self.remove_callback(ConsoleCallback)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics | super().evaluate(self.train_windows, ignore_keys, f"{metric_key_prefix}_train")


def train_rung(
    config: MiniGPTConfig,
    corpus: PreparedCorpus,
    tokenizer: PreTrainedTokenizerFast,
    eval_batches: int,
    args: LadderArguments,
) -> dict[str, float]:
    """Train and evaluate one rung, and save it in `args.output_dir`.

    Args:
        config: configuration of the rung.
        corpus: the tokenized corpus.
        tokenizer: its tokenizer.
        eval_batches: number of training batches' worth of windows in an evaluation, for each split.
        args: arguments of the run.

    Returns:
        The number of parameters and the Trainer's metrics.
    """
    context_length = tokenizer.model_max_length = config.max_position_embeddings
    num_windows = eval_batches * args.train_batch_size
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    trainer = LadderTrainer(
        model=model,
        args=args,
        train_dataset=RandomWindowRows(corpus.train, context_length, args.max_steps * args.rows_per_step, args.seed),
        eval_dataset=RandomWindowRows(corpus.validation, context_length, num_windows, seed=args.seed + 1),
        train_windows=RandomWindowRows(corpus.train, context_length, num_windows, seed=args.seed + 1),
        data_collator=LanguageModelCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
    )
    metrics = train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics
    trainer.save_model()
    metrics |= trainer.evaluate()
    trainer.save_state()
    return {"parameters": model.num_parameters()} | metrics
