"""The head as a GPU runs it, tested on a CPU: compiled passes over chunks, aligned rows, no wait, few compilations."""

import re
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.model import loss_minigpt
from hf_minigpt.model.loss_minigpt import choose_chunk_rows, chunk_losses, chunk_losses_in_place, linear_cross_entropy
from tests.pretended_gpu import count_syncs, pretended_gpu, to_cpu, to_gpu
from tests.tiny import gradients, needs_fast_paths, random_ids, tiny_model


pytestmark = needs_fast_paths
ROWS, COLUMNS, NUM_IDS = 33, 70, 67


@pytest.fixture
def compiled_on_cpu(monkeypatch):
    """Chunks of 16 rows, whose passes are compiled as on a GPU, but without Inductor. Returns their compile counter."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunk_losses, backend=counter, fullgraph=True)
    monkeypatch.setattr(loss_minigpt, "compiled_chunk_losses", lambda: compiled)
    monkeypatch.setattr(loss_minigpt, "COMPILED_DEVICES", {"cpu"})
    monkeypatch.setattr(loss_minigpt, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setitem(loss_minigpt.CHUNK_ELEMENTS, "cpu", 1)
    return counter


def plain_loss(hidden, weight, bias, targets, row_weights, softcap, num_ids=NUM_IDS):
    """The definition, in float64: the weighted sum of the losses of targets that are not ignored, and the hits."""
    logits = hidden.double() @ weight.double().t()
    logits = logits if bias is None else logits + bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits[:, :num_ids], targets, reduction="none", ignore_index=-100)
    return (losses * row_weights.double()).sum(), (logits[:, :num_ids].argmax(1) == targets).sum()


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_passes_do_what_the_eager_ones_do(dtype, softcap, need_grad):
    product = (3 * torch.randn(ROWS, COLUMNS)).to(dtype)
    bias, row_weights = torch.randn(COLUMNS), torch.rand(ROWS, 1)
    targets = torch.randint(NUM_IDS, (ROWS, 1))
    targets[::5] = product[::5, :NUM_IDS].float().add(bias[:NUM_IDS]).argmax(1, keepdim=True)
    row_weights[::4], targets[::4] = 0, -1
    results = []
    for compute in (chunk_losses, chunk_losses_in_place):
        for weights in (None, row_weights):
            logits = product.clone()
            arguments = [logits, bias, targets.clamp(min=0) if weights is None else targets, weights]
            arguments += [softcap, NUM_IDS, True, need_grad, need_grad]
            if compute is chunk_losses_in_place:
                arguments.append(lambda _: torch.empty(ROWS, COLUMNS))
            total, num_correct, grad_bias = compute(*arguments)
            kept = logits if weights is None else logits[row_weights[:, 0] > 0]
            results.append((total, num_correct, grad_bias, kept if need_grad else None))
    for found, expected in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found[:3], expected[:3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[3], expected[3], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap, with_bias", [(None, False), (5.0, True)])
def test_compiled_chunks_equal_autograd(softcap, with_bias, compiled_on_cpu):
    hidden, weight = torch.randn(40, 24, requires_grad=True), torch.randn(COLUMNS, 24, requires_grad=True)
    bias = torch.randn(COLUMNS, requires_grad=True) if with_bias else None
    targets, row_weights = torch.randint(NUM_IDS, (40,)), torch.rand(40)
    targets[::7] = -100
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected, hits = plain_loss(hidden, weight, bias, targets, row_weights, softcap)
    total, num_correct = linear_cross_entropy(
        hidden, weight, bias, targets, row_weights=row_weights, softcap=softcap, num_ids=NUM_IDS, count_correct=True
    )
    assert compiled_on_cpu.frame_count > 0 and num_correct == hits
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
    found_gradients = torch.autograd.grad(total * 0.3, inputs)
    for found, gradient in zip(found_gradients, torch.autograd.grad(expected * 0.3, inputs), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["plain", "autocast", "bfloat16", "model compiled", "float16 under autocast"])
@pytest.mark.parametrize("name", ["rope", "modern"])
def test_models_train_with_compiled_chunks(name, setting, compiled_on_cpu):
    ids = random_ids(6, 11)
    labels = ids.clone()
    labels[0, :5] = -100
    exact = tiny_model(name).double().train()
    expected = exact(ids, labels=labels, skip_logits=False).loss
    expected.backward()
    model = tiny_model(name).train()
    if setting == "bfloat16":
        model = model.bfloat16()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if setting == "model compiled" else model
    dtype = torch.float16 if setting.startswith("float16") else torch.bfloat16
    with torch.autocast("cpu", dtype, enabled="autocast" in setting):
        output = forward(ids, labels=labels, skip_logits=True, count_correct=True, use_cache=False)
    assert output.logits is None and compiled_on_cpu.frame_count > 0
    output.loss.backward()
    tolerance = 1e-4 if setting in ("plain", "model compiled") else 0.1
    torch.testing.assert_close(output.loss.double(), expected.double(), rtol=tolerance, atol=tolerance)
    for key, gradient in gradients(exact).items():
        error = (gradients(model)[key].double() - gradient).norm()
        assert error < tolerance * max(gradient.norm(), 1e-2), key


def test_the_loss_of_compiled_chunks_differentiates_twice(compiled_on_cpu):
    hidden, weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True), torch.randn(9, 8).double()
    targets = torch.randint(9, (40,))
    losses = [
        linear_cross_entropy(hidden, weight, None, targets)[0],
        F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"),
    ]
    seconds = []
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), hidden)[0])
    torch.testing.assert_close(*seconds)


def test_passes_that_do_not_compile_run_in_eager_mode(monkeypatch, compiled_on_cpu):
    def fail(*args):
        raise RuntimeError("no compiler")

    hidden, weight, targets = torch.randn(40, 24), torch.randn(COLUMNS, 24), torch.randint(COLUMNS, (40,))
    expected = linear_cross_entropy(hidden, weight, None, targets)[0]
    monkeypatch.setattr(loss_minigpt, "_compilation_failed", False)
    monkeypatch.setattr(loss_minigpt, "compiled_chunk_losses", lambda: fail)
    with pytest.warns(UserWarning, match=r"does not compile \(RuntimeError: no compiler\)"):
        found = linear_cross_entropy(hidden, weight, None, targets)[0]
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_cross_entropy(hidden, weight, None, targets)


def test_memory_that_runs_out_is_no_failed_compilation(monkeypatch, compiled_on_cpu):
    def fail(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(loss_minigpt, "compiled_chunk_losses", lambda: fail)
    with pytest.raises(torch.OutOfMemoryError):
        linear_cross_entropy(torch.randn(4, 24), torch.randn(9, 24), None, torch.randint(9, (4,)))
    assert not loss_minigpt._compilation_failed


def test_inductor_writes_the_gradients_over_the_logits():
    """No buffer of the logits' size is allocated, so that nothing but the logits is read and written."""
    torch._dynamo.reset()
    logits, targets = torch.randn(ROWS, 128)[:, :COLUMNS], torch.randint(NUM_IDS, (ROWS, 1))
    expected = logits.clone()
    rest = (None, targets, torch.rand(ROWS, 1), None, NUM_IDS, True, True, False)
    expected_results = chunk_losses(expected, *rest)
    results, (code,) = run_and_get_code(torch.compile(chunk_losses, fullgraph=True), logits, *rest)
    torch.testing.assert_close((logits, *results), (expected, *expected_results))
    sizes = re.findall(r"empty_strided_cpu\(\((.*?)\)", code)
    assert f"{ROWS}, 1" in sizes and f"{ROWS}, {COLUMNS}" not in sizes, sizes


def test_chunks_have_one_shape_where_rows_divide():
    for num_ids in (50257, 50304, 32768, 8192, 512):
        for num_rows in (1, 511, 4096, 32768, 64 * 1024, 65 * 1000, 99_991):
            for bytes_each in (2, 4):
                rows = choose_chunk_rows(num_rows, num_ids, "cuda", bytes_each)
                most = max(2**27 * 4 // bytes_each // num_ids, 512)
                # at least half of what fits
                assert min(num_rows, most) // 2 <= rows <= min(num_rows, most)
    # all chunks of powers of two are of one shape
    assert choose_chunk_rows(64 * 512, 50257, "cuda", 2) == 4096
    assert choose_chunk_rows(64 * 512, 50257, "cuda", 4) == 2048
    assert 65_000 % choose_chunk_rows(65_000, 32768, "cuda", 2) == 0
    # a CPU's chunks stay the largest
    assert choose_chunk_rows(64 * 512, 50257, "cpu") == 512
    assert choose_chunk_rows(64 * 512, 512, "cpu") == 8192


class ProductStrides(TorchDispatchMode):
    """Records shapes and strides of the operands of matrix products, also of those that are written."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            tensors = [*args, *(kwargs or {}).values()]
            self.operands += [(x.shape, x.stride()) for x in tensors if isinstance(x, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_logits_have_aligned_rows(dtype, compiled, monkeypatch):
    """GPT-2's 50,257 columns too. The three products read and write them in place, whatever the vocabulary."""
    monkeypatch.setattr(loss_minigpt, "compiles_chunks", lambda hidden: compiled)
    monkeypatch.setattr(loss_minigpt, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setitem(loss_minigpt.CHUNK_ELEMENTS, "cuda", 1)
    hidden, weight, targets = torch.randn(40, 24), torch.randn(COLUMNS, 24), torch.randint(NUM_IDS, (40,))
    targets[3] = -100
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected, hits = plain_loss(*leaves, None, targets, torch.ones(40), 5.0)
    with pretended_gpu():
        on_gpu = [to_gpu(tensor).requires_grad_() for tensor in (hidden, weight)]
        with ProductStrides() as products, torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, num_correct = linear_cross_entropy(
                *on_gpu, None, to_gpu(targets), softcap=5.0, num_ids=NUM_IDS, count_correct=True
            )
        total.backward()
    strides = {tuple(stride) for shape, stride in products.operands if COLUMNS in shape and 24 not in shape}
    # (R, V) with rows of 128 elements, and its transpose, for the gradient of the weight
    assert strides == {(128, 1), (1, 128)}
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert abs(to_cpu(num_correct) - hits) <= (0 if dtype == torch.float32 else 2)
    torch.testing.assert_close(to_cpu(total).double(), expected, rtol=tolerance, atol=tolerance)
    for tensor, gradient in zip(on_gpu, torch.autograd.grad(expected, leaves), strict=True):
        error = (to_cpu(tensor.grad).double() - gradient).norm()
        assert error < tolerance * gradient.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_a_gpu_is_not_waited_for(name, ignored, compiled, monkeypatch):
    monkeypatch.setattr(loss_minigpt, "compiles_chunks", lambda hidden: compiled)
    model = tiny_model(name).train()
    ids = random_ids(4, 11)
    labels = ids.clone()
    labels[:, : 5 if ignored else 0] = -100
    expected = model(ids, labels=labels, num_items_in_batch=20).loss.detach()
    with pretended_gpu():
        to_gpu(model)
        ids, labels = to_gpu(ids), to_gpu(labels)
        for num_items in (20, torch.tensor(20), to_gpu(torch.tensor(20)), None):
            with count_syncs() as syncs:
                loss = model(
                    ids,
                    labels=labels,
                    skip_logits=True,
                    count_correct=True,
                    num_items_in_batch=num_items,
                    use_cache=False,
                ).loss
                loss.backward()
            assert not {key: number for key, number in syncs.items() if "loss_minigpt" in key[1]}
            if num_items is not None:
                torch.testing.assert_close(to_cpu(loss), expected, rtol=1e-5, atol=1e-5)


SHAPES = [(4, 32), (4, 40), (6, 32), (3, 50), (5, 47), (8, 24), (2, 60), (7, 33), (9, 21), (4, 61), (3, 57), (6, 29)]


def count_compilations(model, batches, **arguments):
    """Compile a model, train with batches of ids, and return how often it was compiled. Chunks have 64 rows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model.train(), backend=counter, fullgraph=True)
    for ids in batches:
        is_classifier = isinstance(model, MiniGPTForSequenceClassification)
        labels = torch.arange(len(ids)) % 2 if is_classifier else ids
        forward(input_ids=ids, labels=labels, use_cache=False, **arguments).loss.backward()
    return counter.frame_count


@pytest.fixture
def chunks_of_64_rows(monkeypatch):
    monkeypatch.setattr(loss_minigpt, "MIN_CHUNK_ROWS", 64)
    monkeypatch.setitem(loss_minigpt.CHUNK_ELEMENTS, "cpu", 1)


@pytest.mark.parametrize("name", ["language model", "classifier"])
def test_twelve_shapes_compile_three_times(name, chunks_of_64_rows):
    """The number of chunks, 2 to 4 here, is no part of the compiled graph."""
    batches = [random_ids(*shape, seed=i).clamp(min=1) for i, shape in enumerate(SHAPES)]
    if name == "language model":
        model = tiny_model("modern", num_hidden_layers=1)
        assert count_compilations(model, batches, skip_logits=True, count_correct=True) <= 3
    else:
        options = {"auxiliary_lm_weight": 0.5, "pad_token_id": 0, "num_hidden_layers": 1}
        model = tiny_model("modern", MiniGPTForSequenceClassification, **options)
        assert count_compilations(model, batches) <= 3


def test_evaluation_and_changing_counts_compile_once_each(chunks_of_64_rows):
    model, ids = tiny_model("modern", num_hidden_layers=1).train(), random_ids(4, 32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model, backend=counter, fullgraph=True)
    arguments = {"labels": ids, "skip_logits": True, "count_correct": True, "use_cache": False}
    for _ in range(2):
        for number in range(100, 104):
            model.train()
            forward(ids, num_items_in_batch=torch.tensor(number), **arguments).loss.backward()
        with torch.no_grad():
            model.eval()
            forward(ids, num_items_in_batch=1, **arguments)
    assert counter.frame_count == 2
    model.train()
    # an int is compiled for its value first, then for any
    for number in range(100, 104):
        forward(ids, num_items_in_batch=number, **arguments).loss.backward()
    assert counter.frame_count <= 4


def test_a_compiled_chunk_serves_all_numbers_of_rows(compiled_on_cpu):
    weight = torch.randn(COLUMNS, 24, requires_grad=True)
    for num_rows in (48, 32, 40, 23, 37, 64, 5):
        linear_cross_entropy(torch.randn(num_rows, 24), weight, None, torch.randint(NUM_IDS, (num_rows,)))[
            0
        ].backward()
    # for one number of rows, for any, and where the view of the targets begins with them
    assert compiled_on_cpu.frame_count <= 3
