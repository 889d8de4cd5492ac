"""What `recipes/ladder.py` is made of: flags of a small model at a constant rate, and a rung trained and evaluated."""

from dataclasses import dataclass
from typing import Literal

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from ..data.collators import LanguageModelCollator
from ..data.rows import RandomWindowRows
from ..data.token_store import PreparedCorpus
from ..model.configuration_minigpt import MiniGPTConfig
from ..training.arguments import PretrainArguments
from ..training.checkpoints.train_safely import train_safely
from ..training.console import ConsoleCallback
from ..training.optimizers import optimizer_cls_and_kwargs
from ..training.trainer import LanguageModelTrainer


@dataclass
class LadderArguments(PretrainArguments):
    """`PretrainArguments` with the defaults of a small model at a constant learning rate."""

    output_dir: str | None = "runs/ladder"
    max_steps: int = 2000
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    lr_scheduler_type: str = "constant"
    warmup_steps: float = 0
    optimizer: Literal["muon", "adamw", "trainer"] = "adamw"
    eval_steps: float | None = 500
    eval_max_rows: int | None = None
    logging_steps: float = 500
    save_strategy: str = "no"
    disable_tqdm: bool | None = True
    # in models this small, threads wait for each other longer than they compute
    cpu_threads: int | None = 1

    def __post_init__(self):
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint={self.resume_from_checkpoint!r}: a climb is not resumed. Name the rungs that "
                "are left with --rungs."
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: random windows have no epochs, give a number of steps.")
        super().__post_init__()


class LadderTrainer(LanguageModelTrainer):
    """Evaluates on windows of the training text too."""

    def __init__(self, *args, train_windows: RandomWindowRows, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_windows = train_windows
        self.remove_callback(ConsoleCallback)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics | super().evaluate(self.train_windows, ignore_keys, f"{metric_key_prefix}_train")


def climb(
    config: MiniGPTConfig,
    corpus: PreparedCorpus,
    tokenizer: PreTrainedTokenizerFast,
    eval_batches: int,
    args: LadderArguments,
) -> dict[str, float]:
    """Train and evaluate one rung, and save it in `args.output_dir`."""
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
