"""
GPT-1, GPT-2, nanoGPT and NanoChat checkpoints into MiniGPT; MiniGPT into the layouts of GPT-2 and NanoChat.

Parameters are renamed, transposed, split, joined and copied, never computed, so that GPT-2 -> MiniGPT -> GPT-2 gives back
every bit. What the other side cannot express is refused by name. `compare_logits` is the proof of a conversion.

    from hf_minigpt.conversion import compare_logits, from_gpt2, to_gpt2

    model = from_gpt2("openai-community/gpt2")
    assert compare_logits(model, to_gpt2(model)) < 1e-3
"""

import copy
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
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
)
from transformers.initialization import no_init_weights

from .configuration_minigpt import MiniGPTConfig
from .modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel, MiniGPTPreTrainedModel


Source = PreTrainedModel | str | PathLike[str]
State = dict[str, torch.Tensor]
Heads = dict[type[PreTrainedModel], type[PreTrainedModel]]

# Each class with the one that has the same head on the other side.
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

# The modules of a GPT-1, GPT-2 or nanoGPT block, each with the MiniGPT modules whose rows it stacks.
BLOCK_MODULES = {
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
# Stored (in, out) by GPT-1 and GPT-2, (out, in) by nanoGPT and MiniGPT.
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc")
GPT1_EMBEDDINGS = ("tokens_embed", "positions_embed")
GPT2_EMBEDDINGS = ("wte", "wpe")

# OpenAIGPT's `gelu` is the tanh form.
GPT1_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}

CARRIED_FIELDS = (
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
    "dtype",
)
GPT_FIELDS = ("layer_norm_epsilon", "embd_pdrop", "attn_pdrop", "resid_pdrop")

# What a config must say to be expressed in the other layout; the sizes and the scale are checked beside it.
GPT2_NEEDS = {
    "norm_type": "layernorm",
    "norm_placement": "pre",
    "embedding_norm": False,
    "residual": True,
    "position_embedding_type": "learned",
    "qk_norm": False,
    "head_mask": None,
}
NANOCHAT_NEEDS = {
    "norm_type": "rmsnorm",
    "norm_affine": False,
    "norm_placement": "pre",
    "embedding_norm": True,
    "residual": True,
    "position_embedding_type": "rope",
    "qk_norm": True,
    "head_mask": None,
    "mlp_bias": False,
}
CLASSIFIER_NEEDS = {"pooling": "last", "auxiliary_lm_weight": 0}


def from_gpt2(source: Source, **overrides: Any) -> MiniGPTPreTrainedModel:
    """A MiniGPT with the parameters, head, labels, token ids and dtype of a GPT-2.

    Args:
        source: a `GPT2LMHeadModel`, `GPT2ForSequenceClassification` or `GPT2Model`; a folder; or a name on the Hub.
            It is left as it is, and shares no memory with the result.
        overrides: fields of `MiniGPTConfig` to set beside the converted ones (dropout, `pad_token_id`, ...).

    Returns:
        The MiniGPT class with the source's head, in evaluation mode. `reorder_and_upcast_attn`, a matter of precision
        that only eager attention looks at, is left behind.

    Raises:
        ValueError: the class or a switch of the source has no counterpart, or an override is no field.
    """
    source, target_class = load_source(source, GPT2_HEADS)
    config = source.config
    refuse(
        "GPT-2",
        [
            f"{name}={getattr(config, name)!r} (MiniGPT has {name}=False)"
            for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
            if getattr(config, name)
        ],
        "Train without, or keep transformers' class.",
    )
    fields = carry(config, GPT_FIELDS) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "hidden_act": config.activation_function,
        "attention_scaling": None if config.scale_attn_weights else 1.0,
        "use_cache": config.use_cache,
    }
    state = gpt_to_minigpt(trunk_state(source), config.n_layer, GPT2_EMBEDDINGS)
    return build(target_class, minigpt_config(fields, overrides), state, source)


def from_gpt1(source: Source, **overrides: Any) -> MiniGPTPreTrainedModel:
    """A MiniGPT with the parameters, head, labels, token ids and dtype of an OpenAI GPT (Radford et al., 2018).

    Args:
        source: an `OpenAIGPTLMHeadModel`, `OpenAIGPTForSequenceClassification` or `OpenAIGPTModel`; a folder; or a name
            on the Hub.
        overrides: as for `from_gpt2`.

    Raises:
        ValueError: the class has no counterpart, or an override is no field.
    """
    source, target_class = load_source(source, GPT1_HEADS)
    config = source.config
    fields = carry(config, GPT_FIELDS) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "hidden_act": GPT1_ACTIVATIONS[config.afn],
        "norm_placement": "post",
        "residual_init": "normal",
    }
    state = gpt_to_minigpt(trunk_state(source), config.n_layer, GPT1_EMBEDDINGS)
    return build(target_class, minigpt_config(fields, overrides), state, source)


def from_nanogpt(source: str | PathLike[str], **overrides: Any) -> MiniGPTForCausalLM:
    """A MiniGPT with the parameters of a nanoGPT checkpoint (github.com/karpathy/nanoGPT).

    The file names neither tokenizer nor end-of-text token: with GPT-2's, give `unpadded_vocab_size=50257` and
    `eos_token_id=50256`. nanoGPT before June 2023 computed the tanh GELU: `hidden_act="gelu_new"`. Where its norms have no
    bias, MiniGPT's have one of zero, which training would move.

    Args:
        source: `ckpt.pt`, or the folder it is in. Loaded without unpickling code.
        overrides: as for `from_gpt2`.

    Raises:
        ValueError: no such file, or not a nanoGPT checkpoint, or an override is no field.
    """
    model_args, state = read_nanogpt(source)
    biased = model_args.get("bias", True)
    fields = nanogpt_sizes(model_args) | {
        "hidden_act": "gelu",
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "mlp_bias": biased,
    }
    state = gpt_to_minigpt(state, model_args["n_layer"], GPT2_EMBEDDINGS, conv1d=False)
    return build(MiniGPTForCausalLM, minigpt_config(fields, overrides), state)


def nanogpt_as_gpt2(source: str | PathLike[str]) -> GPT2LMHeadModel:
    """The same nanoGPT checkpoint in transformers' own class: what `from_nanogpt` is compared with."""
    model_args, state = read_nanogpt(source)
    state = {name: tensor.t() if is_conv1d_weight(name) else tensor for name, tensor in state.items()}
    config = GPT2Config(
        **nanogpt_sizes(model_args), activation_function="gelu", bos_token_id=None, eos_token_id=None, use_cache=True
    )
    return build(GPT2LMHeadModel, config, state)


def from_nanochat(source: Source, **overrides: Any) -> MiniGPTPreTrainedModel:
    """A MiniGPT with the parameters, token ids and dtype of a NanoChat (github.com/karpathy/nanochat).

    NanoChat turns queries and keys the other way round than Llama and MiniGPT: the halves of each head change places.

    Args:
        source: a `NanoChatForCausalLM` or `NanoChatModel`; a folder; or a name on the Hub.
        overrides: as for `from_gpt2`.

    Raises:
        ValueError: keys and values are shared by heads, the class has no counterpart, or an override is no field.
    """
    source, target_class = load_source(source, NANOCHAT_HEADS)
    config = source.config
    if config.num_key_value_heads != config.num_attention_heads:
        refuse(
            "NanoChat",
            [f"num_key_value_heads={config.num_key_value_heads} (MiniGPT has num_attention_heads of them)"],
            f"Convert one with num_key_value_heads={config.num_attention_heads}, or keep transformers' class.",
        )
    fields = carry(config) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": source.base_model.layers[0].self_attn.head_dim if len(source.base_model.layers) else None,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "norm_type": "rmsnorm",
        "norm_affine": False,
        "layer_norm_epsilon": config.rms_norm_eps,
        "embedding_norm": True,
        "position_embedding_type": "rope",
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "qk_norm": True,
        "qkv_bias": config.attention_bias,
        "attention_out_bias": config.attention_bias,
        "mlp_bias": False,
        "final_logit_softcapping": config.final_logit_softcapping,
        "embd_pdrop": 0.0,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": 0.0,
        "use_cache": config.use_cache,
    }
    minigpt = minigpt_config(fields, overrides)
    state = {
        name.replace("mlp.fc1", "mlp.up_proj").replace("mlp.fc2", "mlp.down_proj"): tensor
        for name, tensor in turn_round(trunk_state(source), minigpt.head_dim).items()
    }
    return build(target_class, minigpt, state, source)


def to_gpt2(source: Source) -> PreTrainedModel:
    """A GPT-2 of transformers' own class with the parameters, head, labels, token ids and dtype of a MiniGPT.

    Biases and norm parameters that the MiniGPT lacks become zeros and ones. Rows of a padded table beyond
    `unpadded_vocab_size` are cut off, since GPT-2 cannot mask them.

    Args:
        source: a MiniGPT with or without a head; a folder; or a name on the Hub.

    Raises:
        ValueError: with a list of the config's fields that GPT-2 cannot express.
    """
    source, target_class = load_source(source, MINIGPT_TO_GPT2)
    config = source.config
    needs = dict(GPT2_NEEDS)
    if isinstance(source, MiniGPTForCausalLM):
        needs |= {"lm_head_bias": False, "final_logit_softcapping": None}
    obstacles = unmet(source, needs)
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        obstacles.append(f"head_dim={config.head_dim} (needs hidden_size / num_attention_heads)")
    if config.attention_scaling not in (None, 1.0, config.head_dim**-0.5):
        obstacles.append(f"attention_scaling={config.attention_scaling} (needs None or 1.0)")
    refuse_export("GPT-2", "gpt2", obstacles)

    target_config = GPT2Config(
        **carry(config, GPT_FIELDS),
        vocab_size=num_ids(config),
        n_embd=config.hidden_size,
        n_inner=config.intermediate_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        activation_function=config.hidden_act,
        scale_attn_weights=config.attention_scaling in (None, config.head_dim**-0.5),
        use_cache=config.use_cache,
    )
    state = minigpt_to_gpt2(cut_padding(trunk_state(source), config), config.num_hidden_layers)
    return build(target_class, target_config, state, source)


def to_nanochat(source: Source) -> PreTrainedModel:
    """A NanoChat of transformers' own class with the parameters, token ids and dtype of a MiniGPT.

    As `to_gpt2` for missing biases and padded tables. Dropout outside attention, which NanoChat lacks and only training
    would notice, is left behind.

    Args:
        source: a MiniGPT language model or one without a head; a folder; or a name on the Hub.

    Raises:
        ValueError: with a list of the config's fields that NanoChat cannot express.
    """
    source, target_class = load_source(source, MINIGPT_TO_NANOCHAT)
    config = source.config
    needs = dict(NANOCHAT_NEEDS)
    if isinstance(source, MiniGPTForCausalLM):
        needs["lm_head_bias"] = False
    obstacles = unmet(source, needs)
    if config.attention_scaling not in (None, config.head_dim**-0.5):
        obstacles.append(f"attention_scaling={config.attention_scaling} (needs None)")
    refuse_export("NanoChat", "minigpt-base", obstacles)

    target_config = NanoChatConfig(
        **carry(config),
        vocab_size=num_ids(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        attention_dropout=config.attn_pdrop,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters=copy.deepcopy(config.rope_parameters),
        final_logit_softcapping=config.final_logit_softcapping,
        attention_bias=config.qkv_bias or config.attention_out_bias,
        use_cache=config.use_cache,
    )
    state = {
        name.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2"): tensor
        for name, tensor in turn_round(cut_padding(trunk_state(source), config), config.head_dim).items()
    }
    return build(target_class, target_config, state, source)


@torch.no_grad()
def compare_logits(
    one: PreTrainedModel, other: PreTrainedModel, *, num_rows: int = 2, num_tokens: int = 64, seed: int = 0
) -> float:
    """The largest absolute difference between two models' logits (hidden states, without a head), in fp32, on random ids.

    Args:
        num_rows: how many random rows are read, one by one.
        num_tokens: their length, cut to the shorter context of the two.
        seed: of the random ids, drawn among those that both tables have; ids beyond an `unpadded_vocab_size` are neither
            drawn nor compared.
    """
    configs = (one.config, other.config)
    vocab_size = min(num_ids(config) for config in configs)
    length = min(num_tokens, *(config.max_position_embeddings for config in configs))
    # A row that ended in the padding token would be pooled elsewhere by a classifier that looks for padding.
    drawn = torch.tensor([i for i in range(vocab_size) if i not in {config.pad_token_id for config in configs}])
    rows = drawn[torch.randint(len(drawn), (num_rows, 1, length), generator=torch.Generator().manual_seed(seed))]
    difference = 0.0
    answers = zip(*(read(model, rows, vocab_size) for model in (one, other)), strict=True)
    for mine, others in answers:
        difference = max(difference, (mine - others).abs().max().item())
    return difference


def read(model: PreTrainedModel, rows: torch.Tensor, vocab_size: int) -> Iterable[torch.Tensor]:
    """Logits or hidden states of each row of ids (N, 1, T), on the CPU in fp32."""
    if model.training or model.dtype != torch.float32:
        model = copy.deepcopy(model).float().eval()
    for input_ids in rows.to(model.device):
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        answer = output.logits if "logits" in output else output.last_hidden_state
        # (1, T, V) of a language model
        yield (answer[..., :vocab_size] if "logits" in output and answer.dim() == 3 else answer).cpu()


def detect_layout(source: str | PathLike[str]) -> str:
    """The layout of a checkpoint on disk or on the Hub: a key of `FROM`, or "minigpt".

    Raises:
        ValueError: a layout that does not convert.
    """
    path = Path(source)
    if path.suffix == ".pt" or (path / "ckpt.pt").is_file():
        return "nanogpt"
    model_type = AutoConfig.from_pretrained(source).model_type
    layouts = {"gpt2": "gpt2", "openai-gpt": "gpt1", "nanochat": "nanochat", "minigpt": "minigpt"}
    if model_type not in layouts:
        raise ValueError(
            f"{source} has model_type={model_type!r}, which does not convert: choose a checkpoint of "
            f"{', '.join(layouts)} or a nanoGPT ckpt.pt."
        )
    return layouts[model_type]


def load_source(source: Source, heads: Heads) -> tuple[PreTrainedModel, type[PreTrainedModel]]:
    """The source, loaded in its own class where it is a folder or a Hub name, and the class that `heads` turns it into."""
    if isinstance(source, PreTrainedModel):
        name = type(source).__name__
    else:
        config = AutoConfig.from_pretrained(source)
        # A config.json without architectures: every layout lists its language model first.
        name = config.architectures[0] if config.architectures else next(iter(heads)).__name__
    # By name: a MiniGPT loaded from the Hub's code is another class object.
    by_name = {source_class.__name__: source_class for source_class in heads}
    if name not in by_name:
        raise ValueError(
            f"{name} does not convert here: give one of {', '.join(by_name)}, or load the checkpoint's trunk as one of "
            "these and give that."
        )
    model = source if isinstance(source, PreTrainedModel) else by_name[name].from_pretrained(source)
    return model, heads[by_name[name]]


def _refuse(layout: str, obstacles: list[str], remedy: str) -> None:
    if obstacles:
        raise ValueError(f"{layout} cannot be converted with {', '.join(obstacles)}. {remedy}")


def _obstacles(config: PreTrainedConfig, needs: dict[str, Any]) -> list[str]:
    found = [f"{name}={getattr(config, name)!r} (needs {need!r})" for name, need in needs.items() if getattr(config, name) != need]
    sizes = ("num_hidden_layers", "intermediate_size")
    return found + [f"{name}=0 (needs at least 1)" for name in sizes if getattr(config, name) == 0]


def _carry(config: PreTrainedConfig, *more: str) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(config, name)) for name in CARRIED_FIELDS + more}


def _num_ids(config: PreTrainedConfig) -> int:
    """Ids that are not padding of the table; only MiniGPT knows of padding."""
    return getattr(config, "unpadded_vocab_size", None) or config.vocab_size


def _minigpt_config(fields: dict[str, Any], overrides: dict[str, Any]) -> MiniGPTConfig:
    overrides = {MiniGPTConfig.attribute_map.get(name, name): value for name, value in overrides.items()}
    unknown = overrides.keys() - MiniGPTConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no field of MiniGPTConfig, see its docstring for their names.")
    return MiniGPTConfig(**{**fields, **overrides})


def _state(model: PreTrainedModel) -> State:
    """The parameters by the names that they have in the model without a head."""
    prefix = model.base_model_prefix + "."
    return {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}


def _build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: State,
    source: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A model with copies of `state` (names as `_state` gives them), and the source's device and generation config."""
    with no_init_weights():
        model = model_class(config)
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    state = {name if name.startswith(HEAD_MODULES) else prefix + name: tensor for name, tensor in state.items()}
    expected = model.state_dict()
    # The language-model head that a classifier was finetuned with (GPT-1's auxiliary loss) has no use in another layout.
    assert all(name.startswith("lm_head.") for name in state.keys() - expected.keys())

    example = next(iter(state.values()))
    copies = {}
    for name, tensor in expected.items():
        if name in state:
            copies[name] = state[name].detach().clone(memory_format=torch.contiguous_format)
        elif tensor.dim() == 1:
            # What is not there does nothing: a bias of 0, a norm's weight of 1.
            copies[name] = torch.full_like(tensor, name.endswith("weight"), dtype=example.dtype, device=example.device)
        elif name not in model.all_tied_weights_keys:
            raise ValueError(f"The source has no parameters for {name}: drop the override that asks for it.")
    # assign: the source's dtype, parameter by parameter, while rotary frequencies stay in fp32.
    model.load_state_dict(copies, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = example.dtype
    if source is not None and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(example.device).eval()


def _is_conv1d_weight(name: str) -> bool:
    return name.endswith(tuple(f"{module}.weight" for module in CONV1D_MODULES))


def _gpt_modules(num_layers: int, embeddings: tuple[str, str] = GPT2_EMBEDDINGS) -> dict[str, list[str]]:
    """Every module of a GPT-1, GPT-2 or nanoGPT, with the MiniGPT modules whose rows it stacks."""
    tokens, positions = embeddings
    modules = {tokens: ["embed_tokens"], positions: ["embed_positions"], "ln_f": ["norm"]}
    for layer in range(num_layers):
        for theirs, ours in BLOCK_MODULES.items():
            modules[f"h.{layer}.{theirs}"] = [f"layers.{layer}.{module}" for module in ours]
    return modules | {head: [head] for head in HEAD_MODULES}


def _gpt_to_minigpt(state: State, modules: dict[str, list[str]], conv1d: bool = True) -> State:
    converted = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if conv1d and _is_conv1d_weight(name):
            tensor = tensor.t()
        for ours, part in zip(modules[module], tensor.chunk(len(modules[module])), strict=True):
            converted[f"{ours}.{kind}"] = part
    return converted


def _minigpt_to_gpt2(state: State, modules: dict[str, list[str]]) -> State:
    converted = {}
    for module, ours in modules.items():
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                name = f"{module}.{kind}"
                tensor = torch.cat([state[f"{part}.{kind}"] for part in ours])
                converted[name] = tensor.t() if _is_conv1d_weight(name) else tensor
    return converted


def _cut_padding(state: State, config: PreTrainedConfig) -> State:
    tables = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    return {name: tensor[: _num_ids(config)] if name in tables else tensor for name, tensor in state.items()}


def _turn_round(state: State, head_dim: int) -> State:
    """Swap the halves of each head in queries and keys; twice is not at all."""
    turned = dict(state)
    for name, tensor in state.items():
        if "q_proj." in name or "k_proj." in name:
            halves = tensor.unflatten(0, (-1, 2, head_dim // 2))  # (H, 2, D / 2) and, of weights, C
            turned[name] = halves.flip(1).flatten(0, 2)
    return turned


def _read_nanogpt(source: str | PathLike[str]) -> tuple[dict[str, Any], State]:
    path = Path(source)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{source}: no such file; give nanoGPT's ckpt.pt or the folder that it is in.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} lacks the entries 'model' and 'model_args': it is not a nanoGPT checkpoint.")
    # A compiled model's names begin with _orig_mod; before PyTorch 2, nanoGPT saved the causal mask.
    weights = {
        name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor
        for name, tensor in checkpoint["model"].items()
        if not name.endswith(".attn.bias")
    }
    return checkpoint["model_args"], weights


def _nanogpt_fields(model_args: dict[str, Any]) -> dict[str, Any]:
    """What GPT2Config and MiniGPTConfig both understand."""
    sizes = {name: model_args[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    dropout = model_args.get("dropout", 0.0)
    return sizes | {
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
