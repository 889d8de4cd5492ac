"""The pretended GPU refuses and counts what a GPU would."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .pretended_gpu import PretendedTensor, count_syncs, pretended_gpu, record_attention, to_cpu, to_gpu


@pytest.fixture(autouse=True)
def gpu():
    with pretended_gpu():
        yield


def test_a_result_is_the_cpus_on_the_gpu():
    x = torch.arange(6.0, device="cuda").view(2, 3)
    y = (x.mT @ x + torch.ones(3, 3, device="cuda:0"))[1:]
    assert isinstance(y, PretendedTensor) and y.is_cuda and y.device == torch.device("cuda:0")
    assert torch.equal(to_cpu(y), (torch.arange(6.0).view(2, 3).mT @ torch.arange(6.0).view(2, 3) + 1)[1:])


def test_gradients_equal_the_cpus():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    F.gelu(layer(x)).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    F.gelu(to_gpu(layer)(to_gpu(x))).sum().backward()
    assert layer.weight.grad.is_cuda
    torch.testing.assert_close(to_cpu(layer.weight.grad), expected)


MIXED = {
    "add": lambda x: x + torch.ones(2),
    "add to the CPU": lambda x: torch.zeros(()).add_(x[0]),
    "matmul": lambda x: x @ torch.ones(2),
    "cat": lambda x: torch.cat([x, torch.ones(2)]),
    "embedding": lambda x: F.embedding(torch.tensor([1]), x[:, None]),
    "index_put": lambda x: x.index_put((torch.tensor([0, 1], device="cuda"),), torch.ones(2)),
    "fused AdamW": lambda x: torch._fused_adamw_(
        [x], [x], [x], [x], [], [torch.ones(())], lr=1.0, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1.0,
        amsgrad=False, maximize=False,
    ),
    "numpy": lambda x: x.numpy(),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_refused(name):
    with pytest.raises((RuntimeError, TypeError), match="device"):
        MIXED[name](torch.ones(2, device="cuda"))


def test_scalars_on_the_cpu_are_not_refused():
    assert (torch.ones(2, device="cuda") * torch.tensor(2.0)).is_cuda


SYNCS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0]),
    "index by a tensor's value": lambda x: x[: x.sum().long()],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "copy_ to the CPU": lambda x: torch.empty(3).copy_(x),
    "copy_ from the CPU": lambda x: x.copy_(torch.empty(3)),
    "to cuda": lambda x: torch.ones(2).to(x.device),
    "cuda()": lambda x: torch.ones(2).cuda(),
    "to another tensor's device": lambda x: torch.ones(2).to(x),
    "torch.tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean index assignment": lambda x: x.__setitem__(x > 0, torch.full_like(x[:2], 2.0)),
    "index by a list": lambda x: x[[0, 1]],
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "bincount": lambda x: x.long().bincount(),
}


@pytest.mark.parametrize("name", SYNCS)
def test_a_sync_is_counted_with_its_line(name):
    x = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    with count_syncs() as syncs:
        SYNCS[name](x)
    assert syncs.total() >= 1
    line = SYNCS[name].__code__.co_firstlineno
    assert {place for _, place in syncs} == {f"tests/test_pretended_gpu.py:{line}"}


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x[x.long()] + x[1:].sum() * x[None, 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: torch.ones(3).to("cuda", non_blocking=True) + torch.full((3,), 2.0, device="cuda"),
        lambda x: x.to("cuda").to(torch.float16).to(x.device),
        lambda x: x.repeat_interleave(x.long(), output_size=3),
        lambda x: torch.tensor([], device="cuda"),
        lambda x: x.masked_fill(x > 0, 1.0).where(x > 1, x).cumsum(0),
    ],
)  # fmt: skip
def test_nothing_else_is_counted(run):
    x = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    with count_syncs() as syncs:
        run(x)
    assert not syncs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_on_a_gpu(dtype):
    x = torch.ones(2, 4, device="cuda")
    with torch.autocast("cuda", dtype):
        half = F.linear(x, x)
        assert half.dtype == (x @ x.mT).dtype == torch.einsum("ij,kj->ik", x, x).dtype == dtype
        assert (half + half).dtype == F.gelu(half).dtype == dtype
        assert F.softmax(half, -1).dtype == F.layer_norm(half, (2,)).dtype == half.pow(2).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (half @ half).dtype == F.softmax(half, -1).dtype == dtype
    assert F.linear(x, x).dtype == torch.float32


def test_autocast_is_differentiated():
    layer = to_gpu(nn.Linear(4, 4))
    with torch.autocast("cuda", torch.bfloat16):
        layer(layer(torch.ones(2, 4, device="cuda"))).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_attention_is_recorded_before_autocast():
    query = torch.randn(1, 2, 3, 4, device="cuda")
    with record_attention() as calls, torch.autocast("cuda", torch.bfloat16):
        output = F.scaled_dot_product_attention(query, query, query.bfloat16(), is_causal=True)
    assert output.dtype == torch.bfloat16
    [call] = calls
    assert (call.query, call.key, call.value) == (torch.float32, torch.float32, torch.bfloat16)
    assert call.is_causal and not call.has_mask and call.shape == (1, 2, 3, 4)


def test_attention_refuses_mixed_dtypes():
    query = torch.randn(1, 2, 3, 4, device="cuda")
    with pytest.raises(RuntimeError, match="dtype"):
        F.scaled_dot_product_attention(query, query, query.bfloat16())


def test_a_module_keeps_its_ties_and_can_be_cast():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    to_gpu(model)
    assert model[1].weight is model[0].weight
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    model.bfloat16()
    assert model(torch.ones(2, 3, dtype=torch.bfloat16, device="cuda")).dtype == torch.bfloat16
    assert to_cpu(model[0].weight).dtype == torch.bfloat16
    assert model.to("cuda")[1].weight is model[0].weight
