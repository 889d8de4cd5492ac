"""Checks 1 to 8: the device computes what the CPU computes, in every precision, packed, compiled and in generation."""

import copy
import io
import platform
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from typing import Any

import accelerate
import datasets
import torch
import transformers
from torch import nn
from transformers.utils import is_flash_attn_2_available

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.training.optimizers import muon_adamw

from .harness import Finding, Machine, Measurement, Report, Skip, attributes, check, guarded
from .models import (
    NAMES,
    TOLERANCES,
    acausal,
    all_presets,
    difference,
    disturbed_model,
    gradients,
    logits_and_gradients,
    random_ids,
    round_to_tf32,
    typical_presets,
    weights_in_tf32,
)


@check(1, "environment")
def environment(machine: Machine) -> Iterator[Report]:
    """Devices, versions, and whether the recipes' arguments switch TF32 on, as the products themselves show."""
    yield Measurement("device", machine.name)
    if not machine.dry_run:
        properties = torch.cuda.get_device_properties(machine.device)
        yield Measurement("memory", properties.total_memory / 2**30, "GiB")
        yield Measurement("number of GPUs", torch.cuda.device_count())
        yield Measurement("CUDA", str(torch.version.cuda))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        yield Measurement("driver", driver)
    yield Measurement("Python", platform.python_version())
    for library in (torch, transformers, accelerate, datasets):
        yield Measurement(library.__name__, library.__version__)

    folder = str(machine.folder / "arguments")
    has_tf32 = not machine.dry_run and torch.cuda.get_device_capability(machine.device) >= (8, 0)
    before = product_error(machine.device)
    rounded = product_error(machine.device, round_to_tf32)
    yield Finding("fp32 product before TrainingArguments", before, 1e-5, rounded, "inputs rounded to TF32")
    PretrainArguments(output_dir=folder)
    after = product_error(machine.device)
    if has_tf32:
        without = "TrainingArguments with tf32=False"
        PretrainArguments(output_dir=folder, tf32=False)
        off = product_error(machine.device)
        yield Finding("TF32 product after TrainingArguments", after, 1e-2, off, without, least=1e-4)
        PretrainArguments(output_dir=folder)
    else:
        yield Finding("fp32 product after TrainingArguments", after, 1e-5, rounded, "inputs rounded to TF32")
    found = inductor_cannot_ask()
    # what transformers sets by itself, in disagreement with torch's older switch
    with attributes(torch.backends.cuda.matmul, fp32_precision="tf32"):
        mixed = inductor_cannot_ask()
    yield Finding("Inductor's query of the precision raises", found, 0, mixed, "two switches of TF32 disagree")


def product_error(device: torch.device, prepare: Any = lambda x: x) -> float:
    """Return the relative error of a product in float32. TF32 makes it about 5e-4, else it is below 1e-6."""
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    product = prepare(a).to(device) @ prepare(b).to(device)
    return difference(product.cpu(), a.double() @ b.double())


def inductor_cannot_ask() -> float:
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:
        return 1.0
    return 0.0


@check(2, "fp32 as on the CPU")
def float32(machine: Machine) -> Iterator[Report]:
    """Logits and gradients of every preset, CPU against device, TF32 off."""
    most = TOLERANCES[torch.float32]
    for name in all_presets(machine):
        model = disturbed_model(machine, name)
        ids = random_ids(model, 2, 64)
        expected = logits_and_gradients(model, ids)
        model, ids = model.to(machine.device), ids.to(machine.device)
        found = logits_and_gradients(model, ids)
        with weights_in_tf32(model):
            rounded = logits_and_gradients(model, ids)
        with acausal(model):
            wrong = logits_and_gradients(model, ids)
        for i, what in enumerate(("logits", "gradients")):
            control = min(difference(rounded[i], expected[i]), difference(wrong[i], expected[i]))
            figure = difference(found[i], expected[i])
            yield Finding(f"{name} {what}", figure, most[i], control, "TF32, or acausal")


@check(3, "16 bits near fp32 on the CPU")
def half_precision(machine: Machine) -> Iterator[Report]:
    """Logits and gradients under autocast, within three times the emulated error; an acausal model is far outside."""
    for name in typical_presets(machine):
        model = disturbed_model(machine, name)
        ids = random_ids(model, 2, 64)
        expected = logits_and_gradients(model, ids)
        model, ids = model.to(machine.device), ids.to(machine.device)
        for dtype in machine.half_dtypes():
            found = logits_and_gradients(model, ids, dtype)
            with acausal(model):
                wrong = logits_and_gradients(model, ids, dtype)
            for i, what in enumerate(("logits", "gradients")):
                control = difference(wrong[i], expected[i])
                figure = difference(found[i], expected[i])
                yield Finding(f"{name} {NAMES[dtype]} {what}", figure, TOLERANCES[dtype][i], control, "acausal")


@check(4, "packed documents as alone")
def packing(machine: Machine) -> Iterator[Report]:
    """Rows of packed documents against each document alone, by every implementation of attention, both directions."""
    half = machine.half_dtypes()[0]
    for implementation, dtype in (
        ("sdpa", torch.float32),
        ("sdpa", half),
        ("flex_attention", torch.float32),
        ("flash_attention_2", half),
    ):
        label = f"{implementation} {NAMES[dtype]}"
        yield from guarded(label, packed_as_alone(machine, implementation, dtype, label))


def packed_as_alone(machine: Machine, implementation: str, dtype: torch.dtype, label: str) -> Iterator[Report]:
    if machine.dry_run and implementation != "sdpa":
        raise Skip("needs a GPU")
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise Skip("flash-attn is not installed")
    for name in ("gpt2", "minigpt-pico" if machine.dry_run else "minigpt-base"):
        reference = disturbed_model(machine, name).to(machine.device)
        model = disturbed_model(machine, name, implementation).to(machine.device)
        for rows in (1, 4):
            expected = alone(reference, rows, dtype)
            found = packed(model, rows, dtype)
            wrong = packed(model, rows, dtype, see_each_other=True)
            for i, what in enumerate(("logits", "gradients")):
                figure, control = (difference(result[i], expected[i]) for result in (found, wrong))
                name_of_row = f"{label} {name}, batch {rows}, {what}"
                yield Finding(name_of_row, figure, TOLERANCES[dtype][i], control, "documents see each other")


ROW = 64
# Lengths of the documents of each row.
DOCUMENTS = [[20, 7, 37], [1, 63], [32, 32], [9, 9, 40, 6]]


def packed(
    model: MiniGPTForCausalLM, rows: int, dtype: torch.dtype, see_each_other: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and gradients of rows of packed documents."""
    ids = random_ids(model, rows, ROW).to(model.device)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS[:rows]])
    positions = positions.to(model.device)
    # the first token of a document is not predicted
    labels = ids.masked_fill(positions == 0, -100)
    inputs = {} if see_each_other else {"position_ids": positions}
    return logits_and_gradients(model, ids, dtype, labels=labels, num_items_in_batch=rows * ROW, **inputs)


def alone(model: MiniGPTForCausalLM, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the summed gradients of the same documents, one at a time."""
    ids = random_ids(model, rows, ROW).to(model.device)
    logits, total = [], torch.zeros(())
    for row, lengths in zip(ids, DOCUMENTS, strict=False):
        documents = [document[None] for document in row.split(lengths)]
        results = [logits_and_gradients(model, d, dtype, num_items_in_batch=rows * ROW) for d in documents]
        logits.append(torch.cat([result[0] for result in results], dim=1))
        total = total + sum(result[1] for result in results)
    return torch.cat(logits), total


@check(5, "no synchronization in a step")
def synchronization(machine: Machine) -> Iterator[Report]:
    """A step of mixed precision (forward, backward, clipping, MuonAdamW) never makes the CPU wait for the GPU."""
    for name in ("gpt2", "minigpt-pico") if machine.dry_run else typical_presets(machine):
        figure, place = step_waits(machine, name)
        control, _ = step_waits(machine, name, reads_loss=True)
        yield Finding(f"{name}: steps that wait", figure, 0, control, "a step that reads its loss", detail=place)


def step_waits(machine: Machine, name: str, reads_loss: bool = False) -> tuple[float, str]:
    """Return 1 if a step after three others waits for the device, else 0, and the place in the code that waits."""
    model = disturbed_model(machine, name).train()
    ids = random_ids(model, 2, 64)

    def run(to_device: Any, forbid: Any) -> tuple[float, str]:
        nonlocal model, ids
        model, ids = to_device(model), to_device(ids)
        num_items = to_device(torch.tensor(ids.numel()))
        optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.01)
        dtype = machine.half_dtypes()[0]
        for _ in range(3):
            take_step(model, optimizer, ids, num_items, dtype)
        return forbid(lambda: take_step(model, optimizer, ids, num_items, dtype, reads_loss))

    if machine.dry_run:
        # the tests' stand-in for a GPU, which lies in the repository only
        try:
            from tests.pretended_gpu import count_syncs, pretended_gpu, to_gpu
        except ImportError as error:
            raise Skip("the dry run pretends a GPU with the repository's tests, which are not here") from error

        def counted(step: Any) -> tuple[float, str]:
            with count_syncs() as syncs:
                step()
            return float(bool(syncs)), ", ".join(str(place) for place in syncs)

        with pretended_gpu():
            return run(to_gpu, counted)

    def refused(step: Any) -> tuple[float, str]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "hf_minigpt" in frame.filename] or frames
            where = f"{ours[-1].filename}:{ours[-1].lineno}"
            return 1.0, where
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return 0.0, ""

    return run(lambda moved: moved.to(machine.device), refused)


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    num_items: torch.Tensor,
    dtype: torch.dtype,
    reads_loss: bool = False,
) -> None:
    with torch.autocast("cuda", dtype):
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=num_items, skip_logits=True, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if reads_loss:
        loss.item()


@check(6, "compiled as eager")
def compilation(machine: Machine) -> Iterator[Report]:
    """Four shapes of ids: the results of eager mode, no graph break, at most three compilations."""
    settings: list[tuple[str, str, dict[str, Any]]] = [
        ("gpt2", "Inductor", {}),
        # fp32 in TF32, as the recipes compute it
        ("minigpt-small", "TF32 and max-autotune", {"mode": "max-autotune"}),
    ]
    if machine.dry_run:
        # the same graphs without Inductor's code, which takes minutes to compile
        settings = [("minigpt-pico", "graphs only", {"backend": "eager"})]
    for name, title, options in settings:
        yield from guarded(title, compiled_as_eager(machine, name, title, options))


def compiled_as_eager(machine: Machine, name: str, title: str, options: dict[str, Any]) -> Iterator[Report]:
    # relative differences of the loss and of the gradients; TF32 has the 10 bits of fp16
    most = (1e-5, TOLERANCES[torch.float32][1])
    if title.startswith("TF32"):
        PretrainArguments(output_dir=str(machine.folder / "arguments"))
        most = (2e-4, TOLERANCES[torch.float16][1])
    model = disturbed_model(machine, name).to(machine.device)
    expected = results_by_shape(model, model, SHAPES)
    counts, found = counted_compilations(model, options, SHAPES)
    # controls need the graphs only, not their code
    with acausal(model):
        static, wrong = counted_compilations(model, {"backend": "eager", "dynamic": False}, SHAPES)
    broken, _ = counted_compilations(with_graph_break(model), {"backend": "eager"}, SHAPES[:1])

    label = f"{name}, {title}"
    too_few = [(loss * 65 / 64, gradient) for loss, gradient in expected]
    figure, control = (farthest(results, expected, 0) for results in (found, too_few))
    yield Finding(f"{label}: loss", figure, most[0], control, "a mean over too few tokens, 64 of 65")
    figure, control = (farthest(results, expected, 1) for results in (found, wrong))
    yield Finding(f"{label}: gradients", figure, most[1], control, "acausal")
    yield Finding(f"{label}: graph breaks", counts["breaks"], 0, broken["breaks"], "a break in the first block")
    label = f"{label}: compilations for {len(SHAPES)} shapes"
    yield Finding(label, counts["graphs"], 3, static["graphs"], "dynamic=False")


SHAPES = [(2, 32), (3, 32), (2, 48), (4, 64)]
Results = list[tuple[torch.Tensor, torch.Tensor]]


def results_by_shape(model: MiniGPTForCausalLM, forward: Any, shapes: list[tuple[int, int]]) -> Results:
    """Return the loss (1,) and all gradients (N,) for each shape of the ids."""
    results = []
    for rows, length in shapes:
        ids = random_ids(model, rows, length).to(model.device)
        model.zero_grad()
        loss = forward(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        results.append((loss.detach().cpu()[None], gradients(model)))
    return results


def farthest(found: Results, expected: Results, which: int) -> float:
    """Return the largest difference over the shapes, of the losses (0) or the gradients (1)."""
    return max(difference(a[which], b[which]) for a, b in zip(found, expected, strict=True))


def counted_compilations(
    model: MiniGPTForCausalLM, options: dict[str, Any], shapes: list[tuple[int, int]]
) -> tuple[dict[str, int], Results]:
    """Compile the model and run it on the shapes. Return the numbers of graphs and graph breaks, and the results."""
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    results = results_by_shape(model, torch.compile(model, **options), shapes)
    counts = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    torch.compiler.reset()
    return counts, results


def with_graph_break(model: MiniGPTForCausalLM) -> MiniGPTForCausalLM:
    model = copy.deepcopy(model)
    model.model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return model


@check(7, "optimizer and loss scaler")
def optimizer(machine: Machine) -> Iterator[Report]:
    """MuonAdamW on the device and on the CPU, a step with an infinite gradient, and a saved and loaded state."""
    name = "gpt2" if machine.dry_run else "minigpt-small"
    start = disturbed_model(machine, name)
    on_cpu = changes(start, "cpu", range(5))
    on_device = changes(start, machine.device, range(5))
    skipped = changes(start, machine.device, (0, 1, 2, 4))
    # Muon's iteration runs in bf16 on GPUs, which an emulation puts at 0.022
    for kind, most in {"muon": 5e-2, "adamw": 1e-4}.items():
        figure, control = (difference(changed[kind], on_cpu[kind]) for changed in (on_device, skipped))
        yield Finding(f"{kind}: change in five steps", figure, most, control, "a skipped step")

    for kind, figure in scaled_step(start, machine, enabled=True).items():
        control = scaled_step(start, machine, enabled=False)[kind]
        yield Finding(f"infinite gradient: {kind}", figure, 0, control, "no scaler")

    model = copy.deepcopy(start).to(machine.device)
    saved = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.01)
    for step in range(2):
        set_gradients(model, step)
        saved.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": saved.state_dict()}, file)
    file.seek(0)
    states = torch.load(file, map_location="cpu")
    other = copy.deepcopy(start).to(machine.device)
    other.load_state_dict(states["model"])
    loaded = muon_adamw(other, learning_rate=1e-3, matrix_learning_rate=0.01)
    loaded.load_state_dict(states["optimizer"])
    misplaced = copy.deepcopy(loaded)
    for state in misplaced.state.values():
        state.update({key: value.to("meta") for key, value in state.items()})
    yield Finding(
        "tensors on another device after loading",
        on_other_device(loaded),
        0,
        on_other_device(misplaced),
        "state left where it was",
    )
    fresh_model = copy.deepcopy(other)
    fresh = muon_adamw(fresh_model, learning_rate=1e-3, matrix_learning_rate=0.01)
    for each, its_optimizer in ((model, saved), (other, loaded), (fresh_model, fresh)):
        set_gradients(each, 2)
        its_optimizer.step()
    weights = (nn.utils.parameters_to_vector(each.parameters()) for each in (model, other, fresh_model))
    expected, found, wrong = (vector.detach().cpu() for vector in weights)
    figure, control = difference(found, expected), difference(wrong, expected)
    yield Finding("step after loading", figure, 1e-6, control, "state not loaded")


def set_gradients(model: nn.Module, step: int) -> None:
    """Set random gradients, the same on every device."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


def changes(start: MiniGPTForCausalLM, device: Any, steps: Any) -> dict[str, torch.Tensor]:
    """Return how much an optimizer has changed the parameters of each kind after steps with these gradients."""
    model = copy.deepcopy(start).to(device)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.01)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
    return {
        kind: torch.cat(
            [
                (p.detach() - before[id(p)]).flatten().cpu()
                for group in optimizer.param_groups
                if group["kind"] == kind
                for p in group["params"]
            ]
        )
        for kind in ("muon", "adamw")
    }


def scaled_step(start: MiniGPTForCausalLM, machine: Machine, enabled: bool) -> dict[str, float]:
    """Take a step with an infinite gradient. Return how far parameters moved, and whether the scale did not halve."""
    model = copy.deepcopy(start).to(machine.device)
    optimizer = muon_adamw(model, learning_rate=1e-3, matrix_learning_rate=0.01)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=enabled)
    scale = scaler.get_scale()
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.zeros((), device=machine.device))
    set_gradients(model, 0)
    next(p for p in model.parameters() if p.ndim == 2).grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    moved = max(float((p.detach() - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True))
    # NaN is not a distance
    moved = moved if moved == moved else float("inf")
    return {"parameters moved": moved, "scale not halved": float(scaler.get_scale() != scale / 2)}


def on_other_device(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.device != parameter.device for parameter, state in optimizer.state.items() for value in state.values()
    )


@check(8, "greedy text")
def generation(machine: Machine) -> Iterator[Report]:
    """Greedy decoding: the device's text is the CPU's, and a static, compiled cache writes the dynamic cache's."""
    for name in ("gpt2", "minigpt-pico" if machine.dry_run else "minigpt-base"):
        model = disturbed_model(machine, name).eval()
        prompt = random_ids(model, 2, 16)
        expected = greedy(model, prompt)
        model = model.to(machine.device)
        found = greedy(model, prompt)
        with acausal(model):
            wrong = greedy(model, prompt)
        yield Finding(
            f"{name}: tokens that differ", differing(found, expected), 0, differing(wrong, expected), "acausal"
        )
        static = greedy(model, prompt, cache_implementation="static")
        other_prompt = prompt.clone()
        other_prompt[:, 0] += 1
        other = greedy(model, other_prompt, cache_implementation="static")
        figure, control = differing(static, found), differing(other, found)
        yield Finding(f"{name}, static cache: tokens that differ", figure, 0, control, "another first token")


def greedy(model: MiniGPTForCausalLM, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    prompt = prompt.to(model.device)
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return text[:, prompt.shape[1] :].cpu()


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    return int((found != expected).sum())
