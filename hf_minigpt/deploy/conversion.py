"""
Convert GPT-1, GPT-2, nanoGPT and NanoChat checkpoints to MiniGPT, and MiniGPT to GPT-2 and NanoChat.

Parameters are only renamed, transposed, split and concatenated, so GPT-2 -> MiniGPT -> GPT-2 returns the same bits. If
the target cannot express a field of the config, the error names it. `compare_logits` checks a conversion.

    from hf_minigpt.deploy.conversion import compare_logits, from_gpt2, to_gpt2

    model = from_gpt2("openai-community/gpt2")
    assert compare_logits(model, to_gpt2(model)) < 1e-3
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    NanoChatConfig,
    NanoChatForCausalLM,
    NanoChatModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from ..adapters import is_adapter
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel


PathOrName = str | PathLike[str]
Source = PreTrainedModel | PathOrName
State = dict[str, torch.Tensor]
Heads = dict[type[PreTrainedModel], type[PreTrainedModel]]

# Largest difference of logits that rounding explains, also for logits in the hundreds
MAX_DIFFERENCE = 1e-2

# Source class -> target class with the same head
GPT2_HEADS: Heads = {
    GPT2LMHeadModel: MiniGPTForCausalLM,
    GPT2ForSequenceClassification: MiniGPTForSequenceClassification,
    GPT2Model: MiniGPTModel,
}
GPT1_HEADS: Heads = {
    OpenAIGPTLMHeadModel: MiniGPTForCausalLM,
    OpenAIGPTForSequenceClassification: MiniGPTForSequenceClassification,
    OpenAIGPTModel: MiniGPTModel,
}
NANOCHAT_HEADS: Heads = {NanoChatForCausalLM: MiniGPTForCausalLM, NanoChatModel: MiniGPTModel}
MINIGPT_TO_GPT2: Heads = {ours: theirs for theirs, ours in GPT2_HEADS.items()}
MINIGPT_TO_NANOCHAT: Heads = {ours: theirs for theirs, ours in NANOCHAT_HEADS.items()}

HEAD_MODULES = ("lm_head", "score")
# Module of a GPT-1, GPT-2 or nanoGPT block -> MiniGPT modules that it concatenates
BLOCK_MODULES = {
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
# Shape (in, out) in GPT-1 and GPT-2, (out, in) in nanoGPT and MiniGPT
CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
GPT1_EMBEDDINGS = ("tokens_embed", "positions_embed")
GPT2_EMBEDDINGS = ("wte", "wpe")
NANOCHAT_MODULES = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}

# GPT-1's "gelu" is the tanh approximation.
GPT1_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}

SHARED_FIELDS = (
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
)
GPT_FIELDS = ("layer_norm_epsilon", "embd_pdrop", "attn_pdrop", "resid_pdrop")

# Field -> value that the target requires
GPT2_SOURCE_REQUIRES = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
GPT2_REQUIRES = {
    "norm_type": "layernorm",
    "norm_placement": "pre",
    "embedding_norm": False,
    "residual": True,
    "position_embedding_type": "learned",
    "qk_norm": False,
    "head_mask": None,
}
NANOCHAT_REQUIRES = {
    "norm_type": "rmsnorm",
    "norm_affine": False,
    "norm_placement": "pre",
    "embedding_norm": True,
    "residual": True,
    "position_embedding_type": "rope",
    "qk_norm": True,
    "mlp_bias": False,
    "head_mask": None,
}
HEAD_REQUIRES: dict[type[PreTrainedModel], dict[str, Any]] = {
    GPT2LMHeadModel: {"lm_head_bias": False, "final_logit_softcapping": None},
    GPT2ForSequenceClassification: {"pooling": "last", "auxiliary_lm_weight": 0},
    GPT2Model: {},
    NanoChatForCausalLM: {"lm_head_bias": False},
    NanoChatModel: {},
}


def from_gpt2(source: Source, **overrides: Any) -> PreTrainedModel:
    """
    Convert a GPT-2 (Radford et al., 2019) to MiniGPT, with its head, labels, token ids and dtype.

    `reorder_and_upcast_attn` is ignored: it only changes the precision of eager attention.

    Args:
        source: a `GPT2LMHeadModel`, `GPT2ForSequenceClassification` or `GPT2Model`, a folder, or a Hub name. A model
            is not changed, and shares no memory with the result.
        overrides: fields of `MiniGPTConfig` that replace the converted ones (dropout, `pad_token_id`, ...).

    Returns:
        The MiniGPT class with the source's head, on the source's device, in evaluation mode.

    Raises:
        ValueError: MiniGPT cannot express the source's class or config, or an override is not a field.
    """
    model, minigpt_class = load_source(source, GPT2_HEADS)
    config = model.config
    _check_fields(config, GPT2_SOURCE_REQUIRES, "MiniGPT cannot express this. Use the model with transformers' class.")
    fields = _copy_fields(config, *GPT_FIELDS, "use_cache") | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "hidden_act": config.activation_function,
        "attention_scaling": None if config.scale_attn_weights else 1.0,
    }
    state = _gpt_to_minigpt(_parameters(model), _gpt_modules(config.n_layer, GPT2_EMBEDDINGS))
    return _build_model(minigpt_class, _minigpt_config(fields, overrides), state, model)


def to_gpt2(source: Source) -> PreTrainedModel:
    """
    Convert a MiniGPT to transformers' GPT-2, with its head, labels, token ids and dtype.

    Missing biases become zeros and missing norm weights ones. Padding rows of the embedding table, from
    `unpadded_vocab_size`, are removed, because GPT-2 cannot mask them.

    Args:
        source: a MiniGPT with or without a head, a folder, or a Hub name.

    Raises:
        ValueError: GPT-2 cannot express the config; the message lists the fields.
    """
    model, gpt2_class = load_source(source, MINIGPT_TO_GPT2)
    config = model.config
    also = []
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        also.append(f"head_dim={config.head_dim} (needs hidden_size / num_attention_heads)")
    if config.attention_scaling not in (None, 1.0, config.head_dim**-0.5):
        also.append(f"attention_scaling={config.attention_scaling} (needs None or 1.0)")
    remedy = "Publish it as a MiniGPT with its code, or train from preset('gpt2') to export it."
    _check_fields(config, GPT2_REQUIRES | HEAD_REQUIRES[gpt2_class], remedy, also)
    gpt2_config = GPT2Config(
        **_copy_fields(config, *GPT_FIELDS, "use_cache"),
        vocab_size=num_model_ids(config),
        n_embd=config.hidden_size,
        n_inner=config.intermediate_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        activation_function=config.hidden_act,
        scale_attn_weights=config.attention_scaling in (None, config.head_dim**-0.5),
    )
    state = _minigpt_to_gpt2(_remove_padding_rows(_parameters(model), config), config.num_hidden_layers)
    return _build_model(gpt2_class, gpt2_config, state, model)


def from_gpt1(source: Source, **overrides: Any) -> PreTrainedModel:
    """
    Convert an OpenAI GPT (Radford et al., 2018) to MiniGPT, with its head, labels, token ids and dtype.

    Args:
        source: an `OpenAIGPTLMHeadModel`, `OpenAIGPTForSequenceClassification` or `OpenAIGPTModel`, a folder, or a
            Hub name.
        overrides: as for `from_gpt2`.

    Raises:
        ValueError: MiniGPT cannot express the source's class, or an override is not a field.
    """
    model, minigpt_class = load_source(source, GPT1_HEADS)
    config = model.config
    fields = _copy_fields(config, *GPT_FIELDS) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "hidden_act": GPT1_ACTIVATIONS[config.afn],
        "norm_placement": "post",
        "residual_init": "normal",
    }
    state = _gpt_to_minigpt(_parameters(model), _gpt_modules(config.n_layer, GPT1_EMBEDDINGS))
    return _build_model(minigpt_class, _minigpt_config(fields, overrides), state, model)


def from_nanogpt(source: PathOrName, **overrides: Any) -> PreTrainedModel:
    """
    Convert a nanoGPT checkpoint (github.com/karpathy/nanoGPT) to MiniGPT.

    The file names neither a tokenizer nor an end-of-text token. For GPT-2's, set `unpadded_vocab_size=50257` and
    `eos_token_id=50256`. If nanoGPT's norms have no bias, MiniGPT's have a zero bias, which further training changes.

    Args:
        source: `ckpt.pt` or its folder; loaded without unpickling code.
        overrides: as for `from_gpt2`. Checkpoints of nanoGPT's first months need `hidden_act="gelu_new"`, the tanh
            approximation of GELU.

    Raises:
        ValueError: the file is missing or is not a nanoGPT checkpoint, or an override is not a field.
    """
    model_args, state = _read_nanogpt(source)
    # The first checkpoints lack the entry, and always have biases.
    biased = model_args.get("bias", True)
    fields = _nanogpt_fields(model_args) | {"qkv_bias": biased, "attention_out_bias": biased, "mlp_bias": biased}
    state = _gpt_to_minigpt(state, _gpt_modules(model_args["n_layer"], GPT2_EMBEDDINGS), conv1d=False)
    return _build_model(MiniGPTForCausalLM, _minigpt_config(fields, overrides), state)


def nanogpt_as_gpt2(source: PathOrName) -> PreTrainedModel:
    """Load a nanoGPT checkpoint as transformers' `GPT2LMHeadModel`, as a reference for `from_nanogpt`."""
    model_args, state = _read_nanogpt(source)
    state = {name: tensor.t() if name.endswith(CONV1D_WEIGHTS) else tensor for name, tensor in state.items()}
    return _build_model(GPT2LMHeadModel, GPT2Config(**_nanogpt_fields(model_args)), state)


def from_nanochat(source: Source, **overrides: Any) -> PreTrainedModel:
    """
    Convert a NanoChat (github.com/karpathy/nanochat) to MiniGPT, with its token ids and dtype.

    NanoChat rotates queries and keys in the opposite direction to Llama and MiniGPT, so the two halves of each head
    are swapped.

    Args:
        source: a `NanoChatForCausalLM` or `NanoChatModel`, a folder, or a Hub name.
        overrides: as for `from_gpt2`.

    Raises:
        ValueError: the model has grouped key-value heads, MiniGPT cannot express its class, or an override is not a
            field.
    """
    model, minigpt_class = load_source(source, NANOCHAT_HEADS)
    config = model.config
    remedy = "MiniGPT has no grouped key-value heads. Use the model with transformers' class."
    _check_fields(config, {"num_key_value_heads": config.num_attention_heads}, remedy)
    # NanoChatConfig does not declare head_dim, but NanoChat reads it.
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    rope_parameters = copy.deepcopy(config.rope_parameters)
    if rope_parameters.get("rope_type", "default") == "default":
        # NanoChat ignores this field.
        rope_parameters.pop("partial_rotary_factor", None)
    fields = _copy_fields(config, "use_cache") | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "norm_type": "rmsnorm",
        "norm_affine": False,
        "layer_norm_epsilon": config.rms_norm_eps,
        "embedding_norm": True,
        "position_embedding_type": "rope",
        "rope_parameters": rope_parameters,
        "qk_norm": True,
        "qkv_bias": config.attention_bias,
        "attention_out_bias": config.attention_bias,
        "mlp_bias": False,
        "final_logit_softcapping": config.final_logit_softcapping,
        "embd_pdrop": 0.0,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": 0.0,
    }
    state = _rename_modules(_swap_head_halves(_parameters(model), head_dim), NANOCHAT_MODULES)
    return _build_model(minigpt_class, _minigpt_config(fields, overrides), state, model)


def to_nanochat(source: Source) -> PreTrainedModel:
    """
    Convert a MiniGPT to transformers' NanoChat, with its token ids and dtype.

    Missing biases and padded embedding tables are handled as in `to_gpt2`. Dropout outside attention, which NanoChat
    lacks, is dropped.

    Args:
        source: a MiniGPT language model or a model without a head, a folder, or a Hub name.

    Raises:
        ValueError: NanoChat cannot express the config; the message lists the fields.
    """
    model, nanochat_class = load_source(source, MINIGPT_TO_NANOCHAT)
    config = model.config
    also = []
    if config.attention_scaling not in (None, config.head_dim**-0.5):
        also.append(f"attention_scaling={config.attention_scaling} (needs None)")
    share = config.rope_parameters.get("partial_rotary_factor", 1.0) if config.rope_parameters else 1.0
    if share != 1:
        also.append(f"rope_parameters with partial_rotary_factor={share} (needs 1)")
    remedy = "Publish it as a MiniGPT with its code, or train from a minigpt-* preset to export it."
    _check_fields(config, NANOCHAT_REQUIRES | HEAD_REQUIRES[nanochat_class], remedy, also)
    nanochat_config = NanoChatConfig(
        **_copy_fields(config, "use_cache", "head_dim"),
        vocab_size=num_model_ids(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        attention_dropout=config.attn_pdrop,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters=copy.deepcopy(config.rope_parameters),
        final_logit_softcapping=config.final_logit_softcapping,
        attention_bias=config.qkv_bias or config.attention_out_bias,
    )
    state = _swap_head_halves(_remove_padding_rows(_parameters(model), config), config.head_dim)
    state = _rename_modules(state, {ours: theirs for theirs, ours in NANOCHAT_MODULES.items()})
    return _build_model(nanochat_class, nanochat_config, state, model)


@torch.no_grad()
def compare_logits(
    one: PreTrainedModel, other: PreTrainedModel, *, num_rows: int = 2, num_tokens: int = 64, seed: int = 0
) -> float:
    """
    Return the largest absolute difference between the logits of two models in fp32, or of their hidden states if they
    have no head.

    Both read the same rows of random ids. Ids from `unpadded_vocab_size`, which MiniGPT masks, are not compared.

    Args:
        num_rows: number of rows.
        num_tokens: length of a row, truncated to the shorter context of the two models.
        seed: random seed of the ids.
    """
    configs = (one.config, other.config)
    num_ids = min(num_model_ids(config) for config in configs)
    length = min(num_tokens, *(config.max_position_embeddings for config in configs))
    # A GPT-2 classifier treats trailing padding ids as padding, so do not draw them.
    drawn = torch.tensor([i for i in range(num_ids) if i not in [config.pad_token_id for config in configs]])
    rows = drawn[torch.randint(len(drawn), (num_rows, 1, length), generator=torch.Generator().manual_seed(seed))]
    # One model after the other, because a half-precision model is copied to fp32.
    pairs = zip(*([*_outputs(model, rows, num_ids)] for model in (one, other)), strict=True)
    # Unlike Python's max, torch's returns NaN if any value is NaN.
    return torch.stack([(mine - others).abs().max() for mine, others in pairs]).max().item()


def _outputs(model: PreTrainedModel, rows: torch.Tensor, num_ids: int) -> Iterator[torch.Tensor]:
    """Yield the logits or hidden states of each row of ids (N, 1, T), in fp32 on the CPU."""
    if model.training or model.dtype != torch.float32:
        model = copy.deepcopy(model).float().eval()
    for input_ids in rows.to(model.device):
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        if "logits" not in output:
            yield output.last_hidden_state.cpu()
        else:
            # (1, T, V) for a language model, (1, num_labels) for a classifier
            yield output.logits[..., :num_ids].cpu() if output.logits.dim() == 3 else output.logits.cpu()


def detect_layout(source: PathOrName) -> str:
    """
    Return the format of a checkpoint on disk or on the Hub: a key of `FROM`, or "minigpt".

    Raises:
        ValueError: the format cannot be converted.
    """
    path = Path(source)
    if path.suffix == ".pt" or (path / "ckpt.pt").is_file():
        return "nanogpt"
    if is_adapter(path):
        raise ValueError(
            f"{source} is an adapter. Merge it into its base model first, with `hf_minigpt.adapters.save_merged("
            f"{str(source)!r}, folder)`."
        )
    model_type = AutoConfig.from_pretrained(source).model_type
    layouts = {"gpt2": "gpt2", "openai-gpt": "gpt1", "nanochat": "nanochat", "minigpt": "minigpt"}
    if model_type not in layouts:
        raise ValueError(
            f"{source} has model_type={model_type!r}, which cannot be converted. Give a checkpoint of type "
            f"{', '.join(layouts)}, or nanoGPT's ckpt.pt."
        )
    return layouts[model_type]


def load_source(source: Source, heads: Heads) -> tuple[PreTrainedModel, type[PreTrainedModel]]:
    """
    Load a model for a conversion.

    Args:
        source: a model, a folder, or a Hub name.
        heads: source class -> target class.

    Returns:
        The model, and the class to convert it to.

    Raises:
        ValueError: the model's class is not in `heads`.
    """
    if isinstance(source, PreTrainedModel):
        name = type(source).__name__
    else:
        config = AutoConfig.from_pretrained(source)
        # A config without architectures is a language model, the first entry of every table.
        name = config.architectures[0] if config.architectures else next(iter(heads)).__name__
    # Compare names: a MiniGPT loaded with the code on the Hub has a different class object.
    by_name = {source_class.__name__: source_class for source_class in heads}
    if name not in by_name:
        raise ValueError(
            f"{name} cannot be converted. Load the checkpoint with one of these classes, which drop another head: "
            f"{', '.join(by_name)}."
        )
    model = source if isinstance(source, PreTrainedModel) else by_name[name].from_pretrained(source)
    return model, heads[by_name[name]]


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder or Hub name, or return None if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None
    # For a folder without tokenizer files, transformers returns an empty tokenizer of GPT-1's or GPT-2's class.
    return tokenizer if tokenizer.vocab_size > 1 else None


def num_model_ids(config: PreTrainedConfig) -> int:
    """Return the number of token ids of a model, without the padding rows of a MiniGPT's embedding table."""
    return getattr(config, "unpadded_vocab_size", None) or config.vocab_size


def _check_fields(config: PreTrainedConfig, required: dict[str, Any], remedy: str, also: Iterable[str] = ()) -> None:
    """Raise a ValueError that lists the fields without the required value, the empty layers, and `also`."""
    values = {name: getattr(config, name) for name in required}
    obstacles = [
        f"{name}={value!r} (needs {required[name]!r})" for name, value in values.items() if value != required[name]
    ]
    obstacles += [
        f"{name}=0 (needs at least 1)"
        for name in ("num_hidden_layers", "intermediate_size")
        if config.to_dict().get(config.attribute_map.get(name, name)) == 0
    ]
    obstacles += also
    if obstacles:
        raise ValueError(f"Cannot convert a {config.model_type} with {', '.join(obstacles)}. {remedy}")


def _copy_fields(config: PreTrainedConfig, *more: str) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS + more}


def _minigpt_config(fields: dict[str, Any], overrides: dict[str, Any]) -> MiniGPTConfig:
    known = MiniGPTConfig.__dataclass_fields__.keys() | MiniGPTConfig.attribute_map.keys()
    unknown = overrides.keys() - known
    if unknown:
        raise ValueError(f"MiniGPTConfig has no field {', '.join(sorted(unknown))}. Its docstring lists the fields.")
    return MiniGPTConfig(**(fields | overrides))


def _parameters(model: PreTrainedModel) -> State:
    """Return the parameters, with the names of the model without a head."""
    prefix = model.base_model_prefix + "."
    return {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}


def _build_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: State,
    source: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Build a model from copies of parameters with the names of `_parameters`, and the source's generation config."""
    with no_init_weights():
        model = model_class(config)
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    state = {name if name.startswith(HEAD_MODULES) else prefix + name: tensor for name, tensor in state.items()}
    expected = model.state_dict()
    # Only a classifier's auxiliary language-model head may be left over.
    assert all(name.startswith("lm_head.") for name in state.keys() - expected.keys())

    example = next(iter(state.values()))
    copies = {}
    for name, tensor in expected.items():
        if name in state:
            copies[name] = state[name].detach().clone(memory_format=torch.contiguous_format)
        elif tensor.dim() == 1:
            # A missing bias becomes 0, a missing norm weight 1.
            fill_value = float(name.endswith("weight"))
            copies[name] = torch.full_like(tensor, fill_value, dtype=example.dtype, device=example.device)
        elif name not in model.all_tied_weights_keys:
            raise ValueError(f"The source has no parameters for {name}. Remove the override that requires them.")
    # assign=True keeps the source's dtype for parameters and fp32 for rotary frequencies.
    model.load_state_dict(copies, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = example.dtype
    if source is not None and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(example.device).eval()  # type: ignore[arg-type]


def _gpt_modules(num_layers: int, embeddings: tuple[str, str]) -> dict[str, list[str]]:
    """Map every module of a GPT-1, GPT-2 or nanoGPT to the MiniGPT modules that it concatenates."""
    modules = {embeddings[0]: ["embed_tokens"], embeddings[1]: ["embed_positions"]}
    for layer in range(num_layers):
        for theirs, ours in BLOCK_MODULES.items():
            modules[f"h.{layer}.{theirs}"] = [f"layers.{layer}.{module}" for module in ours]
    return modules | {"ln_f": ["norm"]} | {head: [head] for head in HEAD_MODULES}


def _gpt_to_minigpt(state: State, modules: dict[str, list[str]], conv1d: bool = True) -> State:
    converted = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if conv1d and name.endswith(CONV1D_WEIGHTS):
            tensor = tensor.t()
        for ours, rows in zip(modules[module], tensor.chunk(len(modules[module])), strict=True):
            converted[f"{ours}.{kind}"] = rows
    return converted


def _minigpt_to_gpt2(state: State, num_layers: int) -> State:
    converted = {}
    for module, ours in _gpt_modules(num_layers, GPT2_EMBEDDINGS).items():
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                name = f"{module}.{kind}"
                tensor = torch.cat([state[f"{part}.{kind}"] for part in ours])
                converted[name] = tensor.t() if name.endswith(CONV1D_WEIGHTS) else tensor
    return converted


def _rename_modules(state: State, modules: dict[str, str]) -> State:
    for old, new in modules.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def _swap_head_halves(state: State, head_dim: int) -> State:
    """Swap the halves of each query and key head, which reverses the direction of their rotation."""
    swapped = dict(state)
    for name, tensor in state.items():
        if "q_proj." in name or "k_proj." in name:
            # (H, 2, D / 2) for a bias, (H, 2, D / 2, C) for a weight
            swapped[name] = tensor.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
    return swapped


def _remove_padding_rows(state: State, config: PreTrainedConfig) -> State:
    tables = ("embed_tokens.weight", "lm_head.weight")
    return {name: tensor[: num_model_ids(config)] if name in tables else tensor for name, tensor in state.items()}


def _read_nanogpt(source: PathOrName) -> tuple[dict[str, Any], State]:
    path = Path(source)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give nanoGPT's ckpt.pt or its folder.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(
            f"{path} has no entries 'model' and 'model_args'. Give a ckpt.pt written by nanoGPT's train.py."
        )
    # Names of a compiled model start with _orig_mod. Without flash attention the state includes the causal mask.
    state = {
        name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor
        for name, tensor in checkpoint["model"].items()
        if not name.endswith(".attn.bias")
    }
    return checkpoint["model_args"], state


def _nanogpt_fields(model_args: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that MiniGPTConfig and GPT2Config share."""
    dropout = model_args.get("dropout", 0.0)
    return {name: model_args[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | {
        "n_positions": model_args["block_size"],
        "activation_function": "gelu",
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "resid_pdrop": dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }


FROM: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": from_gpt2,
    "gpt1": from_gpt1,
    "nanogpt": from_nanogpt,
    "nanochat": from_nanochat,
}
