"""The optimizers agree with singular values, torch's AdamW and torch's Muon."""

import copy

import pytest
import torch
from torch import nn

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM
from hf_minigpt.training.muon import orthogonalize
from hf_minigpt.training.optimizers import (
    MuonAdamW,
    OptimizerFactory,
    adamw_decaying_matrices,
    hidden_matrices,
    muon_adamw,
)
from tests.tiny import NO_DROPOUT, SIZES, SWITCHES


def tiny_model(switches: str = "modern") -> MiniGPTForCausalLM:
    return MiniGPTForCausalLM(MiniGPTConfig(**(SIZES | NO_DROPOUT | SWITCHES[switches])))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(60, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_newton_schulz_approximates_the_polar_factor(shape):
    matrix = torch.randn(shape)
    u, singular_values, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    # the same singular vectors, and singular values pushed towards 1
    rotated = u.T @ result @ vh.T
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), atol=1e-4, rtol=0)
    large = singular_values > 0.1 * singular_values[0]
    assert rotated.diagonal()[large].min() > 0.65
    assert rotated.diagonal().max() < 1.25


@pytest.mark.parametrize("shape", [(3, 48, 48), (3, 96, 48), (48, 200)])
def test_newton_schulz_in_float32_agrees_with_float64(shape):
    # singular values over four orders of magnitude, like those of gradients
    spectrum = torch.logspace(0, -4, shape[-1])
    matrices = torch.randn(shape) * spectrum
    x = matrices.double()
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    torch.testing.assert_close(orthogonalize(matrices).double(), x, atol=1e-4, rtol=0)


def test_newton_schulz_of_a_batch_equals_that_of_each_matrix():
    matrices = torch.randn(5, 12, 30)
    torch.testing.assert_close(orthogonalize(matrices), torch.stack([orthogonalize(m) for m in matrices]))


@pytest.mark.parametrize(("scaling", "adjust_lr_fn"), [("original", "original"), ("moonlight", "match_rms_adamw")])
def test_muon_steps_match_torch(scaling, adjust_lr_fn):
    shapes = [(16, 48), (16, 48), (48, 16), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    optimizer = MuonAdamW([{"params": ours, "kind": "muon"}], lr=0.1, weight_decay=0.2, scaling=scaling)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn=adjust_lr_fn)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # torch iterates in bfloat16, which has 8 bits
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_adamw_steps_match_torch():
    ours = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizer = MuonAdamW([{"params": ours, "kind": "adamw"}], **options)
    reference = torch.optim.AdamW(theirs, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("switches", list(SWITCHES))
def test_every_parameter_is_in_the_right_group_exactly_once(switches):
    model = tiny_model(switches)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(names.values())
    for name, group in grouped:
        is_hidden = name.startswith("model.layers.") and name.endswith("_proj.weight")
        assert group["kind"] == ("muon" if is_hidden else "adamw"), name
        is_table = name.startswith("model.embed_")
        rest = 0.3 * model.config.initializer_range if is_table else 1e-3
        assert group["lr"] == (0.02 if is_hidden else rest), name
        assert group["weight_decay"] == (0.0 if model.get_parameter(name).ndim < 2 else 0.1), name


def test_frozen_parameters_are_not_optimized():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.02, embedding_learning_rate=0.5)
    lr_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert lr_of[id(model.model.embed_tokens.weight)] == 0.5
    assert id(model.lm_head.weight) not in lr_of
    assert id(model.model.layers[0].mlp.up_proj.weight) not in lr_of
    assert "model.layers.0.mlp.up_proj.weight" not in hidden_matrices(model)


def test_state_round_trips_exactly():
    options = {"learning_rate": 0.01, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
    straight = tiny_model()
    optimizer = muon_adamw(straight, **options)
    train(straight, optimizer, 3)
    resumed = copy.deepcopy(straight)
    loaded = muon_adamw(resumed, **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["kind"] for group in loaded.param_groups] == [group["kind"] for group in optimizer.param_groups]
    train(straight, optimizer, 3, first=3)
    train(resumed, loaded, 3, first=3)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_parameter_tensors_may_be_replaced_after_construction():
    """As accelerate does while it prepares a model."""
    model = tiny_model()
    twin = copy.deepcopy(model)
    options = {"learning_rate": 0.01, "matrix_learning_rate": 0.02}
    optimizer, reference = muon_adamw(model, **options), muon_adamw(twin, **options)
    for parameter in model.parameters():
        data = parameter.data
        parameter.data = torch.empty(1)
        parameter.data = data.clone()
    train(model, optimizer, 2)
    train(twin, reference, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_scheduler_scales_every_group():
    optimizer = muon_adamw(tiny_model(), learning_rate=0.01, matrix_learning_rate=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] / group["initial_lr"] for group in optimizer.param_groups] == [0.5] * 3


def test_adamw_decays_matrices_only():
    model = tiny_model("gpt2")
    optimizer = OptimizerFactory()(model, kind="adamw", learning_rate=0.1, weight_decay=0.5)
    assert type(optimizer) is torch.optim.AdamW
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim >= 2}
    assert len(adamw_decaying_matrices(model, learning_rate=0.1).param_groups) == 2


def test_invalid_groups_and_scaling_are_refused():
    with pytest.raises(ValueError, match="kind='muon'"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "kind": "muon"}])
    with pytest.raises(ValueError, match="kind='sgd'"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "kind": "sgd"}])
    with pytest.raises(ValueError, match="scaling='big'"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "kind": "adamw"}], scaling="big")
