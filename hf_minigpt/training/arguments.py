"""The recipes' flags: dataclasses, and a parser that takes them from the command line and from YAML files."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import yaml
from accelerate.utils import DynamoBackend
from huggingface_hub.constants import HF_HOME
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from ..flags import Condition, Flags, OneOf, Range, check_arguments, check_flags, did_you_mean
from .safeguards import allow_any_output


# What torch, NumPy and Python take alike
SEED = Range(least=0, most=2**32 - 1)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
COUNT = Range(least=1)
# far above any that trains, far below any that overflows
RATE = Range(least=0, most=1000)
SHARE = Range(least=0, below=1)
# More threads than that start slowly, or not at all.
THREADS = Range(least=1, most=1024)

logger = logging.getLogger(__name__)

DEFAULT_OPTIM = TrainingArguments.__dataclass_fields__["optim"].default


def _preset_names() -> list[str]:
    # here, not above: the configuration is no concern of recipes that start from a checkpoint
    from ..presets import PRESETS

    return list(PRESETS)


class AttentionImplementation(Condition):
    """One that a MiniGPT can be built with here: a misspelt name, or a package that is missing, is found at once."""

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
    """Something that `--report_to` knows and finds installed."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        names = value if isinstance(value, list) else [value]
        unknown = OneOf(["none", "all", *INTEGRATION_TO_CALLBACK]).problem(names, flags)
        # the list of those that are there leaves this one out
        available = ["none", "all", "flyte", *get_available_reporting_integrations()]
        missing = [name for name in names if name not in available]
        if unknown is None and missing:
            return f"needs a package that is not installed: pip install {missing[0]}, or leave it out"
        return unknown


class JsonObject(Condition):
    """A dictionary, written as JSON on the command line."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        return None if isinstance(found, dict) else 'must be a JSON object, such as {"num_cycles": 2}'


class JsonFile(Condition):
    """A dictionary, written as JSON, or the name of a file with one."""

    def problem(self, value: Any, flags: Flags) -> str | None:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return None if Path(value).is_file() else "is no file: give the name of a JSON file, or a JSON object"
        return JsonObject().problem(value, flags)


@dataclass(frozen=True)
class Installed(Condition):
    """Needs a package."""

    package: str

    def problem(self, value: Any, flags: Flags) -> str | None:
        if find_spec(self.package) is not None:
            return None
        return f"needs a package that is not installed: pip install {self.package.replace('_', '-')}, or leave it out"


class Assignments(Condition):
    """name=value,name=value"""

    def problem(self, value: Any, flags: Flags) -> str | None:
        is_wrong = not all(all(part.partition("=")[::2]) for part in str(value).split(","))
        return "must be name=value, with commas between several" if is_wrong else None


def _plain(value: Any) -> Any:
    """What an enumeration of transformers stands for."""
    return getattr(value, "value", value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


# Fields of TrainingArguments, for every recipe, but for those whose names argparse knows
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
    **dict.fromkeys(
        (*("warmup_steps", "max_grad_norm", "logging_steps", "eval_delay"),),
        (NOT_NEGATIVE,),
    ),
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
    """The condition on `--metric_for_best_model`: one of the metrics, with or without `eval_` before it."""
    return (OneOf(list(metrics), also=lambda name: name.removeprefix("eval_") in metrics),)


@dataclass
class ModelArguments:
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a MiniGPT to go on from, with its tokenizer. Instead of --preset."},
    )
    preset: Annotated[str, OneOf(_preset_names)] = field(
        default="minigpt-pico", metadata={"help": "Named configuration to start from scratch (hf_minigpt.presets)."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name. Default: that of --model, else one is trained on the corpus."},
    )
    vocab_size: Annotated[int | None, Range(least=320, most=2**20, multiple_of=64)] = field(
        default=None,
        metadata={"help": "Size of the tokenizer to train, a multiple of 64. Default: 1024 for the tales, else 4096."},
    )
    context_length: Annotated[int | None, Range(least=2)] = field(
        default=None, metadata={"help": "Tokens in a row. Default: max_position_embeddings of the model."}
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of MiniGPTConfig over the preset's: hidden_size=128 num_hidden_layers=4 ..."},
    )
    attn_implementation: Annotated[str | None, AttentionImplementation()] = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, flex_attention, ... Default: sdpa."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model or tokenizer on the Hub comes with."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.model is not None and self.config_overrides:
            raise ValueError(
                f"config_overrides={self.config_overrides} with model={self.model!r}: a checkpoint's architecture is "
                "what it is. Leave out one of the two."
            )
        if self.vocab_size is not None and (self.model or self.tokenizer):
            raise ValueError(
                f"vocab_size={self.vocab_size} is the size of a tokenizer to train, but model={self.model!r} and "
                f"tokenizer={self.tokenizer!r} bring one. Leave out vocab_size."
            )

    def overrides(self) -> dict[str, Any]:
        """`config_overrides` as a dictionary; values are read as JSON where they are JSON, else as YAML."""
        # here, not above: the configuration is no concern of recipes that start from a checkpoint
        from ..model.configuration_minigpt import MiniGPTConfig

        known = [f.name for f in dataclasses.fields(MiniGPTConfig)] + list(MiniGPTConfig.attribute_map)
        overrides = {}
        for item in self.config_overrides:
            name, equals, value = item.partition("=")
            if not equals or name not in known:
                raise ValueError(
                    f"config_overrides has {item!r}, which is not FIELD=VALUE for a field of MiniGPTConfig."
                    + did_you_mean(name, known)
                )
            try:
                overrides[name] = json.loads(value)
            except json.JSONDecodeError:
                overrides[name] = yaml.safe_load(value)
        return overrides


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, or a file, folder or glob of .txt, .jsonl, .json, .csv, .tsv, .parquet, each "
            "also .gz or .zst. Default: the embedded tales, for which nothing is downloaded."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    join_sentences: bool = field(
        default=False, metadata={"help": "The rows are sentences (classic BookCorpus): join them into documents."}
    )
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "Text between the documents of a .txt file, such as '<|endoftext|>', or '\\n\\n' for a blank "
            "line. Default: a .txt file is one document."
        },
    )
    max_examples: Annotated[int | None, COUNT] = field(
        default=None, metadata={"help": "Use only the first documents."}
    )
    validation_fraction: Annotated[float, Range(above=0, below=1)] = field(
        default=0.1, metadata={"help": "Share of the text that is held out."}
    )
    split_seed: Annotated[int, SEED] = field(
        default=0, metadata={"help": "Seed of the choice of the held-out documents."}
    )
    rows: Literal["aligned", "continuous"] = field(
        default="aligned",
        metadata={
            "help": "How training rows are cut: aligned, each begins with a document and its end cuts one; or "
            "continuous, out of all documents one after the other, each token once an epoch."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the corpus while training, storing nothing: for corpora larger than the disk. "
            "Needs --max_steps."
        },
    )
    streaming_sample: Annotated[int, COUNT] = field(
        default=10_000,
        metadata={
            "help": "Documents that --streaming reads beforehand: those of them that are held out make the "
            "evaluation, the others train the tokenizer where none is given."
        },
    )
    shuffle_characters: Annotated[int, COUNT] = field(
        default=1 << 24, metadata={"help": "--streaming shuffles documents in blocks of this many characters."}
    )
    cache_dir: str = field(
        default=os.path.join(HF_HOME, "hf_minigpt"), metadata={"help": "Where tokenized corpora are kept."}
    )

    def __post_init__(self):
        check_arguments(self)
        self.cache_dir = os.path.expanduser(self.cache_dir)


@dataclass
class PlanArguments:
    plan: bool = field(
        default=False, metadata={"help": "Print what the run would take (size, tokens, memory, FLOPs, time) and stop."}
    )
    price_per_hour: Annotated[float | None, NOT_NEGATIVE] = field(
        default=None, metadata={"help": "Price of one device for an hour: --plan then tells what the run costs."}
    )
    flops_per_second: Annotated[float | None, POSITIVE] = field(
        default=None,
        metadata={
            "help": "Sustained rate of one device for --plan (an H100 at 40 percent of its peak in bf16: 4e14). "
            "Default: 40 percent of what a large matrix product reaches here."
        },
    )

    def __post_init__(self):
        check_arguments(self)


# What --help says of the fields whose defaults change
HELP = {f.name: f.metadata for f in dataclasses.fields(TrainingArguments)}


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with what they lack for every recipe: the optimizer, the precision, the CPU's threads.

    `precision="auto"` is bf16 where the GPU computes in it, fp16 with a loss scaler on older ones, fp32 on a CPU, and
    TF32 for what stays fp32; `--bf16`, `--fp16` and `--tf32` win.
    """

    CONDITIONS: ClassVar[dict[str, tuple[Condition, ...]]] = TRAINER_CONDITIONS
    # what an evaluation of the job yields: whether more is better
    METRICS: ClassVar[dict[str, bool]] = {}

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "AdamW's learning rate. Default: 8e-3 beside Muon, where it is that of the head, norms and "
            "biases; else 1e-3."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(default="warmup_stable_decay", metadata=HELP["lr_scheduler_type"])
    logging_steps: float = field(default=0.01, metadata=HELP["logging_steps"])
    logging_first_step: bool = field(default=True, metadata=HELP["logging_first_step"])
    logging_nan_inf_filter: bool = field(default=False, metadata=HELP["logging_nan_inf_filter"])
    report_to: str | None = field(default="none", metadata=HELP["report_to"])
    # every parameter has a part in the loss
    ddp_find_unused_parameters: bool | None = field(default=False, metadata=HELP["ddp_find_unused_parameters"])
    # the rows are tensors already, and the model takes more than its forward names, through **kwargs
    remove_unused_columns: bool = field(default=False, metadata=HELP["remove_unused_columns"])

    optimizer: Literal["muon", "adamw", "trainer"] = field(
        default="muon",
        metadata={
            "help": "muon: Muon for the matrices of the blocks, AdamW for the rest; adamw; trainer: what --optim says."
        },
    )
    matrix_learning_rate: Annotated[float, RATE] = field(
        default=0.01, metadata={"help": "Learning rate of Muon's matrices."}
    )
    embedding_learning_rate: Annotated[float | None, RATE] = field(
        default=None,
        metadata={
            "help": "Learning rate of the embeddings beside Muon. Default: 0.3 of their initial standard deviation."
        },
    )
    muon_scaling: Literal["original", "moonlight"] = field(
        default="original",
        metadata={
            "help": "Size of Muon's update: sqrt(max(1, rows / columns)), or Moonlight's 0.2 sqrt(max(rows, "
            "columns)), with which matrix_learning_rate is of AdamW's size."
        },
    )
    decay_fraction: Annotated[float, Range(least=0, most=1)] = field(
        default=1.0,
        metadata={"help": "Share of the steps in which warmup_stable_decay goes down, linearly, to zero."},
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = field(
        default="auto", metadata={"help": "auto: bf16 where the GPU has it, fp16 where not, fp32 on a CPU."}
    )
    allow_changed_run: bool = field(
        default=False,
        metadata={"help": "Resume even if data, batch size or other settings are not what they were."},
    )
    cpu_threads: Annotated[int | None, THREADS] = field(
        default=None, metadata={"help": "Torch's threads on a CPU. Default: cores over the processes here."}
    )

    def __post_init__(self):
        check_arguments(self)
        if self.optimizer != "trainer" and OptimizerNames(self.optim) != OptimizerNames(DEFAULT_OPTIM):
            raise ValueError(
                f"optim={self.optim!r} is read only with optimizer='trainer', not with {self.optimizer!r}. Set "
                "--optimizer trainer, or leave out --optim."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would take columns from the batches that the model reads. Leave it out."
            )
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=True: workers that outlive an epoch never see the next one's order of "
                "the documents. Leave it out."
            )
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError(
                "save_strategy='best' without metric_for_best_model: name what is best, "
                f"--metric_for_best_model {next(iter(self.METRICS), 'loss')} for instance."
            )
        if self.learning_rate is None:
            self.learning_rate = 8e-3 if self.optimizer == "muon" else 1e-3
        self._choose_precision()
        if not torch.accelerator.is_available() and not self.bf16:
            # without it, two processes of torchrun on a CPU would each train alone, unaware of the other
            self.use_cpu = True
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.METRICS.get(self.metric_for_best_model.removeprefix("eval_"))
        super().__post_init__()
        self._try_schedule_and_optimizer()

    def _try_schedule_and_optimizer(self) -> None:
        """What the Trainer would make of the flags only once the corpus is tokenized."""
        num_steps = self.max_steps if self.max_steps > 0 else 1000
        stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        kwargs = self.scheduler_kwargs(num_steps)
        try:
            get_scheduler(self.lr_scheduler_type, stand_in, self.get_warmup_steps(num_steps), num_steps, kwargs)
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(
                f"lr_scheduler_type={_plain(self.lr_scheduler_type)!r} with lr_scheduler_kwargs={kwargs}: "
                f"{_first_line(error)}. Give what it takes by --lr_scheduler_kwargs, or choose another."
            ) from error
        if self.optimizer == "trainer":
            # here, not above: scripts that only generate read this module too
            from transformers import Trainer

            try:
                Trainer.get_optimizer_cls_and_kwargs(self)
            except (ImportError, RuntimeError, ValueError) as error:
                # some ask for the model, which comes later
                if "model" not in str(error).lower():
                    raise ValueError(
                        f"optim={_plain(self.optim)!r} with optim_args={self.optim_args!r} cannot be used here: "
                        f"{_first_line(error)}. Choose another, or leave out --optim."
                    ) from error

    def __getstate__(self) -> dict[str, Any]:
        # pickled beside every checkpoint, and pushed with it
        return self.__dict__ | {"hub_token": None}

    def _choose_precision(self) -> None:
        if self.precision != "auto" and (self.bf16 or self.fp16):
            raise ValueError(
                f"precision={self.precision!r} with bf16={self.bf16}, fp16={self.fp16}: leave out one of the two."
            )
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.precision != "auto":
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        elif on_gpu and not self.bf16 and not self.fp16:
            # torch also says yes to bf16 where it would be emulated, at a crawl (Turing)
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = not self.bf16
        if self.tf32 is None and on_gpu and is_torch_tf32_available():
            self.tf32 = True

    def scheduler_kwargs(self, num_steps: int) -> dict[str, Any]:
        """`lr_scheduler_kwargs`, with `decay_fraction` made the absolute number that warmup_stable_decay wants."""
        kwargs = self.lr_scheduler_kwargs or {}
        assert isinstance(kwargs, dict)
        if self.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
            return kwargs
        if self.get_warmup_steps(num_steps) > num_steps:
            logger.warning(
                "warmup_steps=%s is more than the %s steps of this run, which never reaches its learning rate.",
                self.warmup_steps,
                num_steps,
            )
            return {"num_decay_steps": 0, "decay_type": "linear"} | kwargs
        num_decay_steps = min(round(self.decay_fraction * num_steps), num_steps - self.get_warmup_steps(num_steps))
        return {"num_decay_steps": num_decay_steps, "decay_type": "linear"} | kwargs

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def describe_hardware(self) -> str:
        """One line: devices and precision."""
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
    """`RecipeArguments` with what pretraining and instruction finetuning share."""

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
        metadata={"help": "Held-out rows that evaluations during training read; the one at the end reads all."},
    )

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: the Trainer smooths over full logits and "
                "shifts labels itself; these rows come with shifted labels, and no logits are built. Leave it out."
            )
        super().__post_init__()


@dataclass
class PretrainArguments(LanguageModelArguments):
    """`LanguageModelArguments` with defaults for pretraining."""

    output_dir: str | None = field(default="runs/pretrain", metadata=HELP["output_dir"])
    weight_decay: float = field(default=0.0, metadata=HELP["weight_decay"])
    adam_beta1: float = field(default=0.8, metadata=HELP["adam_beta1"])
    adam_epsilon: float = field(default=1e-10, metadata=HELP["adam_epsilon"])
    adam_beta2: float = field(default=0.95, metadata=HELP["adam_beta2"])
    warmup_steps: float = field(default=0.02, metadata=HELP["warmup_steps"])
    eval_steps: float | None = field(default=0.1, metadata=HELP["eval_steps"])


def parse(
    dataclass_types: Sequence[Any],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple:
    """Read flags into dataclasses.

    `--config FILE.yaml` gives values, flags override them. A key or flag that no dataclass has ends the program with
    a message that names it and the nearest one that exists. Values are checked as `hf_minigpt.flags` says.
    From then on the program can print any character.

    Args:
        dataclass_types: every field is a flag.
        argv: default `sys.argv[1:]`.
        defaults: values, by field, that go before the dataclasses' own and behind the file's and the flags'.

    Returns:
        One object for each dataclass.

    Raises:
        ValueError: a value that a flag cannot have, alone or beside the others.
    """
    allow_any_output()
    parser = HfArgumentParser(
        dataclass_types,
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]   (--help lists the flags)",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with values for the flags below; flags override it.")
    parser.set_defaults(**(defaults or {}))
    known = [f.name for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type) if f.init]

    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        parser.error(f"unknown flag {unknown[0]}.{_renamed(name, known, '--') or did_you_mean(name, known, '--')}")
    flags: list[str] = []
    if namespace.config is not None:
        flags = _flags_of(_read_yaml(namespace.config, known, parser), parser)
    given = list(sys.argv[1:] if argv is None else argv)
    check_flags(dataclass_types, vars(parser.parse_args(flags + given)))
    *parsed, _ = parser.parse_args_into_dataclasses(flags + given, look_for_args_file=False)
    return tuple(parsed)


# Old names of flags, so that commands and YAML files of earlier versions fail with a remedy
RENAMED = {
    "held_out_fraction": "validation_fraction",
    "max_documents": "max_examples",
    "max_records": "max_examples",
    "max_train_examples": "max_examples",
    "max_length": "context_length",
    "dataset_split": "train_split",
    "max_lost": "max_lost_fraction",
    "pretraining_share": "pretraining_fraction",
    "adversarial_share": "adversarial_epsilon",
    "lora_r": "lora_rank",
    "lora": "lora_rank",
}


def _renamed(name: str, known: list[str], prefix: str = "") -> str:
    """The sentence that names the new name of an old flag; empty if there is none."""
    new = RENAMED.get(name)
    return f" It is called {prefix}{new} now." if new in known else ""


def _read_yaml(path: str, known: list[str], parser: HfArgumentParser) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must be a mapping of flags to values.")
    for key in values:
        if key not in known:
            remedy = _renamed(str(key), known) or did_you_mean(str(key), known)
            parser.error(f"--config {path}: unknown key {key!r}.{remedy}")
    return values


def _flags_of(values: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """YAML values as flags, so that both are checked and converted alike."""
    flags = []
    for key, value in values.items():
        if value is None:
            parser.set_defaults(**{key: None})
        elif key == "config_overrides" and isinstance(value, dict):
            # a string goes as it is: YAML 1.1 takes 1e-6 for one
            items = {name: item if isinstance(item, str) else json.dumps(item) for name, item in value.items()}
            flags += [f"--{key}", *(f"{name}={item}" for name, item in items.items())]
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
