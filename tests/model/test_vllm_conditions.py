"""The conditions of vLLM's Transformers modeling backend, tested without vLLM.

They come from its documentation ("Writing custom models", "Plugin System") and from
`vllm/model_executor/models/transformers/` in 2026. The backend builds `AutoModel` with its own attention, calls it on
all tokens of a step in one row, and computes the logits itself.
"""

import json
import pkgutil
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_minigpt import MiniGPTForCausalLM, MiniGPTModel
from tests.tiny import SWITCHES, random_ids, tiny_model


# vLLM's flat attention output does not support `head_mask` (pruned heads).
SERVED = sorted(SWITCHES.keys() - {"gpt1"})


def test_the_plugin_can_be_called_repeatedly():
    """Every process of vLLM calls the functions of the entry points."""
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.split('[project.entry-points."vllm.general_plugins"]')[1].split("\n[")[0]
    plugins = re.findall(r'^\w+ = "(\S+)"$', section, re.MULTILINE)
    assert plugins == ["hf_minigpt.registration:register"]
    for _ in range(2):
        pkgutil.resolve_name(plugins[0])()


@pytest.mark.parametrize("name", SERVED)
def test_the_backend_supports_the_models_structure(name, tmp_path):
    language_model = tiny_model(name)
    model = language_model.model
    assert MiniGPTModel.is_backend_compatible() and MiniGPTForCausalLM.is_backend_compatible()
    assert model.get_decoder() is model and model.get_input_embeddings() is model.embed_tokens
    language_model.save_pretrained(tmp_path)
    assert "AutoModel" in json.loads((tmp_path / "config.json").read_text())["auto_map"]

    # Pipeline parallelism splits one list of blocks, and finds the other modules by name.
    module_lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    assert module_lists == ["layers"] and model.supports_pp_plan
    assert set(model._pp_plan) <= {path for path, _ in model.named_children()}
    # Tensor parallelism supports these two styles, and every matrix of a block has one.
    plan = dict(model.config.base_model_tp_plan)
    # transformers 5.20 adds an entry for tied embeddings to every model.
    assert plan.pop("embed_tokens", "embedding_rowwise") == "embedding_rowwise"
    assert set(plan.values()) == {"colwise", "rowwise"}
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert all(any(fnmatch(path, pattern) for pattern in plan) for path in linears)
    # They give the size of the key-value cache, and identify the layers.
    for i, block in enumerate(model.layers):
        attention = block.self_attn
        assert (attention.layer_idx, attention.is_causal) == (i, True) and isinstance(attention.scaling, float)
        assert attention.q_proj.out_features == model.config.num_attention_heads * model.config.head_dim
    assert {"vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"} <= set(model.config.to_dict())


class CachedAttention:
    """Stand-in for vLLM's attention of one layer, on flat queries, keys and values (tokens, heads * head_dim).

    `lengths`, set before each step, are the numbers of its tokens per sequence.
    """

    def __init__(self, num_heads: int):
        self.num_heads = num_heads
        self.caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lengths: list[int] = []

    def __call__(self, query, key, value, scale):
        outputs = []
        parts = zip(*(tensor.split(self.lengths) for tensor in (query, key, value)), strict=True)
        for sequence, (q, k, v) in enumerate(parts):
            if sequence in self.caches:
                k, v = (torch.cat(pair) for pair in zip(self.caches[sequence], (k, v), strict=True))
            self.caches[sequence] = (k, v)
            q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for tensor in (q, k, v))
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
            outputs.append(output.transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def engine_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert attention_mask is None
    num_tokens = query.shape[-2]
    flat = [tensor.transpose(1, 2).reshape(num_tokens, -1) for tensor in (query, key, value)]
    return attention_instances[module.layer_idx](*flat, scaling), None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "vllm", engine_attention)


def engine_model(language_model):
    """Build the model as the backend does: from the config, with its attention, and load the weights by name."""
    config = type(language_model.config).from_dict(language_model.config.to_dict())
    config._attn_implementation = "vllm"
    model = AutoModel.from_config(config).eval()
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in language_model.state_dict().items()
        if not name.startswith("lm_head.")
    }
    model.load_state_dict(weights)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", SERVED)
def test_served_logits_equal_the_models(name, engine):
    language_model = tiny_model(name)
    config = language_model.config
    model = engine_model(language_model)
    attentions = {i: CachedAttention(config.num_attention_heads) for i in range(config.num_hidden_layers)}
    sequences = [random_ids(1, length, seed=length)[0] for length in (7, 4, 9)]

    def step(parts, past_lengths):
        for attention in attentions.values():
            attention.lengths = [len(part) for part in parts]
        positions = [torch.arange(past, past + len(part)) for part, past in zip(parts, past_lengths, strict=True)]
        hidden_states = model(
            input_ids=torch.cat(parts)[None],
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            attention_instances=attentions,
            return_dict=False,
        )[0][0]
        logits = language_model.lm_head(hidden_states)
        if config.final_logit_softcapping is not None:
            logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
        return logits.split([len(part) for part in parts])

    # All prompts in one row, then chunks of different lengths.
    cuts = [[5, 2, 3], [6, 3, 4], [7, 4, 9]]
    done = [0, 0, 0]
    served: list[list[torch.Tensor]] = [[], [], []]
    for ends in cuts:
        parts = [ids[start:end] for ids, start, end in zip(sequences, done, ends, strict=True)]
        for pieces, logits in zip(served, step(parts, done), strict=True):
            pieces.append(logits)
        done = ends
    num_ids = config.unpadded_vocab_size or config.vocab_size
    for ids, pieces in zip(sequences, served, strict=True):
        expected = language_model(ids[None]).logits[0]
        torch.testing.assert_close(torch.cat(pieces)[:, :num_ids], expected[:, :num_ids], atol=1e-4, rtol=1e-4)


class WholeRow:
    """Attention of one sequence without a cache, which a compiler can trace."""

    def __init__(self, num_heads: int):
        self.num_heads = num_heads

    def __call__(self, query, key, value, scale):
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1).flatten(1)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_the_decoder_compiles_as_one_graph(name, engine):
    """vLLM compiles the forward of the decoder without breaks, for any number of tokens."""
    language_model = tiny_model(name)
    model = engine_model(language_model)
    attentions = {i: WholeRow(model.config.num_attention_heads) for i in range(model.config.num_hidden_layers)}
    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="eager")
    for length in (5, 9):
        ids = random_ids(1, length)
        options = {"position_ids": torch.arange(length)[None], "use_cache": False, "return_dict": False}
        hidden_states = compiled(input_ids=ids, attention_instances=attentions, **options)[0]
        torch.testing.assert_close(hidden_states, language_model.model(ids, use_cache=False)[0], atol=1e-4, rtol=1e-4)
