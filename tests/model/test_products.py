"""The products equal `F.linear` in either library, and leave to `F.linear` what oneDNN does not support."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.model import loss_minigpt
from hf_minigpt.model import products_minigpt as products
from hf_minigpt.model.loss_minigpt import linear_cross_entropy
from tests.tiny import SWITCHES, gradients, needs_fast_paths, random_ids, tiny_model


needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch is built without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch):
    """Use oneDNN for any processor and size. Return the list of shapes that it multiplies."""
    if not products.fast_paths_enabled():
        pytest.skip("the fast paths are turned off")
    calls = []
    run = products.run_onednn

    def counted(left, right, bias=None):
        calls.append((tuple(left.shape), tuple(right.shape)))
        return run(left, right, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_ROWS", 1)
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(products, "run_onednn", counted)
    return calls


def operands(shape, num_outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [(*shape,), (num_outputs, shape[-1]), (num_outputs,)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in tensors]


@needs_onednn
@pytest.mark.parametrize("shape, num_outputs", [((5, 3), 7), ((2, 9, 8), 3), ((2, 3, 4, 16), 16), ((1, 6), 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives_equal_those_of_linear(shape, num_outputs, bias, onednn):
    def derivatives(linear, dtype):
        inputs, weight, offset = operands(shape, num_outputs, dtype)
        wanted = (inputs, weight, offset) if bias else (inputs, weight)
        output = linear(inputs, weight, offset if bias else None)
        first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)
        return output, *first, *second

    actual = derivatives(products.linear, torch.float32)
    assert len(onednn) >= 3
    for a, b in zip(actual, derivatives(F.linear, torch.float64), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4 * b.abs().max().item())


@needs_onednn
def test_operands_may_have_any_strides(onednn):
    inputs, weight, bias = (tensor.detach() for tensor in operands((6, 10), 12))
    for x, w in [
        (inputs.t().contiguous().t(), weight),
        (inputs[:, ::2], weight[:, ::2]),
        (inputs.t(), weight.t()[:, :6]),
    ]:
        b = bias[: w.shape[0]]
        expected = F.linear(x.double(), w.double(), b.double())
        torch.testing.assert_close(products.linear(x, w, b).double(), expected, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 3


@needs_onednn
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "bigram"])
def test_a_model_on_onednn_computes_the_same(name, skip_logits, onednn):
    ids = random_ids(3, 9)
    expected = tiny_model(name).train()
    with torch.backends.mkldnn.flags(enabled=False):
        loss = expected(ids, labels=ids, skip_logits=skip_logits).loss
        loss.backward()
    assert not onednn
    model = tiny_model(name).train()
    actual = model(ids, labels=ids, skip_logits=skip_logits).loss
    actual.backward()
    assert len(onednn) > 3 * len(model.model.layers)
    torch.testing.assert_close(actual, loss, rtol=1e-5, atol=1e-5)
    expected_gradients = gradients(expected)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-5)


@needs_onednn
def test_the_chunked_loss_sums_its_chunks(onednn, monkeypatch):
    monkeypatch.setitem(loss_minigpt.CHUNK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(loss_minigpt, "MIN_CHUNK_ROWS", 4)
    hidden, weight, bias = operands((11, 8), 13)
    targets = torch.arange(11)
    loss, hits = linear_cross_entropy(hidden, weight, bias, targets, softcap=5.0, num_ids=12, count_correct=True)
    actual = torch.autograd.grad(loss, (hidden, weight, bias))
    # 11 rows are padded to 16: four chunks of three products.
    assert len(onednn) == 12
    hidden, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias))
    logits = (5 * torch.tanh(F.linear(hidden, weight, bias) / 5))[:, :12]
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert hits == (logits.argmax(1) == targets).sum()
    for a, b in zip(actual, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_unsupported_inputs_use_linear(onednn):
    inputs, weight, _ = operands((6, 4), 5)
    linear = products.linear
    linear(inputs.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(inputs, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(inputs, weight)
    torch.func.vmap(linear, (0, None))(inputs[None], weight)
    torch.func.grad(lambda x: linear(x, weight).sum())(inputs)
    torch.compile(linear, backend="eager", fullgraph=True)(inputs, weight)
    torch.jit.trace(linear, (inputs.detach(), weight.detach()), check_trace=False)
    assert linear(inputs[:0], weight).shape == (0, 5)
    assert linear(inputs.to("meta"), weight.to("meta")).shape == (6, 5)
    assert not onednn
    linear(inputs, weight)
    assert len(onednn) == 1


@needs_onednn
def test_many_lengths_compile_few_shapes(onednn):
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.zeros(5, requires_grad=True)
    for length in range(1, 400):
        inputs = torch.randn(length, 4, requires_grad=True)
        products.linear(inputs, weight, bias).sum().backward()
        assert inputs.grad.shape == (length, 4)
        linear_cross_entropy(inputs, weight, bias, torch.arange(length) % 5)[0].backward()
    numbers = {products.round_up_rows(length) for length in range(1, 400)}
    assert len(numbers) == 16 + 8 + 4 + 1
    assert {shape[0] for shape, _ in onednn} <= numbers | {4, 5}
    assert {shape[1] for shape, _ in onednn} <= numbers | {4, 5}
    assert all(length <= products.round_up_rows(length) < length * 1.125 + 8 for length in range(1, 5000))
    assert [products.round_up_rows(2**i) for i in range(3, 20)] == [2**i for i in range(3, 20)]


@needs_fast_paths
def test_small_products_do_not_use_onednn(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    weight = torch.zeros(1024, 512)
    assert products.uses_onednn(torch.zeros(8, 512), weight)
    assert not products.uses_onednn(torch.zeros(7, 512), weight)
    assert not products.uses_onednn(torch.zeros(8, 64), weight[:, :64])


@pytest.mark.parametrize(
    "cpuinfo, capability, expected",
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
    ],
)
def test_onednn_is_faster_on_amd_with_avx512(cpuinfo, capability, expected, monkeypatch):
    monkeypatch.setattr(products, "processor_description", lambda: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.onednn_is_faster.__wrapped__() is (expected and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products.onednn_is_faster.__wrapped__()


def quantized(dtype):
    return lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)


def pruned(model):
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            prune.l1_unstructured(module, "weight", amount=0.3)
    return model


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def replaced(model):
    """Replace each linear layer by a custom one, as quantizers do."""

    class Rounded(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, inputs):
            return F.linear(inputs, (self.linear.weight * 8).round() / 8, self.linear.bias)

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Rounded(child))
    return model


# Each tool's change of a model, and the tolerance of the logits afterwards; None where the tool changes them.
TOOLS = {
    "int8": (quantized(torch.qint8), 0.4),
    "float16": (quantized(torch.float16), 0.01),
    "pruning": (pruned, None),
    "adapters": (adapted, None),
    "custom_layers": (replaced, None),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("name", ["gpt2", "modern"])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_change_every_layer(tool, name):
    """Tools find the layers as `nn.Linear`, and logits, loss and generated ids are those of the changed layers."""
    change, tolerance = TOOLS[tool]
    model = tiny_model(name)
    ids = random_ids(2, 9)
    # Fill what single-token decoding caches.
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        before = model(ids).logits[..., :67]
    changed = change(model).eval()
    if tolerance is not None:
        assert not any(type(module) is nn.Linear for module in changed.modules())
    with torch.no_grad():
        output = changed(ids, labels=ids)
        difference = (output.logits[..., :67] - before).abs().max().item()
        assert 0 < difference < tolerance if tolerance else difference > 0.1
        without = changed(ids, labels=ids, skip_logits=True)
        torch.testing.assert_close(without.loss, output.loss)
        written = changed.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for position in range(9, 14):
            logits = changed(written[:, :position]).logits[:, -1]
            chosen = logits.gather(1, written[:, position : position + 1])[:, 0]
            # int8 rounds the activations of one token differently than those of all tokens.
            assert (logits.amax(-1) - chosen < (0.4 if tool == "int8" else 1e-4)).all()


def test_tools_change_every_layer_of_a_classifier():
    model = tiny_model("gpt2", model_class=MiniGPTForSequenceClassification, num_labels=3, pad_token_id=66)
    ids, mask = random_ids(2, 9, vocab_size=66), torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        smaller = quantized(torch.float16)(model)
        assert not any(type(module) is nn.Linear for module in smaller.modules())
        logits = smaller(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits, rtol=0.01, atol=0.01)


@needs_onednn
def test_every_matrix_uses_onednn(onednn):
    model = tiny_model("modern")
    model(random_ids(2, 9))
    # Query, key, value, output, up and down projections per block, and the head.
    assert len(onednn) == 6 * len(model.model.layers) + 1


@needs_onednn
def test_hooked_and_adapted_layers_are_called_and_use_onednn(onednn):
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, inputs):
            return self.base_layer(inputs) + 1

    layer = nn.Linear(4, 5)
    inputs = torch.randn(6, 4)
    expected = layer(inputs)
    assert not onednn
    torch.testing.assert_close(products.project(Adapter(layer), inputs), expected + 1)
    assert len(onednn) == 1

    class CallsByName(nn.Linear):
        def forward(self, inputs):
            return F.linear(input=inputs, weight=self.weight, bias=self.bias)

    by_name = CallsByName(4, 5)
    by_name.load_state_dict(layer.state_dict())
    torch.testing.assert_close(products.project(by_name, inputs), expected)
    assert len(onednn) == 2
    layer.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(products.project(layer, inputs), expected * 2)
    assert len(onednn) == 3
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    products.project(nn.Linear(4, 5), inputs)
    handle.remove()
    assert seen == [nn.Linear] and len(onednn) == 4
