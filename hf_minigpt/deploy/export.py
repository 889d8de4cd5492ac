"""
Export a MiniGPT to an ONNX graph, a `torch.export` program or a GGUF file.

ONNX and `torch.export` get one decoding step, with the usual names of ONNX exports of causal language models (B rows,
T tokens, P cached tokens, S = P + T, H heads, D head_dim, V vocabulary):

    input_ids (B, T) int64, attention_mask (B, S) int64, 0 for left padding,
    past_key_values.N.key and .value (B, H, P, D)  ->  logits (B, T, V), present.N.key and .value (B, H, S, D)

B, T and P are dynamic. The first step has P = 0.
"""

import copy
import json
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerFast

from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..tokenization import splits_before_spaces
from .conversion import to_gpt2


Path = str | PathLike[str]
Cached = list[tuple[torch.Tensor, torch.Tensor]]
# input_ids, attention_mask, cache -> logits, cache
Step = Callable[[torch.Tensor, torch.Tensor, Cached], tuple[torch.Tensor, Cached]]

# llama.cpp computes the tanh approximation.
GGUF_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
# Module of a GPT-2 block -> GGUF name
GGUF_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GGUF_MODULES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


class DecodingStep(nn.Module):
    """One decoding step of a language model, with tensors as inputs and outputs."""

    def __init__(self, model: MiniGPTForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Cached
    ) -> tuple[torch.Tensor, Cached]:
        past_length = past_key_values[0][0].shape[2] if past_key_values else 0
        keys = torch.arange(attention_mask.shape[1], device=input_ids.device)  # (S,)
        queries = torch.arange(input_ids.shape[1], device=input_ids.device) + past_length  # (T,)
        # Padding attends to itself: the softmax of an empty row is NaN, which the next layer would spread.
        is_self = queries[:, None] == keys
        is_text = attention_mask.bool()[:, None, None, :]
        mask = (queries[:, None] >= keys) & (is_text | is_self)  # (B, 1, T, S)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0).index_select(1, queries)
        cache = DynamicCache(ddp_cache_data=past_key_values) if past_key_values else None
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        layers: list[Any] = cache.layers if cache is not None else []
        return output.logits, [(layer.keys, layer.values) for layer in layers]


def empty_cache(config: PreTrainedConfig, batch_size: int) -> Cached:
    """Return the cache of the first step, with P = 0."""
    shape = (batch_size, config.num_attention_heads, 0, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]


def trace(model: MiniGPTForCausalLM) -> torch.export.ExportedProgram:
    """Trace `DecodingStep` in fp32, with dynamic B, T and P."""
    if model.training or model.dtype != torch.float32:
        model = copy.deepcopy(model).float().eval()
    config: PreTrainedConfig = model.config
    # torch.export treats sizes of 0 and 1 as constants.
    num_rows, num_tokens, num_cached = 2, 3, 4
    shape = (num_rows, config.num_attention_heads, num_cached, config.head_dim)
    cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    num_keys = num_tokens + (num_cached if cache else 0)
    batch, length, cached = (torch.export.Dim(name) for name in ("batch", "length", "cached"))
    # Without layers, the mask's length does not depend on the tokens'.
    keys = torch.export.Dim.DYNAMIC if cache else length
    past = {0: batch, 2: cached}
    return torch.export.export(
        DecodingStep(model),
        (torch.zeros(num_rows, num_tokens, dtype=torch.long), torch.ones(num_rows, num_keys, dtype=torch.long), cache),
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: keys}, [(past, past) for _ in cache]),
    )


def to_torch_export(model: MiniGPTForCausalLM, path: Path) -> None:
    """Write a `.pt2` file, which `torch.export.load` reads without this package."""
    torch.export.save(trace(model), path)


def load_torch_export(path: Path) -> Step:
    """Load a `.pt2` file as a decoding step."""
    # The guards require at least four keys, because the trace has at least two tokens and two cached tokens.
    return torch.export.load(path).module(check_guards=False)


def to_onnx(model: MiniGPTForCausalLM, path: Path) -> None:
    """Write an ONNX graph, with weights above 2 GB in a file next to it. Requires onnx and onnxscript."""
    layers = range(model.config.num_hidden_layers)
    program: Any = torch.onnx.export(
        trace(model),
        input_names=["input_ids", "attention_mask", *_cache_names("past_key_values", len(layers))],
        output_names=["logits", *_cache_names("present", len(layers))],
        dynamo=True,
        verbose=False,
    )
    # torch names the dynamic sizes s0, s1, ...
    ids, *rest = program.model.graph.inputs
    names = {str(ids.shape[0]): "batch", str(ids.shape[1]): "length"}
    if len(rest) > 1:
        names |= {str(rest[1].shape[2]): "cached", str(rest[0].shape[1]): "cached + length"}
    program.rename_axes(names)
    program.save(path)


def load_onnx(path: Path) -> Step:
    """Load an ONNX graph in onnxruntime, on the CPU, as a decoding step."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def step(input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cached) -> tuple[torch.Tensor, Cached]:
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask}
        for layer, pair in enumerate(cache):
            tensors |= dict(zip(_layer_names("past_key_values", layer), pair, strict=True))
        logits, *rest = map(torch.from_numpy, session.run(None, {name: tensors[name].numpy() for name in names}))
        return logits, list(zip(rest[::2], rest[1::2], strict=True))

    return step


def _cache_names(prefix: str, num_layers: int) -> list[str]:
    return [name for layer in range(num_layers) for name in _layer_names(prefix, layer)]


def _layer_names(prefix: str, layer: int) -> list[str]:
    return [f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"]


def to_gguf(model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, name: str = "MiniGPT") -> None:
    """
    Write a GGUF file of llama.cpp's "gpt2" architecture, in fp32, with its tokenizer. Requires gguf.

    `llama-quantize` quantizes it.

    Raises:
        ValueError: llama.cpp's GPT-2 cannot express the config or the tokenizer. The message names the fields.
    """
    gpt2 = to_gpt2(model).float()
    _check_gguf(model.config, tokenizer)
    # Imported here because it is an optional dependency.
    import gguf

    config = gpt2.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for parameter, tensor in gpt2.state_dict().items():
        module, _, kind = parameter.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            # llama.cpp then uses the embedding table.
            continue
        prefix, _, rest = module.removeprefix("transformer.h.").partition(".")
        gguf_module = GGUF_MODULES.get(module) or f"blk.{prefix}.{GGUF_BLOCK[rest]}"
        # Matrices of GPT-2's blocks are (in, out), those of GGUF (out, in).
        is_conv1d = kind == "weight" and module.startswith("transformer.h.") and tensor.dim() == 2
        matrix = tensor.t() if is_conv1d else tensor
        writer.add_tensor(f"{gguf_module}.{kind}", matrix.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    obstacles = []
    if config.hidden_act not in GGUF_ACTIVATIONS:
        obstacles.append(f"hidden_act={config.hidden_act!r} (needs {' or '.join(map(repr, GGUF_ACTIVATIONS))})")
    if config.attention_scaling not in (None, config.head_dim**-0.5):
        obstacles.append(f"attention_scaling={config.attention_scaling} (needs None)")
    if obstacles:
        raise ValueError(
            f"llama.cpp's GPT-2 cannot express {', '.join(obstacles)}. Export to onnx or torch-export, which support "
            "every MiniGPT, or train from preset('gpt2')."
        )
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE" or not splits_before_spaces(backend):
        raise ValueError(
            f"The tokenizer is a {type(backend.model).__name__} with the pre-tokenizer {backend.pre_tokenizer}, but "
            "llama.cpp's GPT-2 requires GPT-2's byte-level BPE. Export to onnx or torch-export, or train with the "
            "default tokenizer."
        )


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    import gguf

    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(vocab_size):
        tokens.append(by_id.get(i, f"[UNUSED{i}]"))
        if i not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif i in added:
            types.append(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # Older tokenizer files store merges as strings.
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    # llama.cpp adds a beginning-of-text token if the tokenizer does.
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def load_gguf(path: Path, tokenizer: PreTrainedTokenizerFast, num_ids: int) -> Callable[[list[int]], torch.Tensor]:
    """
    Load a GGUF file in llama.cpp, on the CPU. Requires xllamacpp.

    llama.cpp looks GELU up in a half-precision table, so its results differ from fp32 by up to 1e-2.

    Args:
        tokenizer: the tokenizer in the file.
        num_ids: number of token ids.

    Returns:
        A function from the ids of a prompt to the log-probabilities (num_ids,) of the next token.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    # llama.cpp's threads busy-wait for each other.
    params.cpuparams.n_threads = 1
    params.fit_params = False
    params.warmup = False
    params.verbosity = -1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    # The server returns no probabilities for a token that is part of a character, so make it generate a letter. The
    # returned probabilities are those without the bias.
    letter = tokenizer.convert_tokens_to_ids("a")
    request = {"max_tokens": 1, "temperature": 0, "n_probs": num_ids, "logit_bias": [[letter, 1e9]]}

    def next_log_probabilities(ids: list[int]) -> torch.Tensor:
        choice = server.handle_completions(request | {"prompt": ids})["choices"][0]
        log_probabilities = torch.full((num_ids,), float("nan"))
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            log_probabilities[token["id"]] = token["logprob"]
        return log_probabilities

    return next_log_probabilities
