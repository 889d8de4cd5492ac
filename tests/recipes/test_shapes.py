"""What a training step on a GPU allocates, reads and computes, from the shapes of its tensors."""

import pytest
from hf_minigpt.recipes.benchmarks import shapes

from hf_minigpt import MiniGPTForCausalLM, preset

from ..tiny import NO_DROPOUT


@pytest.mark.parametrize("name", ["gpt2", "minigpt-base"])
def test_passes_over_the_logits(name):
    """The products write and twice read half-precision logits, the loss reads them twice and replaces them."""
    config = preset(name, num_hidden_layers=1)
    meter = shapes.measure_step(config, 64, 512)
    table = 4 * config.vocab_size * config.hidden_size
    traffic = [size for kernel in meter.kernels if kernel.in_head for size in kernel.sizes if size > table]
    assert sum(traffic) / (2 * 64 * 512 * config.vocab_size) == pytest.approx(6, rel=0.01)
    assert meter.largest <= 2**29


def test_flops_and_bytes_of_a_small_step():
    config = preset("gpt2", num_hidden_layers=2, vocab_size=512, hidden_size=64, num_attention_heads=2, **NO_DROPOUT)
    rows, length = 4, 128
    meter = shapes.measure_step(config, rows, length, "adamw")
    model = MiniGPTForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_positions" not in name]
    products = sum(kernel.flops for kernel in meter.kernels if "products" in kernel.part)
    assert products == 6 * rows * length * sum(p.numel() for p in matrices)
    attention = sum(kernel.flops for kernel in meter.kernels if kernel.part == "attention")
    # two products forward and five backward, half of them masked
    assert attention == config.num_hidden_layers * rows * length**2 * config.hidden_size * (2 + 5)
    [adamw_of_matrices, _] = [kernel for kernel in meter.kernels if kernel.name == "_fused_adamw_"]
    # reads weights, gradients and two moments, writes all but the gradients
    tables = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert adamw_of_matrices.num_bytes == pytest.approx(7 * 4 * tables, rel=1e-3)


def test_compiled_kernels_compute_the_same_and_move_less():
    meter = shapes.measure_step(preset("minigpt-pico"), 4, 128)
    compiled = shapes.compiled(meter.kernels)
    assert sum(kernel.flops for kernel in compiled) == sum(kernel.flops for kernel in meter.kernels)
    eager_bytes, bytes_moved = (dict.fromkeys(shapes.PARTS, 0) for _ in range(2))
    for found, kernels in ((eager_bytes, meter.kernels), (bytes_moved, compiled)):
        for kernel in kernels:
            found[kernel.part] += kernel.num_bytes
    assert bytes_moved["blocks: products"] == eager_bytes["blocks: products"]
    assert 0.2 < bytes_moved["blocks: the rest"] / eager_bytes["blocks: the rest"] < 0.6


def test_the_table_states_every_part(capsys):
    result = shapes.estimate(preset("minigpt-pico"), 4, 128, "adamw")
    table = capsys.readouterr().out
    assert all(f"| {part} |" in table for part in [*shapes.PARTS, "step", "MFU"])
    assert all(0 < share < 1 for share in result["mfu"].values())
    assert result["step_ms"]["H100 SXM, compiled"] < result["step_ms"]["H100 SXM, eager"]
