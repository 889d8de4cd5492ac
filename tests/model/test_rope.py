"""Every rope_type equals transformers' own, and the configuration refuses wrong parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from torch.nn.parallel import DistributedDataParallel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM, MiniGPTModel
from hf_minigpt.model.attention_minigpt import apply_rotary
from tests.tiny import NO_DROPOUT, random_ids


HEADS, HEAD_DIM, CONTEXT = 3, 16, 64
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with every option": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "longrope": {"short_factor": 1.0, "long_factor": 3.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {},
}


def rope_parameters(name, share):
    parameters = {"rope_type": name, "rope_theta": 50.0, **ROPES[name]}
    if share != 1:
        parameters["partial_rotary_factor"] = share
    for key in ("short_factor", "long_factor"):
        if key in parameters:
            parameters[key] = [parameters[key] + 0.1 * i for i in range(int(HEAD_DIM * share) // 2)]
    return parameters


def rope_config(parameters=None, **overrides):
    sizes = {
        "vocab_size": 67,
        "hidden_size": HEADS * HEAD_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
    }
    options = {**sizes, **NO_DROPOUT, "position_embedding_type": "rope", "rope_parameters": parameters, **overrides}
    return MiniGPTConfig(**options)


def neox_and_ours(parameters):
    """
    Return a GPT-NeoX, which supports every rope_type, and a MiniGPT with the same weights.

    Without its parallel residual, its block is that of MiniGPT.
    """
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=67,
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=4 * HEADS * HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"partial_rotary_factor": 1.0, **parameters},
        use_parallel_residual=False,
        hidden_act="gelu",
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    neox = GPTNeoXForCausalLM(config).eval()
    state = {}
    for name, tensor in neox.state_dict().items():
        for theirs, ours in {
            "gpt_neox.": "model.",
            "embed_in": "embed_tokens",
            "attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
            "final_layer_norm": "norm",
            "embed_out": "lm_head",
        }.items():
            name = name.replace(theirs, ours)
        if "query_key_value" in name:
            # Each head stores query, key and value one after the other.
            parts = tensor.view(HEADS, 3, HEAD_DIM, *tensor.shape[1:]).unbind(1)
            for part, letter in zip(parts, "qkv", strict=True):
                state[name.replace("attention.query_key_value", f"self_attn.{letter}_proj")] = part.flatten(0, 1)
        else:
            state[name] = tensor
    config = rope_config(dict(parameters), hidden_act="gelu", tie_word_embeddings=False)
    model = MiniGPTForCausalLM(config).eval()
    model.load_state_dict(state)
    return neox, model


@pytest.mark.parametrize("share", [1, 0.5, 0.25])
@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_those_of_gpt_neox(name, share, tmp_path):
    neox, model = neox_and_ours(rope_parameters(name, share))
    model.save_pretrained(tmp_path)
    loaded = MiniGPTForCausalLM.from_pretrained(tmp_path).eval()
    # Within the original context, beyond it, beyond the extended one, and back: some types depend on the length.
    for length in (9, 40, 90, 9):
        ids = random_ids(2, length)
        with torch.no_grad():
            expected = neox(ids).logits
            for ours in (model, loaded):
                torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("name", ROPES)
def test_generated_ids_equal_those_of_gpt_neox(name, share):
    """One token at a time, from within the original context to beyond it."""
    neox, model = neox_and_ours(rope_parameters(name, share))
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), neox.generate(ids, **options))


CASTS = {
    "bfloat16": lambda model, path: model.bfloat16(),
    "half": lambda model, path: model.half(),
    "to dtype": lambda model, path: model.to(torch.bfloat16),
    "to device and dtype": lambda model, path: model.to("cpu", torch.bfloat16),
    "there and back": lambda model, path: model.bfloat16().float(),
    "double": lambda model, path: model.double(),
    "base model": lambda model, path: model.model.bfloat16() and model,
    "copy": lambda model, path: copy.deepcopy(model.bfloat16()),
    "loaded in bfloat16": lambda model, path: MiniGPTForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
    "loaded and cast": lambda model, path: MiniGPTForCausalLM.from_pretrained(path).bfloat16(),
    "device map": lambda model, path: MiniGPTForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": "cpu"}
    ),
    "dispatched": lambda model, path: dispatch_model(model.bfloat16(), {"": "cpu"}, force_hooks=True),
    "built in bfloat16": lambda model, path: MiniGPTForCausalLM._from_config(model.config, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_stay_float32(name, cast, tmp_path):
    """bfloat16 has 8 bits: at position 1,000, an angle rounded to them is off by radians."""
    parameters = rope_parameters(name, 1)
    model = MiniGPTForCausalLM(rope_config(parameters))
    plain = copy.deepcopy(model.model.rotary_emb)
    model.save_pretrained(tmp_path)
    rotary = CASTS[cast](model, tmp_path).model.rotary_emb
    # Within the original context, beyond it, and back: some types depend on the length.
    for length in (9, 1000, 9):
        positions = torch.arange(length)[None]
        for dtype in (torch.float32, torch.bfloat16):
            expected = plain(torch.zeros(1), positions)
            for ours, exact in zip(rotary(torch.zeros(1, dtype=dtype), positions), expected, strict=True):
                assert torch.equal(ours, exact.to(dtype))


@torch.no_grad()
def test_a_bfloat16_model_scores_late_positions_as_a_float32_one():
    """Within bfloat16's error, of which weights that bfloat16 represents leave only that of its arithmetic."""
    torch.manual_seed(0)
    config = rope_config({"rope_theta": 10000.0}, max_position_embeddings=1024, initializer_range=0.1)
    model = MiniGPTForCausalLM(config).eval().bfloat16().float()
    ids = random_ids(1, 1001)
    expected = model(ids).logits[:, -1]
    error = model.bfloat16()(ids).logits[:, -1].float() - expected
    assert error.norm() < 0.03 * expected.norm()


def test_meta_models_keep_float32_frequencies():
    with torch.device("meta"):
        model = MiniGPTForCausalLM(rope_config()).bfloat16()
    frequencies = model.model.rotary_emb.inv_freq
    assert (frequencies.device.type, frequencies.dtype) == ("meta", torch.float32)
    assert model.to_empty(device="cpu").model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("model_class", [MiniGPTForCausalLM, MiniGPTModel])
def test_ddp_broadcasts_no_frequencies(model_class, tmp_path, monkeypatch):
    broadcasts = []
    monkeypatch.setattr(dist, "_broadcast_coalesced", lambda group, tensors, *args: broadcasts.append(len(tensors)))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(model_class(rope_config()))
        model(random_ids(1, 3))
    finally:
        dist.destroy_process_group()
    # The parameters, before the first step.
    assert broadcasts == [len(list(model.parameters()))]


def test_a_partial_rotary_factor_rotates_the_first_dimensions():
    x, angles = torch.randn(1, 1, 1, 8), torch.tensor([[[0.3, 0.7, 0.3, 0.7]]])
    rotated = apply_rotary(x, angles.cos(), angles.sin())[0, 0, 0]
    x = x[0, 0, 0]
    pairs = torch.complex(x[:2], x[2:4]) * torch.exp(1j * angles[0, 0, :2])
    torch.testing.assert_close(rotated, torch.cat([pairs.real, pairs.imag, x[4:]]))


def test_a_registered_rope_type_is_used(monkeypatch):
    frequencies = torch.zeros(HEAD_DIM // 2)
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "still", lambda config, *args, **kwargs: (frequencies, 1.0))
    parameters = {"rope_type": "still", "rope_theta": 50.0, "factor": 2.0}
    model = MiniGPTForCausalLM(rope_config(parameters))
    assert not model.model.rotary_emb.inv_freq.any()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"rope_type": "default", "rope_theta": 10000.0}),
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_type": None, "rope_theta": None, "factor": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_type": "linear", "factor": 2}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2}),
        # The ratio of the contexts, as in some models of transformers.
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
                "factor": CONTEXT / 16,
            },
        ),
    ],
)
def test_missing_keys_get_defaults(given, expected):
    assert rope_config(given).rope_parameters == expected


def test_older_names_are_accepted():
    parameters = rope_config(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5.0).rope_parameters
    assert (parameters["rope_type"], parameters["factor"], parameters["rope_theta"]) == ("linear", 2.0, 5.0)
    assert rope_config(partial_rotary_factor=0.5).rope_parameters["partial_rotary_factor"] == 0.5


LLAMA3, LONGROPE = rope_parameters("llama3", 1), rope_parameters("longrope", 1)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "alibi"}, ["rope_type='alibi'", "default", "longrope"]),
        ({"rope_type": "axial"}, ["rope_type='axial'"]),
        ({"rope_type": 3}, ["rope_type=3"]),
        ({"rope_type": ["linear"]}, ["rope_type=['linear']"]),
        *[
            ({"rope_theta": v}, [f"rope_theta={v!r}", "10000"])
            for v in (0, -5.0, float("inf"), float("nan"), "1e4", True)
        ],
        *[
            ({"partial_rotary_factor": v}, [f"partial_rotary_factor={v!r}", "above 0 and up to 1"])
            for v in (0, -0.5, 1.5, "half", float("nan"))
        ],
        ({"partial_rotary_factor": 0.2}, ["partial_rotary_factor=0.2", "3 rotated dimensions", "even"]),
        ({"partial_rotary_factor": 0.01}, ["partial_rotary_factor=0.01", "0 rotated dimensions"]),
        (
            {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.125},
            ["2 rotated dimensions", "at least 4"],
        ),
        ({"rope_type": "linear"}, ["rope_type='linear'", "factor"]),
        ({"rope_type": "dynamic"}, ["rope_type='dynamic'", "factor"]),
        ({"rope_type": "yarn"}, ["rope_type='yarn'", "factor"]),
        ({"rope_type": "longrope"}, ["rope_type='longrope'", "long_factor, short_factor"]),
        ({"rope_type": "llama3", "factor": 2.0}, ["high_freq_factor, low_freq_factor"]),
        ({"rope_type": "linear", "factor": 0.5}, ["factor=0.5", "at least 1"]),
        ({"rope_type": "linear", "factor": "2"}, ["factor='2'"]),
        ({"factor": 4.0}, ["factor=4.0", "rope_type='default'"]),
        ({"rope_type": "linear", "factor": 4.0, "beta_fast": 32}, ["beta_fast=32", "rope_type='linear'"]),
        ({"full_attention": {"rope_type": "default"}}, ["full_attention"]),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}, ["beta_fast=1", "beta_slow=2"]),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40}, ["beta_slow=40", "beta_fast=32"]),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, ["truncate='no'"]),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}, ["rope_theta=1"]),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}, ["attention_factor=0"]),
        ({**LLAMA3, "high_freq_factor": 1.0}, ["low_freq_factor=1.0", "high_freq_factor=1.0"]),
        ({**LLAMA3, "low_freq_factor": 0}, ["low_freq_factor=0"]),
        ({**LLAMA3, "original_max_position_embeddings": 0}, ["original_max_position_embeddings=0"]),
        ({**LONGROPE, "short_factor": [1.0] * 7}, ["short_factor", "7 numbers", "give 8"]),
        ({**LONGROPE, "partial_rotary_factor": 0.5}, ["short_factor", "8 numbers", "give 4"]),
        ({**LONGROPE, "long_factor": [0.0] * 8}, ["long_factor", "above 0"]),
        ({**LONGROPE, "long_factor": 2.0}, ["long_factor=2.0", "list"]),
        ([1], ["rope_parameters", "[1]"]),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused_by_name(parameters, words):
    with pytest.raises(Exception) as error:
        rope_config(parameters)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope_theta=None"),
        ({"rope_type": "linear", "rope_theta": 5.0}, "factor"),
        ({"rope_type": "nonsense", "rope_theta": 5.0}, "rope_type='nonsense'"),
        (None, "rope_theta=None"),
    ],
)
def test_a_checkpoint_loads_with_other_rope_parameters(parameters, word, tmp_path):
    MiniGPTForCausalLM(rope_config({"rope_theta": 5.0})).save_pretrained(tmp_path)
    whole = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    model = MiniGPTForCausalLM.from_pretrained(tmp_path, rope_parameters=whole)
    expected = MiniGPTForCausalLM(rope_config(whole)).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    with pytest.raises(ValueError, match=word):
        MiniGPTForCausalLM.from_pretrained(tmp_path, rope_parameters=parameters)


def test_a_changed_config_is_validated_again(tmp_path):
    config = rope_config({"rope_type": "linear", "factor": 2.0})
    config.rope_parameters["rope_type"] = "linaer"
    for use in (MiniGPTForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(Exception, match="rope_type='linaer'"):
            use(config)
