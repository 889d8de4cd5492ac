"""The arguments that all recipes share: model, data, and the Trainer's with the optimizer and precision."""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import yaml
from accelerate.utils import DynamoBackend
from huggingface_hub.constants import HF_HOME
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from ..flags import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    SHARE,
    THREADS,
    Assignments,
    Condition,
    Flags,
    Installed,
    JsonFile,
    JsonObject,
    OneOf,
    Range,
    check_arguments,
    did_you_mean,
    enum_value,
)
from .processes import print_once


logger = logging.getLogger(__name__)

DEFAULT_OPTIM = TrainingArguments.__dataclass_fields__["optim"].default
# Help texts of TrainingArguments, for fields whose default changes
HELP = {f.name: f.metadata for f in dataclasses.fields(TrainingArguments)}


def _preset_names() -> list[str]:
    # imported late: recipes that start from a checkpoint do not need the configuration
    from ..presets import PRESETS

    return list(PRESETS)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def set_tf32(enabled: bool) -> None:
    """Set whether products of fp32 matrices on a GPU may use TF32.

    Replaces torch's newer switch `torch.backends.fp32_precision`, which transformers sets: with it, reading the older
    `allow_tf32` and `get_float32_matmul_precision` raises an error, and Inductor reads them for max-autotune.
    """
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high" if enabled else "highest")


@functools.cache
def print_launch_command(num_gpus: int) -> None:
    """Print, once per process, how to use all GPUs."""
    print_once(
        f"Training on one of {num_gpus} GPUs. To use all: accelerate launch --config_file recipes/launch/ddp.yaml "
        f"--num_processes {num_gpus} RECIPE FLAGS"
    )


class AttentionImplementation(Condition):
    """An attention implementation that a MiniGPT can be built with on this machine."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        from ..model.configuration_minigpt import MiniGPTConfig
        from ..model.modeling_minigpt import MiniGPTModel

        sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        try:
            with torch.device("meta"):
                MiniGPTModel._from_config(MiniGPTConfig(**sizes), attn_implementation=value)
        except (ImportError, ValueError, OSError) as error:
            return f"cannot be used here: {_first_line(error)}"
        return None


class Tracker(Condition):
    """An experiment tracker that `--report_to` knows and that is installed."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        names = value if isinstance(value, list) else [value]
        unknown = OneOf(["none", "all", *INTEGRATION_TO_CALLBACK]).problem(names, flags)
        # transformers does not list flyte as available
        available = ["none", "all", "flyte", *get_available_reporting_integrations()]
        missing = [name for name in names if name not in available]
        if unknown is None and missing:
            return f"requires a package that is not installed. Run: pip install {missing[0]}"
        return unknown


# Conditions on the fields of TrainingArguments, except those whose choices argparse checks
TRAINER_CONDITIONS: dict[str, tuple[Condition, ...]] = {
    **dict.fromkeys(("seed", "data_seed"), (SEED,)),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("torch_empty_cache_steps", "eval_accumulation_steps", "dataloader_prefetch_factor"),
            *("ddp_bucket_cap_mb", "ddp_timeout", "save_total_limit"),
        ),
        (COUNT,),
    ),
    "max_steps": (Range(least=1, also=(-1,)),),
    **dict.fromkeys(("num_train_epochs", "save_steps", "eval_steps"), (POSITIVE,)),
    "adam_epsilon": (Range(above=0, most=1),),
    "dataloader_num_workers": (Range(least=0, most=THREADS.most),),
    **dict.fromkeys(("warmup_steps", "max_grad_norm", "logging_steps", "eval_delay"), (NOT_NEGATIVE,)),
    **dict.fromkeys(("learning_rate", "weight_decay", "neftune_noise_alpha"), (RATE,)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (SHARE,)),
    "optim_args": (Assignments(),),
    "torch_compile_backend": (OneOf([member.value.lower() for member in DynamoBackend]),),
    "torch_compile_mode": (OneOf(["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]),),
    "dataloader_multiprocessing_context": (OneOf(["fork", "spawn", "forkserver"]),),
    "report_to": (Tracker(),),
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), (JsonObject(),)
    ),
    **dict.fromkeys(("accelerator_config", "fsdp_config"), (JsonFile(),)),
    "deepspeed": (Installed("deepspeed"), JsonFile()),
    "use_liger_kernel": (Installed("liger_kernel"),),
}


def best_by(metrics: Mapping[str, bool]) -> tuple[Condition, ...]:
    """Return the condition on `--metric_for_best_model`: one of the metrics, with or without the prefix `eval_`."""
    return (OneOf(list(metrics), also=lambda name: name.removeprefix("eval_") in metrics),)


@dataclass
class CheckpointArguments:
    """Arguments that select a checkpoint to start from."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the checkpoint to start from, with its tokenizer."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer. Default: the tokenizer of --model."}
    )
    attn_implementation: Annotated[str | None, AttentionImplementation()] = field(
        default=None,
        metadata={
            "help": "Attention implementation: sdpa, eager, flash_attention_2, flex_attention, ... Default: sdpa."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to run code from the repository of the model or tokenizer on the Hub."},
    )


@dataclass
class ModelArguments(CheckpointArguments):
    """Arguments that select a checkpoint to start from, or the architecture and tokenizer of a new model."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the checkpoint to start from, with its tokenizer. Default: a new model "
            "with the architecture of --preset."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the tokenizer. Default: the tokenizer of --model, or else a new one, "
            "trained on the dataset."
        },
    )
    preset: Annotated[str, OneOf(_preset_names)] = field(
        default="minigpt-pico",
        metadata={"help": "Architecture of a new model, by its name in hf_minigpt.presets."},
    )
    vocab_size: Annotated[int | None, Range(least=320, most=2**20, multiple_of=64)] = field(
        default=None,
        metadata={
            "help": "Vocabulary size of a tokenizer trained on the dataset, a multiple of 64. Default: 1024 for the "
            "embedded tales, else 4096."
        },
    )
    context_length: Annotated[int | None, Range(least=2)] = field(
        default=None,
        metadata={"help": "Number of tokens in a row. Default: max_position_embeddings of the model."},
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of MiniGPTConfig that replace those of the preset: hidden_size=128 num_hidden_layers=4 ..."
        },
    )

    def __post_init__(self):
        check_arguments(self)
        if self.model is not None and self.config_overrides:
            raise ValueError(
                f"config_overrides={self.config_overrides} cannot change the architecture of model={self.model!r}. "
                "Remove one of the two flags."
            )
        if self.vocab_size is not None and (self.model or self.tokenizer):
            raise ValueError(
                f"vocab_size={self.vocab_size} is for training a tokenizer, but model={self.model!r} and "
                f"tokenizer={self.tokenizer!r} provide one. Remove vocab_size."
            )

    def overrides(self) -> dict[str, Any]:
        """Return `config_overrides` as a dictionary. Values are parsed as JSON, or else as YAML."""
        # imported late: recipes that start from a checkpoint do not need the configuration
        from ..model.configuration_minigpt import MiniGPTConfig

        known = [f.name for f in dataclasses.fields(MiniGPTConfig)] + list(MiniGPTConfig.attribute_map)
        overrides = {}
        for item in self.config_overrides:
            name, equals, value = item.partition("=")
            if not equals or name not in known:
                raise ValueError(
                    f"config_overrides contains {item!r}, which is not FIELD=VALUE with a field of MiniGPTConfig."
                    + did_you_mean(name, known)
                )
            try:
                overrides[name] = json.loads(value)
            except json.JSONDecodeError:
                overrides[name] = yaml.safe_load(value)
        return overrides


@dataclass
class DataArguments:
    """Arguments that select a text corpus and say how it is split and cut into rows."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Dataset to train on: a name on the Hub, or a file, folder or glob of .txt, .jsonl, .json, .csv, "
            ".tsv or .parquet files, optionally compressed (.gz, .zst). Default: the embedded tales, which need no "
            "download."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    join_sentences: bool = field(
        default=False,
        metadata={
            "help": "Whether to join consecutive rows into documents, for datasets with one sentence per row (the "
            "original BookCorpus)."
        },
    )
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "Text that separates the documents of a .txt file, such as '<|endoftext|>', or '\\n\\n' for a "
            "blank line. Default: each .txt file is one document."
        },
    )
    max_examples: Annotated[int | None, COUNT] = field(
        default=None, metadata={"help": "Use only the first N documents. Default: all."}
    )
    validation_fraction: Annotated[float, Range(above=0, below=1)] = field(
        default=0.1, metadata={"help": "Fraction of the text to hold out for evaluation."}
    )
    split_seed: Annotated[int, SEED] = field(
        default=0, metadata={"help": "Random seed for choosing the held-out documents."}
    )
    rows: Literal["aligned", "continuous"] = field(
        default="aligned",
        metadata={
            "help": "How documents are cut into training rows. aligned: each row starts with a document, and the last "
            "document is truncated at the end of the row. continuous: documents are concatenated, then chunked; every "
            "token is seen once per epoch."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the dataset during training without storing it, for datasets larger than the "
            "disk. Requires --max_steps."
        },
    )
    streaming_sample: Annotated[int, COUNT] = field(
        default=10_000,
        metadata={
            "help": "Number of documents that --streaming reads before training. The held-out ones among them are "
            "the evaluation set; the others train the tokenizer if none is given."
        },
    )
    shuffle_characters: Annotated[int, COUNT] = field(
        default=1 << 24,
        metadata={"help": "Size in characters of the blocks in which --streaming shuffles the documents."},
    )
    cache_dir: str = field(
        default=os.path.join(HF_HOME, "hf_minigpt"), metadata={"help": "Folder for tokenized datasets."}
    )

    def __post_init__(self):
        check_arguments(self)
        self.cache_dir = os.path.expanduser(self.cache_dir)


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with the optimizer, the precision and the CPU threads.

    `precision="auto"` selects bf16 if the GPU supports it, else fp16 with a loss scaler, and fp32 on a CPU. What
    remains in fp32 uses TF32 where available. `--bf16`, `--fp16` and `--tf32` take precedence.
    """

    CONDITIONS: ClassVar[dict[str, tuple[Condition, ...]]] = TRAINER_CONDITIONS
    # metrics of an evaluation, with whether greater is better
    METRICS: ClassVar[dict[str, bool]] = {}

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Learning rate of AdamW. With --optimizer muon, AdamW trains the output head, norms and biases. "
            "Default: 8e-3 with muon, else 1e-3."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(default="warmup_stable_decay", metadata=HELP["lr_scheduler_type"])
    logging_steps: float = field(default=0.01, metadata=HELP["logging_steps"])
    logging_first_step: bool = field(default=True, metadata=HELP["logging_first_step"])
    logging_nan_inf_filter: bool = field(default=False, metadata=HELP["logging_nan_inf_filter"])
    report_to: str | None = field(default="none", metadata=HELP["report_to"])
    # every parameter contributes to the loss
    ddp_find_unused_parameters: bool | None = field(default=False, metadata=HELP["ddp_find_unused_parameters"])
    # the buffers are constants, which are the same in all processes
    ddp_broadcast_buffers: bool | None = field(default=False, metadata=HELP["ddp_broadcast_buffers"])
    # the model reads columns through **kwargs that are not in the signature of its forward
    remove_unused_columns: bool = field(default=False, metadata=HELP["remove_unused_columns"])

    optimizer: Literal["muon", "adamw", "trainer"] = field(
        default="muon",
        metadata={
            "help": "Optimizer. muon: Muon for the weight matrices of the layers, AdamW for all other parameters. "
            "adamw: AdamW for all parameters. trainer: the optimizer of --optim."
        },
    )
    matrix_learning_rate: Annotated[float, RATE] = field(
        default=0.01, metadata={"help": "Learning rate of Muon, for the weight matrices of the layers."}
    )
    embedding_learning_rate: Annotated[float | None, RATE] = field(
        default=None,
        metadata={
            "help": "Learning rate of the embeddings with --optimizer muon. Default: 0.3 times their initial standard "
            "deviation."
        },
    )
    muon_scaling: Literal["original", "moonlight"] = field(
        default="original",
        metadata={
            "help": "Scale of Muon's update. original: sqrt(max(1, rows / columns)). moonlight: 0.2 sqrt(max(rows, "
            "columns)), which suits a matrix_learning_rate of the size used with AdamW."
        },
    )
    decay_fraction: Annotated[float, Range(least=0, most=1)] = field(
        default=1.0,
        metadata={
            "help": "Fraction of the steps over which warmup_stable_decay reduces the learning rate linearly to zero."
        },
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = field(
        default="auto",
        metadata={"help": "Precision. auto: bf16 if the GPU supports it, else fp16; fp32 on a CPU."},
    )
    allow_changed_run: bool = field(
        default=False,
        metadata={"help": "Whether to resume from a checkpoint of a run with other data, batch size or settings."},
    )
    cpu_threads: Annotated[int | None, THREADS] = field(
        default=None,
        metadata={"help": "Number of torch threads on a CPU. Default: the cores divided by the processes."},
    )

    def __post_init__(self):
        check_arguments(self)
        if self.optimizer != "trainer" and OptimizerNames(self.optim) != OptimizerNames(DEFAULT_OPTIM):
            raise ValueError(
                f"optim={enum_value(self.optim)!r} requires optimizer='trainer', not {self.optimizer!r}. Set "
                "--optimizer trainer, or remove --optim."
            )
        if self.uses_deepspeed and self.optimizer == "muon":
            raise ValueError(
                "optimizer='muon' orthogonalises whole matrices, but DeepSpeed's ZeRO flattens them into one vector. "
                "Set --optimizer adamw, or shard with recipes/launch/fsdp2.yaml."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove columns that the model reads. Remove this flag.")
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True: persistent workers would repeat the document order of the first "
                "epoch. Remove this flag."
            )
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError(
                "save_strategy='best' requires metric_for_best_model. Set, for example, "
                f"--metric_for_best_model {next(iter(self.METRICS), 'loss')}."
            )
        if self.learning_rate is None:
            self.learning_rate = 8e-3 if self.optimizer == "muon" else 1e-3
        self._choose_precision()
        if not torch.accelerator.is_available() and not self.bf16:
            # otherwise two processes of torchrun on a CPU would train separately, without a process group
            self.use_cpu = True
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.METRICS.get(self.metric_for_best_model.removeprefix("eval_"))
        if self._on_gpu and self.accelerator_config is None and self.dataloader_pin_memory:
            # batches are copied while the GPU computes
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()
        self.apply_tf32()
        if super().n_gpu > 1:
            print_launch_command(super().n_gpu)
        self._check_scheduler_and_optimizer()

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process, at most 1. The base class would use all with nn.DataParallel, which can
        neither split a step's token count nor gather outputs of different sizes."""
        return min(super().n_gpu, 1)

    @property
    def _on_gpu(self) -> bool:
        return torch.cuda.is_available() and not self.use_cpu

    def apply_tf32(self) -> None:
        """Set TF32 as `tf32` says. transformers and accelerate change it when they are set up."""
        if self.tf32 is not None and self._on_gpu and is_torch_tf32_available():
            set_tf32(self.tf32)

    def _check_scheduler_and_optimizer(self) -> None:
        """Build the scheduler and look up the optimizer, so that errors appear before the data are tokenized."""
        num_steps = self.max_steps if self.max_steps > 0 else 1000
        placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        kwargs = self.scheduler_kwargs(num_steps)
        try:
            get_scheduler(self.lr_scheduler_type, placeholder, self.get_warmup_steps(num_steps), num_steps, kwargs)
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(
                f"lr_scheduler_type={enum_value(self.lr_scheduler_type)!r} does not accept "
                f"lr_scheduler_kwargs={kwargs}: {_first_line(error)}. Change one of the two."
            ) from error
        if self.optimizer == "trainer":
            # imported late: recipes that only generate import this module too
            from transformers import Trainer

            try:
                Trainer.get_optimizer_cls_and_kwargs(self)
            except (ImportError, RuntimeError, ValueError) as error:
                # some optimizers need the model, which does not exist yet
                if "model" not in str(error).lower():
                    raise ValueError(
                        f"optim={enum_value(self.optim)!r} with optim_args={self.optim_args!r} cannot be used here: "
                        f"{_first_line(error)}. Choose another optimizer, or remove --optim."
                    ) from error

    def __getstate__(self) -> dict[str, Any]:
        # training_args.bin is saved with every checkpoint and pushed to the Hub
        return self.__dict__ | {"hub_token": None}

    def _choose_precision(self) -> None:
        if self.precision != "auto" and (self.bf16 or self.fp16):
            raise ValueError(
                f"precision={self.precision!r} conflicts with bf16={self.bf16}, fp16={self.fp16}. Set only one."
            )
        if self.precision != "auto":
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        elif self._on_gpu and not self.bf16 and not self.fp16:
            # by default torch also reports bf16 on GPUs that emulate it slowly (Turing)
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = not self.bf16
        if self.tf32 is None and self._on_gpu and is_torch_tf32_available():
            self.tf32 = True

    def scheduler_kwargs(self, num_steps: int) -> dict[str, Any]:
        """Return `lr_scheduler_kwargs`, for warmup_stable_decay with `decay_fraction` as a number of steps."""
        kwargs = self.lr_scheduler_kwargs or {}
        assert isinstance(kwargs, dict)
        if self.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
            return kwargs
        if self.get_warmup_steps(num_steps) > num_steps:
            logger.warning(
                "warmup_steps=%s exceeds the %s steps of this run, which will not reach its learning rate.",
                self.warmup_steps,
                num_steps,
            )
            return {"num_decay_steps": 0, "decay_type": "linear"} | kwargs
        num_decay_steps = min(round(self.decay_fraction * num_steps), num_steps - self.get_warmup_steps(num_steps))
        return {"num_decay_steps": num_decay_steps, "decay_type": "linear"} | kwargs

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the processes train with DeepSpeed, by `--deepspeed` or by `accelerate launch`."""
        return bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"

    @property
    def rows_per_step(self) -> int:
        """Number of rows in one optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def describe_hardware(self) -> str:
        """Return the devices and the precision in one line."""
        precision = "bf16" if self.bf16 else "fp16 with a loss scaler" if self.fp16 else "fp32"
        if self.device.type == "cuda":
            tf32 = ", TF32 for the rest" if self.tf32 else ""
            return f"{self.world_size} x {torch.cuda.get_device_name(self.device)}, {precision}{tf32}"
        plural = "es" if self.world_size > 1 else ""
        return (
            f"{self.device.type}, {self.world_size} process{plural} x {torch.get_num_threads()} threads, {precision}"
        )


@dataclass
class LanguageModelArguments(RecipeArguments):
    """The arguments that pretraining and instruction finetuning share."""

    METRICS: ClassVar[dict[str, bool]] = {"loss": False, "perplexity": False, "bits_per_byte": False, "accuracy": True}
    CONDITIONS: ClassVar[dict[str, tuple[Condition, ...]]] = {"metric_for_best_model": best_by(METRICS)}

    per_device_train_batch_size: int = field(default=8, metadata=HELP["per_device_train_batch_size"])
    per_device_eval_batch_size: int = field(default=32, metadata=HELP["per_device_eval_batch_size"])
    num_train_epochs: float = field(default=1.0, metadata=HELP["num_train_epochs"])
    include_num_input_tokens_seen: str | bool = field(default=True, metadata=HELP["include_num_input_tokens_seen"])
    eval_strategy: IntervalStrategy | str = field(default="steps", metadata=HELP["eval_strategy"])
    save_steps: float = field(default=0.25, metadata=HELP["save_steps"])
    save_total_limit: int | None = field(default=2, metadata=HELP["save_total_limit"])

    eval_max_rows: Annotated[int | None, COUNT] = field(
        default=128,
        metadata={
            "help": "Maximum number of held-out rows in an evaluation during training. The final evaluation uses all."
        },
    )

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: the Trainer computes it from "
                "full logits, which these models do not build. Remove this flag."
            )
        super().__post_init__()
