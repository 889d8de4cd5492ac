"""The arguments of pretraining, and of the plan that is printed before it."""

from dataclasses import dataclass, field
from typing import Annotated

from ..flags import NOT_NEGATIVE, POSITIVE, check_arguments
from ..training.arguments import HELP, LanguageModelArguments


@dataclass
class PlanArguments:
    """Arguments of `--plan`."""

    plan: bool = field(
        default=False,
        metadata={"help": "Print the estimated size, tokens, memory, FLOPs and time of the run, and exit."},
    )
    price_per_hour: Annotated[float | None, NOT_NEGATIVE] = field(
        default=None, metadata={"help": "Price of one device per hour. --plan then prints the cost of the run."}
    )
    flops_per_second: Annotated[float | None, POSITIVE] = field(
        default=None,
        metadata={
            "help": "Sustained FLOP/s of one device, for --plan (4e14 for an H100 at 40 percent of its peak in bf16). "
            "Default: 40 percent of the measured rate of a large matrix product."
        },
    )

    def __post_init__(self):
        check_arguments(self)


@dataclass
class PretrainArguments(LanguageModelArguments):
    """`LanguageModelArguments` with the defaults of pretraining."""

    output_dir: str | None = field(default="runs/pretrain", metadata=HELP["output_dir"])
    weight_decay: float = field(default=0.0, metadata=HELP["weight_decay"])
    adam_beta1: float = field(default=0.8, metadata=HELP["adam_beta1"])
    adam_epsilon: float = field(default=1e-10, metadata=HELP["adam_epsilon"])
    adam_beta2: float = field(default=0.95, metadata=HELP["adam_beta2"])
    warmup_steps: float = field(default=0.02, metadata=HELP["warmup_steps"])
    eval_steps: float | None = field(default=0.1, metadata=HELP["eval_steps"])
