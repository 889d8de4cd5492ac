"""Flags of the recipe that makes a classifier: its data, its training, its adapter."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..flags import Condition, Range, Unique, check_arguments
from ..training.arguments import COUNT, HELP, NOT_NEGATIVE, RATE, SEED, SHARE, RecipeArguments, best_by
from .data import ReviewSplits, load_reviews


@dataclass
class ReviewArguments:
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, or a file, folder or glob of .jsonl, .json, .csv, .tsv, .parquet, each also "
            ".gz or .zst. Default: the embedded "
            "reviews of tales, for which nothing is downloaded."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the label: a number or a name."})
    class_names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the classes are called, in the order of their numbers. Default: the names that the data "
            "declares, else negative positive."
        },
    )
    label_map: list[str] = field(
        default_factory=list,
        metadata={"help": "Values of the column that are neither names nor numbers: neg=negative pos=positive ..."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="test", metadata={"help": "Split to test on, if there is one by that name."})
    unlabelled_split: str | None = field(
        default=None, metadata={"help": "Split whose texts --write_training_texts writes too."}
    )
    test_fraction: Annotated[float | None, Range(above=0, below=1)] = field(
        default=None, metadata={"help": "Share of the texts to test on where there is no test split. Default: 0.2."}
    )
    validation_fraction: Annotated[float, Range(above=0, below=1)] = field(
        default=0.1, metadata={"help": "Share of the training texts on which the best epoch is chosen."}
    )
    split_seed: Annotated[int, SEED] = field(default=0, metadata={"help": "Seed of the choice of the held-out texts."})
    max_examples: Annotated[int | None, COUNT] = field(default=None, metadata={"help": "Train on so many texts only."})
    truncation: Literal["head", "tail", "head_tail", "windows"] = field(
        default="head_tail",
        metadata={
            "help": "What is kept of a text longer than context_length: its head, its tail, head_tail (a quarter of "
            "the tokens from the head, the rest from the tail), or windows (a random one in training, head_tail in "
            "use). The saved model truncates long texts in the same way by itself."
        },
    )
    write_training_texts: str | None = field(
        default=None,
        metadata={
            "help": "Write the cleaned texts that may be trained on (neither validation nor test) to this .parquet or "
            ".jsonl file, for recipes/pretrain.py, and stop."
        },
    )
    baseline: bool = field(
        default=False,
        metadata={
            "help": "Train TF-IDF of words and pairs of words with logistic regression beside it (needs "
            "scikit-learn), and test whether the network is better."
        },
    )
    pipeline_examples: Annotated[int, NOT_NEGATIVE] = field(
        default=200,
        metadata={
            "help": "Test texts that evaluate's evaluator judges once more through the pipeline, if scipy is there."
        },
    )

    def __post_init__(self):
        check_arguments(self)
        if self.class_names and len(set(self.class_names)) < max(len(self.class_names), 2):
            raise ValueError(f"class_names={self.class_names} must be at least two different names.")
        wrong = [item for item in self.label_map if not all(item.partition("=")[::2])]
        if wrong:
            raise ValueError(f"label_map has {wrong[0]!r}, which is not VALUE=NAME.")
        if self.write_training_texts is not None and not self.write_training_texts.endswith((".parquet", ".jsonl")):
            raise ValueError(f"write_training_texts={self.write_training_texts} must end in .parquet or .jsonl.")

    def load(self) -> ReviewSplits:
        """The splits that the flags name."""
        return load_reviews(
            self.dataset,
            config_name=self.dataset_config,
            text_column=self.text_column,
            label_column=self.label_column,
            class_names=self.class_names or None,
            label_map=dict(item.split("=", 1) for item in self.label_map),
            train_split=self.train_split,
            test_split=self.test_split,
            unlabelled_split=self.unlabelled_split,
            test_fraction=self.test_fraction,
            validation_fraction=self.validation_fraction,
            split_seed=self.split_seed,
            max_examples=self.max_examples,
        )


@dataclass
class SeedArguments:
    seeds: Annotated[list[int], SEED, Unique()] = field(
        default_factory=list,
        metadata={
            "help": "Train once with each seed, in seed-N below output_dir, and keep the best. Default: --seed."
        },
    )


@dataclass
class ClassificationArguments(RecipeArguments):
    """`RecipeArguments` with what a classifier's training takes, and defaults for it."""

    METRICS: ClassVar[dict[str, bool]] = {
        "loss": False,
        "accuracy": True,
        "f1": True,
        "roc_auc": True,
        "calibration_error": False,
    }
    CONDITIONS: ClassVar[dict[str, tuple[Condition, ...]]] = {"metric_for_best_model": best_by(METRICS)}

    output_dir: str | None = field(default="runs/reviews", metadata=HELP["output_dir"])
    num_train_epochs: float = field(default=6.0, metadata=HELP["num_train_epochs"])
    learning_rate: float | None = field(
        default=1e-3, metadata={"help": "AdamW's learning rate: of everything, or beside Muon of what is no matrix."}
    )
    matrix_learning_rate: Annotated[float, RATE] = field(
        default=0.01, metadata={"help": "Learning rate of Muon's matrices."}
    )
    warmup_steps: float = field(default=0.05, metadata=HELP["warmup_steps"])
    weight_decay: float = field(default=0.01, metadata=HELP["weight_decay"])
    adam_beta2: float = field(default=0.98, metadata=HELP["adam_beta2"])
    include_num_input_tokens_seen: str | bool = field(default=True, metadata=HELP["include_num_input_tokens_seen"])
    eval_strategy: IntervalStrategy | str = field(default="epoch", metadata=HELP["eval_strategy"])
    save_strategy: SaveStrategy | str = field(default="epoch", metadata=HELP["save_strategy"])
    save_total_limit: int | None = field(default=1, metadata=HELP["save_total_limit"])
    load_best_model_at_end: bool = field(default=True, metadata=HELP["load_best_model_at_end"])
    metric_for_best_model: str | None = field(default="accuracy", metadata=HELP["metric_for_best_model"])

    tokens_per_batch: Annotated[int, COUNT] = field(
        default=8192,
        metadata={
            "help": "Tokens in a batch of one process, padding included: texts of like length share one. Instead of "
            "per_device_train_batch_size."
        },
    )
    pooling: Literal["last", "mean", "attention"] = field(
        default="mean",
        metadata={
            "help": "What the classifier reads: the last token, the mean over all, or a mean in which a learned "
            "attention weighs them."
        },
    )
    auxiliary_lm_weight: Annotated[float, RATE] = field(
        default=0.0, metadata={"help": "Weight of the language-model loss beside the classifier's (GPT-1's lambda)."}
    )
    dropout: Annotated[float | None, SHARE] = field(
        default=None, metadata={"help": "Of the embedding and of each branch. Default: the model's."}
    )
    attention_dropout: Annotated[float | None, SHARE] = field(
        default=None, metadata={"help": "Of the attention weights, slow on a CPU. Default: the model's."}
    )
    token_dropout: Annotated[float, SHARE] = field(
        default=0.0, metadata={"help": "Share of the tokens that are blanked out in training, others in each epoch."}
    )
    adversarial_epsilon: Annotated[float, SHARE] = field(
        default=0.0,
        metadata={
            "help": "Learn each text with its embeddings moved to where the loss is higher, by this share of their "
            "length: 0.005, say. An epoch then takes 1.8 times as long."
        },
    )
    layer_decay: Annotated[float, Range(above=0, most=1)] = field(
        default=1.0,
        metadata={"help": "The learning rates of each block are those of the block above times this factor."},
    )
    frozen_layers: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "Keep the embeddings and so many of the lowest blocks as they are."}
    )
    early_stopping_patience: Annotated[int | None, COUNT] = field(
        default=3, metadata={"help": "Stop after so many evaluations without a better validation accuracy."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.optimizer == "trainer" and self.layer_decay != 1:
            raise ValueError(f"layer_decay={self.layer_decay} needs --optimizer muon or adamw, not 'trainer'.")
        if self.label_smoothing_factor and self.auxiliary_lm_weight:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: the Trainer then computes the loss itself, "
                f"without the auxiliary one of auxiliary_lm_weight={self.auxiliary_lm_weight}. Leave one of them out."
            )
        if self.adversarial_epsilon and self.torch_compile:
            raise ValueError(
                f"adversarial_epsilon={self.adversarial_epsilon} with torch_compile: the model would be recompiled "
                "for each batch. Leave one of them out."
            )
        default = RecipeArguments.__dataclass_fields__["per_device_train_batch_size"].default
        if self.per_device_train_batch_size != default or self.auto_find_batch_size:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size}: the size of a batch is told in "
                "tokens here; set tokens_per_batch."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r}: batches are grouped by length already; "
                "leave it out."
            )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs --load_best_model_at_end true.")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} with eval_strategy='no': nothing would tell "
                "when to stop. Evaluate by epoch or steps, or set early_stopping_patience to null in a YAML file."
            )
        super().__post_init__()
