"""The configuration: JSON, aliases and defaults, and errors that name the field."""

import json
import re

import pytest
from transformers import AutoConfig, GPT2Config
from transformers.activations import ACT2FN

from hf_minigpt import MiniGPTConfig
from hf_minigpt.presets import PRESETS, preset
from tests.tiny import SWITCHES, tiny_config


# Fields of transformers that may differ between a saved file and the instance.
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "architectures"}


def fields(config):
    return {key: value for key, value in config.to_dict().items() if key not in VOLATILE}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_saved_config_loads_unchanged(name, tmp_path):
    config = tiny_config(name, num_labels=3, pad_token_id=1, eos_token_id=[2, 3])
    config.save_pretrained(tmp_path)
    for loaded in (MiniGPTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MiniGPTConfig)
        assert fields(loaded) == fields(config)
    assert MiniGPTConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_missing_sizes_are_derived():
    config = MiniGPTConfig(hidden_size=24, num_attention_heads=3)
    assert (config.head_dim, config.intermediate_size) == (8, 96)
    assert MiniGPTConfig(hidden_size=24, num_attention_heads=5, head_dim=6).head_dim == 6
    assert MiniGPTConfig(intermediate_size=0).intermediate_size == 0
    assert MiniGPTConfig(position_embedding_type="rope").rope_parameters["rope_theta"] == 10000.0
    assert MiniGPTConfig(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).rope_parameters is None


def test_gpt2_names_are_aliases():
    config = MiniGPTConfig(
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=32,
        n_inner=None,
        activation_function="relu",
        layer_norm_epsilon=1e-3,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert (config.max_position_embeddings, config.intermediate_size, config.hidden_act) == (32, 96, "relu")
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.n_inner) == (24, 2, 3, 32, 96)
    assert MiniGPTConfig(n_embd=24, n_head=3, n_inner=7).intermediate_size == 7
    config.n_positions = 64
    assert config.max_position_embeddings == 64


def test_a_gpt2_config_file_loads(tmp_path):
    gpt2 = GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=32, vocab_size=67, resid_pdrop=0.3)
    gpt2.save_pretrained(tmp_path)
    config = MiniGPTConfig.from_pretrained(tmp_path)
    assert config.model_type == "minigpt" and config.to_dict()["model_type"] == "minigpt"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert (config.max_position_embeddings, config.vocab_size, config.intermediate_size) == (32, 67, 96)
    assert (config.hidden_act, config.layer_norm_epsilon, config.resid_pdrop) == ("gelu_new", 1e-5, 0.3)
    assert config.tie_word_embeddings


@pytest.mark.parametrize("missing", ["pooling", "head_mask", "unpadded_vocab_size", "qk_norm", "auxiliary_lm_weight"])
def test_a_file_without_a_newer_field_loads_with_its_default(missing, tmp_path):
    tiny_config("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content[missing]
    file.write_text(json.dumps(content))
    assert getattr(MiniGPTConfig.from_pretrained(tmp_path), missing) == getattr(MiniGPTConfig(), missing)


def test_a_saved_config_names_the_code_of_all_auto_classes(tmp_path):
    tiny_config("gpt2").save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden_size": 25}, ["hidden_size=25", "num_attention_heads=3", "head_dim"]),
        ({"position_embedding_type": "rope", "head_dim": 7}, ["head_dim=7", "even"]),
        ({"position_embedding_type": "sinusoidal", "hidden_size": 27}, ["hidden_size=27", "even"]),
        ({"hidden_act": "swoosh"}, ["hidden_act='swoosh'", "gelu_new"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers=-1"]),
        ({"intermediate_size": -4}, ["intermediate_size=-4"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"head_dim": -8}, ["head_dim=-8"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
        ({"attn_pdrop": 1.0}, ["attn_pdrop=1.0"]),
        ({"resid_pdrop": -0.1}, ["resid_pdrop=-0.1"]),
        ({"layer_norm_epsilon": 0.0}, ["layer_norm_epsilon=0.0"]),
        ({"final_logit_softcapping": -15.0}, ["final_logit_softcapping=-15.0"]),
        ({"auxiliary_lm_weight": -0.5}, ["auxiliary_lm_weight=-0.5"]),
        ({"unpadded_vocab_size": 68}, ["unpadded_vocab_size=68", "vocab_size=67"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "tie_word_embeddings=False"]),
        ({"norm_type": "none", "qk_norm": True}, ["norm_type='none'", "qk_norm=True"]),
        ({"head_mask": [[1.0, 1.0, 1.0]]}, ["head_mask=", "num_hidden_layers=2"]),
        ({"head_mask": [[1.0], [1.0]]}, ["head_mask=", "num_attention_heads=3"]),
        ({"norm_type": "batchnorm"}, ["norm_type", "batchnorm"]),
        ({"position_embedding_type": "alibi"}, ["position_embedding_type", "alibi"]),
        ({"pooling": "first"}, ["pooling", "first"]),
        ({"residual_init": "zeros"}, ["residual_init", "zeros"]),
        ({"qk_norm": "yes"}, ["qk_norm", "yes"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused_by_name(wrong, words):
    with pytest.raises(Exception) as error:
        tiny_config("gpt2", **wrong)
    for word in words:
        assert re.search(re.escape(word), str(error.value)), (word, str(error.value))


def test_a_field_is_checked_when_it_is_set():
    config = tiny_config("gpt2")
    with pytest.raises(Exception, match="hidden_size"):
        config.hidden_size = "wide"


def test_an_invalid_change_is_refused_on_save(tmp_path):
    config = tiny_config("gpt2")
    config.unpadded_vocab_size = config.vocab_size + 1
    with pytest.raises(Exception, match="unpadded_vocab_size"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_take_overrides(name):
    config = preset(name, num_hidden_layers=3, num_labels=5)
    assert isinstance(config, MiniGPTConfig)
    assert (config.num_hidden_layers, config.num_labels) == (3, 5)
    assert config.hidden_act in ACT2FN
    # An override must not affect the next call.
    assert preset(name).num_labels == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt2", (50257, 1024, 768, 12, 12)),
        ("gpt2-medium", (50257, 1024, 1024, 24, 16)),
        ("gpt2-large", (50257, 1024, 1280, 36, 20)),
        ("gpt2-xl", (50257, 1024, 1600, 48, 25)),
        ("gpt1", (40478, 512, 768, 12, 12)),
    ],
)
def test_presets_of_published_models(name, shape):
    config = preset(name)
    sizes = (config.vocab_size, config.max_position_embeddings, config.hidden_size)
    assert (*sizes, config.num_hidden_layers, config.num_attention_heads) == shape
    assert config.norm_placement == ("post" if name == "gpt1" else "pre")
    assert config.tie_word_embeddings and config.position_embedding_type == "learned"


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="gpt2-medium"):
        preset("gpt5")
