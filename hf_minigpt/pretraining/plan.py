"""Estimates the size, memory, time and cost of a run before it starts."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from ..data.rows import ShuffledDocumentRows
from ..data.token_store import PreparedCorpus
from ..model.configuration_minigpt import MiniGPTConfig
from ..presets import preset
from ..training.arguments import DataArguments, ModelArguments
from ..training.flops import flops_per_token, measure_flops_per_second
from ..training.loading import build_config, context_length, trained_vocab_size
from ..training.optimizers import hidden_matrices
from .arguments import PlanArguments, PretrainArguments
from .data import given_tokenizer, open_documents, prepare_data


# Fraction of the rate of a large matrix product that training reaches. nanoGPT and llm.c report 30 to 60% on A100 and
# H100.
UTILISATION = 0.4


@dataclass(frozen=True)
class Plan:
    """The estimates of a run.

    Attributes:
        num_parameters: number of parameters, with embeddings.
        tokens_per_step: tokens in one optimizer step, over all devices.
        num_steps: optimizer steps.
        num_tokens: tokens in the whole run.
        memory_bytes: memory on one device, for weights, gradients, optimizer state and activations.
        flops: floating-point operations of the whole run.
        flops_per_second: assumed rate, over all devices.
        price: cost of the run, or None without `price_per_hour`.
    """

    num_parameters: int
    tokens_per_step: int
    num_steps: int
    num_tokens: int
    memory_bytes: float
    flops: float
    flops_per_second: float
    price: float | None

    @property
    def seconds(self) -> float:
        return self.flops / self.flops_per_second

    def __str__(self) -> str:
        lines = [
            f"parameters        {self.num_parameters:,}",
            f"tokens per step   {self.tokens_per_step:,}",
            f"total tokens      {self.num_tokens:,} in {self.num_steps:,} steps "
            f"({self.num_tokens / self.num_parameters:.1f} per parameter)",
            f"memory, about     {self.memory_bytes / 2**30:.2f} GiB per device",
            f"FLOPs             {self.flops:.3g}",
            f"time, about       {_duration(self.seconds)} at {self.flops_per_second:.3g} FLOP/s, without evaluations",
        ]
        if self.price is not None:
            lines.append(f"price, about      {self.price:,.2f}")
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def make_plan(
    config: MiniGPTConfig, args: PretrainArguments, options: PlanArguments, context_length: int, rows_per_epoch: int
) -> Plan:
    """Estimate a run.

    Args:
        config: configuration of the model.
        args: arguments of the run.
        options: arguments of the plan.
        context_length: tokens in a row.
        rows_per_epoch: number of training rows, used only if `args.max_steps` is not set.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters = model.num_parameters()
    tokens_per_step = args.rows_per_step * context_length
    num_steps = args.max_steps
    if num_steps <= 0:
        num_steps = -(-int(rows_per_epoch * args.num_train_epochs) // args.rows_per_step)
    num_tokens = num_steps * tokens_per_step

    # weights, gradients, and two moments for AdamW or one for Muon, in float32
    num_in_muon = sum(p.numel() for p in hidden_matrices(model).values()) if args.optimizer == "muon" else 0
    state_bytes = 16 * num_parameters - 4 * num_in_muon
    flops = flops_per_token(config, num_parameters, context_length) * num_tokens
    in_half = args.bf16 or args.fp16
    rate = options.flops_per_second
    if rate is None:
        dtype = torch.float32 if not in_half else torch.bfloat16 if args.bf16 else torch.float16
        rate = UTILISATION * measure_flops_per_second(args.device, dtype)
    price = None
    if options.price_per_hour is not None:
        device_seconds = flops / rate
        price = options.price_per_hour * device_seconds / 3600
    return Plan(
        num_parameters=num_parameters,
        tokens_per_step=tokens_per_step,
        num_steps=num_steps,
        num_tokens=num_tokens,
        memory_bytes=state_bytes + _activation_bytes(config, args, context_length, 2 if in_half else 4),
        flops=flops,
        flops_per_second=rate * args.world_size,
        price=price,
    )


def plan_pretraining(
    model_args: ModelArguments, data_args: DataArguments, options: PlanArguments, args: PretrainArguments
) -> Plan:
    """Return the plan of `recipes/pretrain.py` with these flags.

    If the length of the run is given in epochs, the dataset is tokenized as in the run. Otherwise it is not read.
    """
    length = context_length(model_args)
    rows_per_epoch = 0
    if args.max_steps <= 0:
        tokenizer, corpus = prepare_data(model_args, data_args, open_documents(data_args))
        config = build_config(model_args, tokenizer)
        # streams require max_steps
        assert isinstance(corpus, PreparedCorpus)
        rows_per_epoch = len(ShuffledDocumentRows(corpus.train, length))
    elif model_args.tokenizer or model_args.model:
        config = build_config(model_args, given_tokenizer(model_args))
    else:
        fields = {"vocab_size": trained_vocab_size(model_args, data_args), "max_position_embeddings": length}
        config = preset(model_args.preset, **(model_args.overrides() | fields))
    return make_plan(config, args, options, length, rows_per_epoch)


def _activation_bytes(config: MiniGPTConfig, args: PretrainArguments, context_length: int, item_size: int) -> float:
    """Estimate the memory of the activations that the backward pass needs.

    Counts the tensors of a block without dropout and with fused attention (Korthikanti et al., arXiv 2205.05198), and
    one chunk of logits.
    """
    tokens = args.train_batch_size * context_length
    assert config.head_dim is not None and config.intermediate_size is not None
    inner = config.num_attention_heads * config.head_dim
    # inputs and outputs of two norms and the residual sums; queries, keys, values, output; inputs and outputs of the
    # activation
    kept_in_block = 6 * config.hidden_size + 5 * inner + 2 * config.intermediate_size
    blocks = config.num_hidden_layers * kept_in_block
    # transformers before 5.23 has only the old name
    if getattr(args, "activation_checkpointing", args.gradient_checkpointing):
        blocks = config.num_hidden_layers * config.hidden_size + kept_in_block
    # logits, their exponentials and gradient, in float32
    chunk = min(tokens * config.vocab_size, 2**27 if args.device.type == "cuda" else 2**23)
    return item_size * tokens * (blocks + 3 * config.hidden_size) + 3 * 4 * chunk
