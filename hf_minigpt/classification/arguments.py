"""Command-line flags of classification: the data, the training, and the seeds."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..flags import Condition, Range, Unique, check_arguments
from ..training.arguments import COUNT, HELP, NOT_NEGATIVE, RATE, SEED, SHARE, RecipeArguments, best_by


Truncation = Literal["head", "tail", "head_tail", "windows"]


@dataclass
class ReviewArguments:
    """The labelled texts, how they are split and truncated, and what is compared on the test set."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Name of a dataset on the Hub, or a file, folder or glob of .jsonl, .json, .csv, .tsv or .parquet "
            "files, optionally compressed (.gz, .zst). Default: the embedded reviews of tales, without a download."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the texts."})
    label_column: str = field(default="label", metadata={"help": "Column with the labels: class numbers or names."})
    class_names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of the classes in the order of their numbers. Default: the names declared by the dataset, "
            "or else negative positive."
        },
    )
    label_map: list[str] = field(
        default_factory=list,
        metadata={"help": "Class names for other values of the label column, for example neg=negative pos=positive."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="test", metadata={"help": "Split to test on, if the dataset has one."})
    unlabelled_split: str | None = field(
        default=None, metadata={"help": "Split without labels that --write_training_texts adds to the training texts."}
    )
    test_fraction: Annotated[float | None, Range(above=0, below=1)] = field(
        default=None,
        metadata={"help": "Fraction of the texts to hold out for testing if there is no test split. Default: 0.2."},
    )
    validation_fraction: Annotated[float, Range(above=0, below=1)] = field(
        default=0.1,
        metadata={"help": "Fraction of the training texts to hold out for choosing the best checkpoint."},
    )
    split_seed: Annotated[int, SEED] = field(
        default=0, metadata={"help": "Random seed of the train, validation and test split."}
    )
    max_examples: Annotated[int | None, COUNT] = field(
        default=None, metadata={"help": "Maximum number of training texts. The held-out sets keep their size."}
    )
    truncation: Truncation = field(
        default="head_tail",
        metadata={
            "help": "How to truncate texts longer than context_length: keep the head, the tail, head_tail (the first "
            "quarter of the tokens and the last three quarters), or windows (a random window in each training epoch, "
            "head_tail at inference). The saved model truncates in the same way."
        },
    )
    write_training_texts: str | None = field(
        default=None,
        metadata={
            "help": "Write the cleaned training texts, without validation and test texts, to this .parquet or .jsonl "
            "file for recipes/pretrain.py, then exit."
        },
    )
    baseline: bool = field(
        default=False,
        metadata={
            "help": "Also train a TF-IDF and logistic regression baseline (requires scikit-learn) and compare the "
            "model with it by McNemar's test."
        },
    )
    pipeline_examples: Annotated[int, NOT_NEGATIVE] = field(
        default=200,
        metadata={
            "help": "Number of test texts to evaluate again through the text-classification pipeline (requires scipy)."
        },
    )

    def __post_init__(self):
        check_arguments(self)
        if self.class_names and len(set(self.class_names)) < max(len(self.class_names), 2):
            raise ValueError(f"class_names={self.class_names} must be at least two different names.")
        malformed = [item for item in self.label_map if not all(item.partition("=")[::2])]
        if malformed:
            raise ValueError(f"label_map contains {malformed[0]!r}. Write each entry as VALUE=NAME.")
        if self.write_training_texts is not None and not self.write_training_texts.endswith((".parquet", ".jsonl")):
            raise ValueError(f"write_training_texts={self.write_training_texts} must end in .parquet or .jsonl.")


@dataclass
class SeedArguments:
    """The seeds to train with."""

    seeds: Annotated[list[int], SEED, Unique()] = field(
        default_factory=list,
        metadata={
            "help": "Train one classifier per seed, each in output_dir/seed-N, and keep the best. Default: --seed."
        },
    )


@dataclass
class ClassificationArguments(RecipeArguments):
    """Training arguments of a classifier: `RecipeArguments` with other defaults and additional fields."""

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
        default=1e-3,
        metadata={"help": "Learning rate of AdamW. With Muon, AdamW trains the parameters that are not matrices."},
    )
    matrix_learning_rate: Annotated[float, RATE] = field(
        default=0.01, metadata={"help": "Learning rate of Muon, which trains the matrices of the blocks."}
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
            "help": "Maximum number of tokens per batch and process, including padding. Replaces "
            "per_device_train_batch_size: batches group texts of similar length."
        },
    )
    pooling: Literal["last", "mean", "attention"] = field(
        default="mean",
        metadata={
            "help": "How the hidden states are pooled: the last token, the mean of all tokens, or a mean weighted by "
            "learned attention."
        },
    )
    auxiliary_lm_weight: Annotated[float, RATE] = field(
        default=0.0, metadata={"help": "Weight of the auxiliary language-model loss (lambda in the GPT-1 paper)."}
    )
    dropout: Annotated[float | None, SHARE] = field(
        default=None, metadata={"help": "Dropout of the embeddings and residual branches. Default: the model's."}
    )
    attention_dropout: Annotated[float | None, SHARE] = field(
        default=None, metadata={"help": "Dropout of the attention weights, slow on a CPU. Default: the model's."}
    )
    token_dropout: Annotated[float, SHARE] = field(
        default=0.0,
        metadata={"help": "Probability of replacing a training token by end-of-text, drawn anew in each epoch."},
    )
    adversarial_epsilon: Annotated[float, SHARE] = field(
        default=0.0,
        metadata={
            "help": "Norm of the adversarial embedding perturbation, relative to the norm of the embeddings, for "
            "example 0.005. An epoch takes 1.8 times as long. Default: 0, no perturbation."
        },
    )
    layer_decay: Annotated[float, Range(above=0, most=1)] = field(
        default=1.0,
        metadata={"help": "Factor from the learning rate of each block to that of the block below."},
    )
    frozen_layers: Annotated[int, NOT_NEGATIVE] = field(
        default=0, metadata={"help": "Number of blocks to freeze, from the first on, together with the embeddings."}
    )
    early_stopping_patience: Annotated[int | None, COUNT] = field(
        default=3, metadata={"help": "Stop after this many evaluations without improvement of metric_for_best_model."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.optimizer == "trainer" and self.layer_decay != 1:
            raise ValueError(f"layer_decay={self.layer_decay} requires --optimizer muon or adamw, not 'trainer'.")
        if self.label_smoothing_factor and self.auxiliary_lm_weight:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} cannot be combined with "
                f"auxiliary_lm_weight={self.auxiliary_lm_weight}, because the Trainer's smoothed loss has no "
                "auxiliary term. Set one of them to 0."
            )
        if self.adversarial_epsilon and self.torch_compile:
            raise ValueError(
                f"adversarial_epsilon={self.adversarial_epsilon} with torch_compile=True would recompile the model "
                "for each batch. Leave one of them out."
            )
        default = RecipeArguments.__dataclass_fields__["per_device_train_batch_size"].default
        if self.per_device_train_batch_size != default or self.auto_find_batch_size:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} and auto_find_batch_size="
                f"{self.auto_find_batch_size} do not apply to classification. Set tokens_per_batch instead."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has no effect, because batches are already "
                "grouped by length. Leave it out."
            )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} requires --load_best_model_at_end true."
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} requires evaluations. Set --eval_strategy "
                "to epoch or steps, or early_stopping_patience to null in a YAML file."
            )
        super().__post_init__()
