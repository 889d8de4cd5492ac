"""Checks 11 and 12: peak memory and speed."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.model.loss_minigpt import causal_lm_loss_without_logits
from hf_minigpt.training.flops import flops_per_token, peak_flops_per_second
from hf_minigpt.training.optimizers import muon_adamw

from .harness import Finding, Machine, Measurement, Report, Skip, check, guarded
from .models import TINY, random_ids


# GiB of a training step of GPT-2 (124M) on 64 rows of 512 tokens, with AdamW's and Muon's state
EXPECTED_MEMORY = 15.1


@check(11, "peak memory")
def memory(machine: Machine) -> Iterator[Report]:
    """Peak memory of a step of GPT-2 at 64 x 512, which holds no logits."""
    if not machine.dry_run and torch.cuda.get_device_properties(machine.device).total_memory < 36 * 2**30:
        raise Skip("the control, which holds all logits, needs 36 GiB")
    figure, control = (peak_memory(machine, skip_logits) for skip_logits in (True, False))
    most, least = 1.15 * EXPECTED_MEMORY, 0.85 * EXPECTED_MEMORY
    yield Finding("gpt2, 64 x 512, GiB", figure, most, control, "the logits are kept", least=least)


def peak_memory(machine: Machine, skip_logits: bool) -> float:
    """Return the peak in GiB of two steps; in a dry run as the shapes of the tensors have it."""
    if machine.dry_run:
        try:
            from shapes import measure_step
        except ImportError as error:
            raise Skip("the dry run needs shapes.py and the repository's tests, which are not here") from error

        return measure_step(preset("gpt2"), 64, 512, skip_logits=skip_logits).peak / 2**30
    training = Training(machine, "gpt2", 64, 512, skip_logits=skip_logits)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        training.step()
    return torch.cuda.max_memory_allocated() / 2**30


class Training:
    """A preset in training on random ids, under autocast to the device's 16-bit format."""

    def __init__(
        self, machine: Machine, name: str, rows: int, length: int, compiled: bool = False, skip_logits: bool = True
    ):
        sizes = {"num_hidden_layers": 2, **TINY} if machine.dry_run else {}
        torch.manual_seed(0)
        self.machine, self.skip_logits = machine, skip_logits
        self.config = preset(name, **sizes)
        self.model = MiniGPTForCausalLM(self.config).to(machine.device).train()
        self.optimizer = muon_adamw(self.model, learning_rate=1e-3, matrix_learning_rate=0.01)
        self.ids = random_ids(self.model, rows, length).to(machine.device)
        self.num_items = torch.tensor(self.ids.numel(), device=machine.device)
        backend = "eager" if machine.dry_run else "inductor"
        self.forward: Any = torch.compile(self.model, backend=backend) if compiled else self.model
        self.dtype = machine.half_dtypes()[0]

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.machine.device.type, self.dtype)

    def step(self) -> None:
        with self.autocast():
            loss = self.forward(
                input_ids=self.ids,
                labels=self.ids,
                num_items_in_batch=self.num_items,
                skip_logits=self.skip_logits,
                use_cache=False,
            ).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def flops(self) -> float:
        """FLOPs of a step, by nanoGPT's count."""
        per_token = flops_per_token(self.config, self.model.num_parameters(), self.ids.shape[1])
        return per_token * self.ids.numel()


def seconds(machine: Machine, function: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Return the median seconds of a call by the GPU's clock; in a dry run by the process's, which no other slows."""
    for _ in range(warmup):
        function()
    machine.synchronize()
    times = []
    for _ in range(repeats):
        if machine.dry_run:
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1000)
    return statistics.median(times)


@check(12, "speed")
def speed(machine: Machine) -> Iterator[Report]:
    """Medians of the head, an attention layer, Muon, whole steps and decoding, and the share of the GPU's peak."""
    dtype = machine.half_dtypes()[0]
    peak = peak_flops_per_second(machine.device, dtype)
    yield Measurement("peak of the device", peak / 1e12, "TFLOP/s")
    yield from clock(machine)
    sizes = [("gpt2", 2, 32)] if machine.dry_run else [("gpt2", 64, 512), ("minigpt-base", 32, 1024)]
    for name, rows, length in sizes:
        label = f"{name}, {rows} x {length}"
        yield from guarded(label, parts(machine, name, rows, length, label), memory=True)
        for compiled in (False, True):
            how = f"{label}, {'compiled' if compiled else 'eager'}"
            yield from guarded(how, steps(machine, name, rows, length, compiled, how), memory=True)
    yield from guarded("decoding", decoding(machine))


def steps(machine: Machine, name: str, rows: int, length: int, compiled: bool, label: str) -> Iterator[Report]:
    torch.compiler.reset()
    training = Training(machine, name, rows, length, compiled)
    took = seconds(machine, training.step)
    share = training.flops / took / peak_flops_per_second(machine.device, training.dtype)
    yield Measurement(f"{label}: step", took * 1000, "ms")
    yield Measurement(f"{label}: training", training.ids.numel() / took, "tokens/s")
    yield Measurement(f"{label}: MFU (goal 45 %)", 100 * share, "%")


def clock(machine: Machine) -> Iterator[Report]:
    """Four times the work must take four times as long: a clock that does not wait for the device fails."""
    training = Training(machine, "minigpt-small", *((2, 32) if machine.dry_run else (16, 512)))
    one = seconds(machine, training.step)
    four = seconds(machine, lambda: [training.step() for _ in range(4)])
    again = seconds(machine, training.step)
    yield Finding("time of four steps over that of one", four / one, 5, again / one, "one step again", least=3)


def parts(machine: Machine, name: str, rows: int, length: int, label: str) -> Iterator[Report]:
    training = Training(machine, name, rows, length)
    model, config = training.model, training.config
    num_tokens = training.ids.numel()
    hidden = torch.randn(*training.ids.shape, config.hidden_size, device=machine.device, requires_grad=True)

    def head() -> None:
        with training.autocast():
            half = hidden.to(training.dtype)
            loss, _ = causal_lm_loss_without_logits(model.lm_head, half, training.ids, config)
        loss.backward()

    took = seconds(machine, head)
    yield Measurement(f"{label}: head and loss, forward and backward", took * 1000, "ms")
    flops = 6 * num_tokens * config.hidden_size * config.vocab_size
    yield Measurement(f"{label}: head and loss", flops / took / 1e12, "TFLOP/s")

    positions = torch.arange(training.ids.shape[1], device=machine.device)[None]
    layer = model.model.layers[0].self_attn

    def attention() -> None:
        with training.autocast():
            _, rotary = model.model.embed(hidden, positions)
            output, _ = layer(hidden, None, rotary)
        output.sum().backward()

    yield Measurement(f"{label}: attention layer, forward and backward", seconds(machine, attention) * 1000, "ms")
    training.optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    yield Measurement(f"{label}: MuonAdamW's step", seconds(machine, training.optimizer.step) * 1000, "ms")
    training.optimizer.zero_grad()


def decoding(machine: Machine) -> Iterator[Report]:
    """Tokens a second of greedy decoding in 16 bits, with a dynamic and with a static, compiled cache."""
    new_tokens = 16 if machine.dry_run else 64
    for name in ("minigpt-base",) if machine.dry_run else ("gpt2", "minigpt-base"):
        sizes = {"num_hidden_layers": 2, **TINY} if machine.dry_run else {}
        torch.manual_seed(0)
        model = MiniGPTForCausalLM(preset(name, **sizes)).to(machine.device, machine.half_dtypes()[0]).eval()
        for rows in (1, 16):
            prompt = random_ids(model, rows, 16).to(machine.device)
            for cache in ("dynamic", "static"):
                # a static cache is compiled in the first two calls
                decode = partial(
                    model.generate,
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    cache_implementation="static" if cache == "static" else None,
                )
                took = seconds(machine, decode, repeats=3, warmup=2)
                label = f"{name}, decoding, batch {rows}, {cache} cache"
                yield Measurement(label, rows * new_tokens / took, "tokens/s")
