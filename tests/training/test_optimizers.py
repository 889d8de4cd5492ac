"""The optimizers agree with singular values, torch's AdamW and torch's Muon."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM
from hf_minigpt.model.products_minigpt import fast_paths
from hf_minigpt.training.lora import LoraArguments, add_lora
from hf_minigpt.training.muon import orthogonalize
from hf_minigpt.training.optimizers import (
    MuonAdamW,
    OptimizerFactory,
    adamw_decaying_matrices,
    hidden_matrices,
    muon_adamw,
    optimizer_cls_and_kwargs,
)
from tests.pretended_gpu import GPU, count_syncs, pretended_gpu, to_gpu
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


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 32, 24)])
def test_fused_products_of_newton_schulz_equal_separate_ones(shape):
    """baddbmm, against the products of oneDNN with passes of their own where a CPU has them."""
    matrices = torch.randn(shape)
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    with fast_paths(False):
        torch.testing.assert_close(orthogonalize(matrices), x, atol=1e-5, rtol=0)


def test_stacks_are_bounded():
    """With room for two matrices, the result is that of one stack."""
    weights, grads = torch.randn(5, 12, 12), torch.randn(5, 12, 12)
    results, stacks = [], []

    def backend(graph, inputs):
        def run(*args):
            stacks.append(next(len(a) for a in args if isinstance(a, torch.Tensor)))
            return graph(*args)

        return run

    for bound in (2**28, 2 * 12 * 12 * 4):
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        torch._dynamo.reset()
        MuonAdamW([{"params": parameters, "kind": "muon"}], max_stack_bytes=bound, compile_backend=backend).step()
        results.append(torch.stack(list(parameters)))
    assert stacks == [5, 2, 2, 1]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


def test_compiled_iterations_are_not_compiled_again_when_settings_change():
    """Learning rate and momentum change in each step, and there are different numbers of the matrices."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    shapes = [(24, 24), (24, 96), (96, 24), (32, 32), (32, 128), (128, 32)]
    weights = [nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes) for _ in range(2 + i % 3)]
    twins = copy.deepcopy(weights)
    compiled = MuonAdamW([{"params": weights, "kind": "muon"}], lr=0.1, compile_backend=counter)
    eager = MuonAdamW([{"params": twins, "kind": "muon"}], lr=0.1)
    for step in range(20):
        for a, b in zip(weights, twins, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.9**step
            optimizer.step()
        if step == 0:
            compilations = counter.frame_count
    # square and wide
    assert compilations == counter.frame_count == 2
    for a, b in zip(weights, twins, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def arguments(**changes) -> SimpleNamespace:
    settings = {"optimizer": "muon", "learning_rate": 1e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
    settings |= {"embedding_learning_rate": None, "muon_scaling": "original", "adam_epsilon": 1e-8}
    settings |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "world_size": 1, "parallelism_config": None}
    settings |= {"torch_compile": True, "torch_compile_backend": "eager", "device": GPU}
    return SimpleNamespace(**(settings | changes))


def test_torch_compile_compiles_the_iterations_on_a_gpu():
    assert optimizer_cls_and_kwargs(arguments())[1]["compile_backend"] == "eager"
    for changes in ({"torch_compile": False}, {"device": torch.device("cpu")}):
        assert "compile_backend" not in optimizer_cls_and_kwargs(arguments(**changes))[1]


@pytest.mark.parametrize("distributed_type", ["NO", "FSDP", "DEEPSPEED", "XLA"])
def test_only_copies_of_a_model_share_the_work(distributed_type):
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=distributed_type))
    args = arguments(world_size=2, distributed_state=state)
    assert optimizer_cls_and_kwargs(args)[1]["process_group"] is None


@pytest.mark.parametrize("in_bf16", [True, False], ids=["bf16", "no bf16"])
@pytest.mark.parametrize("switches", list(SWITCHES))
def test_a_step_never_waits_for_the_gpu(switches, in_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: in_bf16)
    with pretended_gpu():
        model = to_gpu(tiny_model(switches))
        optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with count_syncs() as syncs:
            for _ in range(3):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
        assert not syncs
        assert {state.device for states in optimizer.state.values() for state in states.values()} == {GPU}


def test_hidden_matrices_of_lora_are_its_own():
    model = add_lora(tiny_model(), LoraArguments(lora_rank=2))
    names = dict(model.named_parameters())
    assert hidden_matrices(model)
    for name, weight in hidden_matrices(model).items():
        assert names[name] is weight and "lora_" in name
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.02)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
