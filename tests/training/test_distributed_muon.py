"""Muon's work is shared by the processes of a run, which train as one process does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_minigpt.training.muon import multiplications, plan_rounds
from tests.programs.distributed_muon import (
    MANY_SHAPES,
    SHAPES,
    Layers,
    flops_of_a_step,
    make_optimizer,
    resumed,
    train,
)


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What four processes and then two have found, each after a run of one process that they resume."""
    folder = tmp_path_factory.mktemp("muon")
    resumed(folder)
    command = [sys.executable, "-m", "tests.programs.distributed_muon", str(folder), "4", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    model = Layers()
    return train(model, make_optimizer(model))


def found_by(folder: Path, num_processes: int) -> dict[str, Any]:
    return torch.load(folder / f"{num_processes}.pt")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0, msg=lambda m, k=key: f"{name}, {k}: {m}")


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_train_as_one(folder, alone, num_processes):
    found = found_by(folder, num_processes)
    kinds = ("replicated", "sharded", "sharded columns", "shards and replicas", "replicas and shards")
    limited = ("replicated, little memory", "sharded, little memory")
    for name in (*kinds, *limited, "split in both dimensions"):
        assert_close(found[name], alone, name)
    model = Layers([(12, 30)])
    assert_close(found["one matrix"], train(model, make_optimizer(model)), "one matrix")


@pytest.mark.parametrize("num_processes", [2, 4])
def test_each_matrix_is_orthogonalized_once_and_the_work_is_balanced(folder, num_processes):
    model = Layers(MANY_SHAPES)
    expected = flops_of_a_step(model, make_optimizer(model))
    for name, flops in found_by(folder, num_processes)["shares"].items():
        assert sum(flops) == expected, name
        assert max(flops) < 1.02 * expected / num_processes, name


@pytest.mark.parametrize("num_processes", [2, 4])
def test_memory_is_bounded(folder, num_processes):
    """There is room for three of 24 matrices on each process."""
    stacks = found_by(folder, num_processes)["bounded"]
    assert stacks == [3 * 16 * 16] * (24 // 3 // num_processes)


def test_any_number_of_processes_resumes_from_any_other(folder, alone):
    results = resumed(folder)
    assert {name.partition("begun_by_")[2] for name in results} > {"2_replicated", "2_sharded", "4_sharded"}
    for num_processes, begun in {2: (1, 4), 4: (1,)}.items():
        found = found_by(folder, num_processes)["resumed"]
        assert {int(name.partition("begun_by_")[2][0]) for name in found} == set(begun)
        results |= {f"{num_processes}, {name}": weights for name, weights in found.items()}
    for name, weights in results.items():
        assert_close(weights, alone, name)


def test_recipes_share_the_work_under_ddp_and_fsdp2(folder):
    expected = {"copies": True, "parts": False, "same matrices": True, "shards": True}
    assert found_by(folder, 2)["recipes"] == expected


# Which process does what, without processes


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("max_elements", [1, 2000, 10**9])
def test_plan_has_each_matrix_once_within_the_limit(num_processes, max_elements):
    rounds = plan_rounds(tuple(SHAPES), num_processes, max_elements)
    assert all(len(stacks) == num_processes for stacks in rounds)
    planned = [i for stacks in rounds for own in stacks for indices in own.values() for i in indices]
    assert sorted(planned) == list(range(len(SHAPES)))
    for stacks in rounds:
        for own in stacks:
            assert all(SHAPES[i] == shape for shape, indices in own.items() for i in indices)
            elements = [rows * columns for (rows, columns), indices in own.items() for _ in indices]
            assert sum(elements) <= max_elements or len(elements) == 1


@pytest.mark.parametrize(("num_processes", "limit"), [(2, 1.001), (8, 1.001), (64, 1.1)])
def test_plan_balances_the_work_of_gpt2_xl(num_processes, limit):
    """Also in each round, because processes wait for each other at its end."""
    shapes = ([(1600, 1600)] * 4 + [(6400, 1600), (1600, 6400)]) * 48
    in_total, in_rounds = [0] * num_processes, 0
    for stacks in plan_rounds(tuple(shapes), num_processes, 2**28 // num_processes // 2):
        work = [sum(multiplications(shape) * len(indices) for shape, indices in own.items()) for own in stacks]
        in_total = [a + b for a, b in zip(in_total, work, strict=True)]
        in_rounds += max(work)
    share = sum(in_total) / num_processes
    assert max(in_total) <= limit * share
    assert in_rounds <= 1.25 * share
