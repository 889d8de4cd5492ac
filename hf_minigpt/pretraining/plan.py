"""Estimates the size, memory, time and cost of a run before it starts."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..data.rows import ShuffledDocumentRows
from ..data.token_store import PreparedCorpus
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.loss_minigpt import CHUNK_ELEMENTS, MIN_CHUNK_ROWS
from ..presets import preset
from ..training.arguments import DataArguments, ModelArguments
from ..training.flops import flops_per_token, measure_flops_per_second
from ..training.loading import build_config, context_length, trained_vocab_size
from ..training.optimizers import MuonAdamW, hidden_matrices
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
        memory_bytes: peak memory on one device, for weights, gradients, optimizer state and activations.
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
        memory_bytes=_peak_bytes(model, config, args, context_length),
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


def _peak_bytes(model: nn.Module, config: MiniGPTConfig, args: PretrainArguments, context_length: int) -> float:
    """Estimate the peak memory of a training step on one device, with fused attention and the loss without logits.

    It is reached in the head, when all activations are kept; with checkpointing also in the backward pass of a block;
    or in the optimizer's step.
    """
    assert config.head_dim is not None and config.intermediate_size is not None
    tokens = args.train_batch_size * context_length
    width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    in_half = args.bf16 or args.fp16
    # of a number in the matrix products. The residual stream, weights, gradients and moments are in float32.
    size = 2 if in_half else 4
    num_parameters = sum(p.numel() for p in model.parameters())
    matrices = hidden_matrices(model)
    num_in_blocks = sum(p.numel() for p in matrices.values())
    uses_muon = args.optimizer == "muon"
    # weights, and two moments for AdamW or one for Muon
    resident = 12 * num_parameters - (4 * num_in_blocks if uses_muon else 0)
    gradients = 4 * num_parameters

    # What a block keeps of a token: the inputs of its norms; those of the linear layers, which autocast copies for
    # each layer; queries, keys, values and output; queries and keys before their norm, in float32; the input and the
    # output of the activation, of which ReLU needs only one; the masks of dropout.
    in_block = 2 * 4 * width + (4 * 2 * width if in_half else 2 * 4 * width)
    in_block += 4 * size * inner + (2 * 4 * inner if config.qk_norm else 0)
    in_block += (1 if config.hidden_act == "relu" else 2) * size * config.intermediate_size
    in_block += 2 * width if config.resid_pdrop > 0 else 0
    # the input of the embedding's norm, its mask of dropout, the input of the last norm, the head's input and gradient
    outside = (4 * width if config.embedding_norm else 0) + (width if config.embd_pdrop > 0 else 0) + 3 * 4 * width
    # transformers before 5.23 has only the old name
    checkpoints = getattr(args, "activation_checkpointing", args.gradient_checkpointing)
    kept = tokens * (config.num_hidden_layers * (4 * width if checkpoints else in_block) + outside)
    kept += gradients if args.gradient_accumulation_steps > 1 else 0

    # the head's gradient; under autocast also its weight and a chunk's gradient; a chunk of logits
    table = 4 * config.vocab_size * width
    num_elements = CHUNK_ELEMENTS.get(args.device.type, CHUNK_ELEMENTS["cuda"])
    chunk_rows = min(max(num_elements * 4 // size // config.vocab_size, MIN_CHUNK_ROWS), tokens)
    in_head = table + (table if in_half else 0) + chunk_rows * config.vocab_size * size
    # autocast's copies of the blocks' weights
    copies = 2 * num_in_blocks if in_half else 0
    forward = kept + copies + in_head
    backward = 0
    if checkpoints:
        # the topmost block's activations, and the gradients of its activation function, instead of the head's input
        backward = kept + table + tokens * (in_block + size * config.intermediate_size - 4 * width)
    stacks = Counter[torch.Size]()
    for parameter in matrices.values() if uses_muon else ():
        stacks[parameter.shape] += 4 * parameter.numel()
    # updates and temporary results of the matrices that Muon orthogonalizes at once
    in_step = gradients + 4 * min(max(stacks.values(), default=0), MuonAdamW.max_stack_bytes)
    return resident + max(forward, backward, in_step)
