"""The presets equal independent implementations, written here with torch.nn's modules or plain tensors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, preset
from hf_minigpt.presets import BABY_RUNGS, PRESETS, baby_rung
from tests.tiny import NO_DROPOUT, gradients, random_ids, shake


# The post-norm decoder


class PostNormBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        attended, _ = self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        x = self.norm_1(x + attended)
        return self.norm_2(x + self.down(self.up(x).relu()))


class PostNormDecoder(nn.Module):
    def __init__(self, vocab_size: int, width: int, heads: int, inner: int, layers: int, length: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        position = torch.arange(length).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(length, width)
        table[:, 0::2] = torch.sin(position * frequency)
        table[:, 1::2] = torch.cos(position * frequency)
        self.register_buffer("table", table)
        self.blocks = nn.Sequential(*(PostNormBlock(width, heads, inner) for _ in range(layers)))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(ids) + self.table[: ids.shape[1]]))


@torch.no_grad()
def copy_post_norm(model: MiniGPTForCausalLM, oracle: PostNormDecoder) -> None:
    """Copy all parameters of MiniGPT to all of the stack."""
    source = dict(model.named_parameters())
    target = dict(oracle.named_parameters())

    def copy(name: str, *parts: str) -> None:
        target.pop(name).copy_(torch.cat([source.pop(part) for part in parts]))

    copy("embedding.weight", "model.embed_tokens.weight")
    for i in range(len(oracle.blocks)):
        for kind in ("weight", "bias"):
            projections = [f"model.layers.{i}.self_attn.{name}_proj.{kind}" for name in "qkv"]
            copy(f"blocks.{i}.attention.in_proj_{kind}", *projections)
            for name, ours in {
                "attention.out_proj": "self_attn.o_proj",
                "norm_1": "input_layernorm",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
                "norm_2": "post_attention_layernorm",
            }.items():
                copy(f"blocks.{i}.{name}.{kind}", f"model.layers.{i}.{ours}.{kind}")
    copy("head.weight", "lm_head.weight")
    copy("head.bias", "lm_head.bias")
    assert not source and not target


@torch.no_grad()
def enlarge_weights(model: MiniGPTForCausalLM) -> MiniGPTForCausalLM:
    """Set weights so that the positions stay distinct through twenty post-norm layers."""
    shake(model, std=0.1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            ends_branch = "o_proj" in name or "down_proj" in name
            parameter.mul_((2.0 if ends_branch else 10.0) * parameter.shape[1] ** -0.5)
    model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "sixteenth"),
    [("post-norm", {}), ("post-norm-deep", {"hidden_size": 128, "intermediate_size": 1024})],
    ids=["one layer", "deep, a sixteenth as wide"],
)
def test_post_norm_equals_a_stack_of_torch_modules(name, sixteenth):
    config = preset(name, **sixteenth)
    model = enlarge_weights(MiniGPTForCausalLM(config))
    oracle = PostNormDecoder(
        config.vocab_size,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        config.num_hidden_layers,
        length=64,
    )
    copy_post_norm(model, oracle)
    # In training mode torch's attention skips its fast path. It has no dropout.
    oracle.train()
    ids = random_ids(2, 64, vocab_size=config.vocab_size)
    with torch.no_grad():
        expected, logits = oracle(ids), model(ids).logits
    assert expected.std(1).mean() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    model(ids, labels=ids).loss.backward()
    F.cross_entropy(oracle(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(
        model.model.embed_tokens.weight.grad, oracle.embedding.weight.grad, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("name", "parameters"), [("post-norm", 3_127_784), ("post-norm-deep", 1_719_387_920)])
def test_post_norm_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert MiniGPTForCausalLM(preset(name)).num_parameters() == parameters


def test_post_norm_positions_have_dropout():
    model = MiniGPTForCausalLM(preset("post-norm", resid_pdrop=0.0, attn_pdrop=0.0)).train()
    assert model.config.embd_pdrop > 0
    torch.manual_seed(0)
    ids = random_ids(1, 4)
    assert not torch.equal(model(ids).logits, model(ids).logits)


# The ladder to Baby GPT


def baby_logits(state: dict[str, torch.Tensor], ids: torch.Tensor, config, **has: bool) -> torch.Tensor:
    """Compute Baby GPT as in the article, one head at a time, in float64; `has` lists the parts of the rung."""
    x = state["model.embed_tokens.weight"][ids]
    length, width = ids.shape[1], x.shape[-1]
    if has["attention"]:
        x = x + state["model.embed_positions.weight"][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x, name):
        if not has["norm"]:
            return x
        centred = x - x.mean(-1, keepdim=True)
        # Over the width, for each position.
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def join(x, branch):
        return x + branch if has["residual"] else branch

    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        inputs = norm(x, f"{name}.input_layernorm")
        heads = []
        for head in range(config.num_attention_heads):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            query, key, value = (inputs @ state[f"{name}.self_attn.{p}_proj.weight"][rows].T for p in "qkv")
            scores = (query @ key.transpose(1, 2) * width**-0.5).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ value)
        attended = torch.cat(heads, -1) @ state[f"{name}.self_attn.o_proj.weight"].T
        x = join(x, attended + state[f"{name}.self_attn.o_proj.bias"])
        if has["mlp"]:
            inputs = norm(x, f"{name}.post_attention_layernorm")
            inner = (inputs @ state[f"{name}.mlp.up_proj.weight"].T + state[f"{name}.mlp.up_proj.bias"]).clamp(min=0)
            x = join(x, inner @ state[f"{name}.mlp.down_proj.weight"].T + state[f"{name}.mlp.down_proj.bias"])
    if has["attention"]:
        x = norm(x, "model.norm")
    return x @ state["lm_head.weight"].T + state["lm_head.bias"]


# The part that each rung adds. The last two add dropout and size.
IDEAS = ["attention", "several", "mlp", "deep", "residual", "norm"]
RUNG_HEIGHTS = dict(zip(BABY_RUNGS, [0, 1, 2, 3, 4, 5, 6, 6, 6], strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("name", BABY_RUNGS)
@pytest.mark.parametrize("base", ["baby", "baby-large"])
def test_each_rung_equals_the_article(name, base):
    config = baby_rung(name, base, vocab_size=61)
    model = shake(MiniGPTForCausalLM(config).double(), std=config.hidden_size**-0.5)
    has = {idea: height < RUNG_HEIGHTS[name] for height, idea in enumerate(IDEAS)}
    assert (config.num_attention_heads > 1) == has["several"] or name == "bigram"
    assert (config.num_hidden_layers > 1) == has["deep"]
    ids = random_ids(2, config.max_position_embeddings, vocab_size=61)
    with torch.no_grad():
        logits = model(ids).logits
    expected = baby_logits(model.state_dict(), ids, config, **has)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    float32 = model.float()(ids).logits
    torch.testing.assert_close(float32.double(), expected, atol=1e-5 * max(expected.std().item(), 1), rtol=0)


def test_baby_sizes_are_those_of_the_article():
    small, large = preset("baby"), preset("baby-large")
    for config, sizes in ((small, (16, 4, 2, 2, 8)), (large, (512, 16, 6, 6, 256))):
        assert sizes == (
            config.hidden_size,
            config.head_dim,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.max_position_embeddings,
        )
        assert config.attn_pdrop == config.resid_pdrop == 0.2
    bigram = baby_rung("bigram", vocab_size=61)
    assert (bigram.hidden_size, bigram.num_hidden_layers) == (61, 0)
    one, several = baby_rung("one-head", "baby-large"), baby_rung("several-heads", "baby-large")
    assert one.num_attention_heads * one.head_dim == several.num_attention_heads * several.head_dim == 96
    assert baby_rung("dropout").to_dict() == preset("baby").to_dict()
    assert baby_rung("blocks", n_layer=5).num_hidden_layers == 5
    with pytest.raises(ValueError, match=r"rung 'ladder' is unknown\. Choose one of bigram, one-head"):
        baby_rung("ladder")


# GPT-2 for BookCorpus


def test_gpt2_bookcorpus_differs_from_gpt2_in_gelu_and_context():
    own = {"max_position_embeddings": 512, "hidden_act": "gelu"}
    assert PRESETS["gpt2-bookcorpus"] == PRESETS["gpt2"] | own
    with torch.device("meta"):
        sizes = {name: MiniGPTForCausalLM(preset(name)).num_parameters() for name in PRESETS if name[:4] == "gpt2"}
    assert sizes == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "gpt2-bookcorpus": 124_439_808 - 512 * 768,
    }


# GPT-1

GPT1_SIZES = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "vocab_size": 67}
PAD = 66


def gpt1_classifier(**fields) -> MiniGPTForSequenceClassification:
    fields = GPT1_SIZES | NO_DROPOUT | {"pad_token_id": PAD, "num_labels": 2} | fields
    return shake(MiniGPTForSequenceClassification(preset("gpt1", **fields)))


def plain_classification_loss(model, reviews, labels, weight) -> torch.Tensor:
    """Compute mean cross entropy + weight * mean of the reviews' token means, one review at a time."""
    losses = []
    for ids, label in zip(reviews, labels, strict=True):
        hidden = model.model(ids[None]).last_hidden_state[0]
        loss = F.cross_entropy(model.score(hidden[-1]), label)
        if weight:
            loss = loss + weight * F.cross_entropy(model.lm_head(hidden[:-1]), ids[1:])
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_trainer_accumulates_the_auxiliary_loss(weight, tmp_path):
    """One step with uneven micro-batches equals a plain computation on the whole batch."""
    lengths = [3, 30, 7, 12, 5, 21, 9, 2, 17]
    reviews = [random_ids(length, vocab_size=PAD, seed=length) for length in lengths]
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    model = gpt1_classifier(auxiliary_lm_weight=weight)
    expected = plain_classification_loss(model, reviews, labels, weight)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    def collate(rows):
        ids = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True, padding_value=PAD)
        labels = torch.stack([row["label"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}

    found = {}

    class GradientRecorder(Trainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            optimizer.register_step_pre_hook(lambda *_: found.update(gradients(self.model)))
            return optimizer

    trainer = GradientRecorder(
        model=model,
        args=TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=5,
            max_steps=1,
            max_grad_norm=0.0,
            logging_steps=1,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"ids": ids, "label": label} for ids, label in zip(reviews, labels, strict=True)],
        data_collator=collate,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


HEAD_MASK = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> tuple[MiniGPTForCausalLM, MiniGPTForCausalLM]:
    """Return a GPT-1 whose head mask prunes three heads, saved and loaded, and one whose o_proj is zeroed instead."""
    sizes = GPT1_SIZES | {"n_positions": 64}
    folder = tmp_path_factory.mktemp("pruned")
    model = shake(MiniGPTForCausalLM(preset("gpt1", **sizes, head_mask=HEAD_MASK)))
    model.save_pretrained(folder)
    zeroed = shake(MiniGPTForCausalLM(preset("gpt1", **sizes)))
    with torch.no_grad():
        for block, heads in zip(zeroed.model.layers, HEAD_MASK, strict=True):
            for head, factor in enumerate(heads):
                # Each head has 8 columns of the output projection.
                block.self_attn.o_proj.weight[:, head * 8 : (head + 1) * 8] *= factor
    return AutoModelForCausalLM.from_pretrained(folder), zeroed


def test_a_pruned_head_scores_as_a_zeroed_head(pruned):
    model, zeroed = pruned
    assert model.config.head_mask == HEAD_MASK
    ids = random_ids(2, 24)
    with torch.no_grad():
        logits, expected = model(ids).logits, zeroed(ids).logits
        whole = MiniGPTForCausalLM(preset("gpt1", **GPT1_SIZES | {"n_positions": 64})).eval()
        whole.load_state_dict(model.state_dict())
        assert (whole(ids).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_a_pruned_head_scores_as_a_zeroed_head_token_by_token(cache, pruned):
    ids = random_ids(2, 24)

    @torch.no_grad()
    def answers(model):
        if cache == "none":
            return torch.stack([model(ids[:, : i + 1], use_cache=False).logits[:, -1] for i in range(24)], 1)
        past = StaticCache(config=model.config, max_cache_len=32) if cache == "static" else None
        parts = []
        for part in ids.split([10, *[1] * 14], dim=1):
            output = model(part, past_key_values=past, use_cache=True)
            past = output.past_key_values
            parts.append(output.logits)
        return torch.cat(parts, 1)

    model, zeroed = pruned
    torch.testing.assert_close(answers(model), answers(zeroed), atol=1e-5, rtol=0)
    torch.testing.assert_close(answers(model), zeroed(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kwargs", [{"use_cache": False}, {}, {"cache_implementation": "static"}], ids=["none", "dynamic", "static"]
)
def test_a_pruned_head_generates_as_a_zeroed_head(kwargs, pruned):
    prompt = random_ids(2, 6)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": PAD,
    }
    texts = [model.generate(prompt, **options, **kwargs) for model in pruned]
    assert torch.equal(*texts)


def test_a_pruned_head_generates_batches_as_a_zeroed_head(pruned):
    prompts = [random_ids(length, seed=length).tolist() for length in (4, 9)]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    # A few small pages. By default the paged cache takes most of the memory.
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=64)
    model, zeroed = pruned
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=batching)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        alone = zeroed.generate(torch.tensor([prompt]), generation_config=config)
        assert generated[tuple(prompt)] == alone[0, len(prompt) :].tolist()
