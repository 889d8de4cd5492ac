"""recipes/benchmarks/gpu.py without a GPU: its dry run, and how checks that fail, crash, hang or prove nothing end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "recipes/benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    return run("--dry_run", "--in_process", "--output_dir", str(folder)), folder


@pytest.fixture
def harness(monkeypatch):
    """The harness, with no checks registered."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_checks import harness

    monkeypatch.setattr(harness, "CHECKS", {})
    return harness


def records_of(harness, *reports, error: BaseException | None = None) -> list[dict]:
    """Return the records of a check that yields these reports, then raises."""

    @harness.check(1, "a check")
    def function(machine):
        yield from reports
        if error is not None:
            raise error

    return list(harness.run_check(1, harness.Machine(torch.device("cpu"), Path(), dry_run=True)))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # it appends to the path
    monkeypatch.setattr(sys, "path", [*sys.path])
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message without a GPU")
def test_without_a_gpu_it_exits_with_a_message(gpu, capsys):
    assert gpu.main([]) == 2
    assert "No CUDA device" in capsys.readouterr().out


def test_a_wrong_number_of_a_check_is_refused(gpu, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(["--only", "13"])
    assert error.value.code == 2 and "numbers from 1 to 12" in capsys.readouterr().err


def test_every_check_and_its_control_work_in_the_dry_run(dry_run):
    result, folder = dry_run
    records = json.loads((folder / "results.json").read_text())["records"]
    wrong = [record for record in records if record["verdict"] in ("failed", "void")]
    assert result.returncode == 0 and not wrong, f"{wrong}\n{result.stderr[-3000:]}"
    passed = {record["check"] for record in records if record["verdict"] == "passed"}
    assert passed == set(range(1, 13))
    # nothing is left out in silence
    skipped = {record["check"]: record["detail"] for record in records if record["verdict"] == "skipped"}
    assert set(skipped) == {4, 10} and all(skipped.values())


def test_the_dry_run_writes_a_table_for_the_readme(dry_run):
    _, folder = dry_run
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[0].startswith("## CPU, dry run, torch ")
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    checks, measured = ([row for row in rows if len(row) == columns] for columns in (6, 3))
    records = json.loads((folder / "results.json").read_text())["records"]
    # below a head of two lines
    assert [int(row[0]) for row in checks[2:]] == list(range(1, 13))
    assert len(measured) == 2 + sum(record["verdict"] == "measured" for record in records)


def test_a_figure_out_of_bounds_fails_and_a_control_within_bounds_is_void(harness):
    good = harness.Finding("good", 0.5, 1.0, 2.0, "twice")
    not_a_number = harness.Finding("nan", float("nan"), 1.0, 2.0, "twice")
    too_large = harness.Finding("large", 1.5, 1.0, 2.0, "twice")
    too_small = harness.Finding("small", 0.1, 1.0, 2.0, "twice", least=0.2)
    proves_nothing = harness.Finding("void", 0.5, 1.0, 0.9, "nothing")
    records = records_of(harness, good, not_a_number, too_large, too_small, proves_nothing)
    assert [record["verdict"] for record in records] == ["passed", "failed", "failed", "failed", "void"]
    assert harness.exit_code(records[:1]) == 0
    assert [harness.exit_code([records[0], record]) for record in records[1:]] == [1, 1, 1, 1]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access\nmore"), SystemExit(2)])
def test_a_check_that_crashes_has_failed_and_keeps_what_it_found(harness, error):
    records = records_of(harness, harness.Finding("good", 0.5, 1.0, 2.0, "twice"), error=error)
    assert [record["verdict"] for record in records] == ["passed", "failed"]
    assert records[1]["detail"].startswith(type(error).__name__) and "\n" not in records[1]["detail"]


def test_a_skipped_or_empty_check_does_not_count_as_passed(harness):
    (raised,) = records_of(harness, error=harness.Skip("one GPU"))
    (yielded,) = records_of(harness, harness.Skip("one GPU"))
    assert raised == yielded and raised["verdict"] == "skipped" and raised["detail"] == "one GPU"
    assert harness.exit_code([raised]) == 1
    (empty,) = records_of(harness)
    assert empty["verdict"] == "failed"


def test_only_a_part_that_says_so_is_skipped_for_want_of_memory(harness):
    def reports():
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    (skipped,) = harness.guarded("large", reports(), memory=True)
    (failed,) = harness.guarded("small", reports())
    assert isinstance(skipped, harness.Skip) and "needs more memory" in str(skipped)
    assert isinstance(failed, harness.Failure)


def test_the_table_shows_the_figure_that_is_worst(harness):
    near = harness.Finding("near", 0.9, 1.0, 2.0, "twice")
    far = harness.Finding("far", 1.6, 2.0, 3.0, "thrice", least=1.0)
    table = harness.markdown(records_of(harness, far, near, harness.Skip("no flash")), "a GPU")
    assert "| 1 | a check | 2 of 2; skipped: no flash | near: 0.9 | at most 1 | 2: twice |" in table
    void = harness.Finding("void", 0.1, 1.0, 0.1, "nothing")
    table = harness.markdown(records_of(harness, near, void), "a GPU")
    assert "| 1 | a check | 1 of 2; void: void | void: 0.1 | at most 1 | 0.1: nothing |" in table


def test_checks_run_in_processes_of_their_own_until_the_time_is_up(tmp_path):
    result = run("--dry_run", "--only", "1,2", "--time_limit", "0.5", "--output_dir", str(tmp_path))
    assert result.returncode == 1
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [record["check"] for record in records if "time limit" in record.get("detail", "")] == [1, 2]
    result = run("--dry_run", "--only", "1", "--output_dir", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert {record["check"] for record in records} == {1}


def test_the_stored_losses_are_of_two_hundred_steps():
    losses = json.loads((BENCHMARKS / "gpu_checks/cpu_losses.json").read_text())["losses"]
    # an untrained model of 893 tokens, and what 200 steps reach
    assert len(losses) == 200 and losses[0] == pytest.approx(6.7946, abs=1e-3) and losses[-1] < 0.85


@pytest.mark.slow
def test_the_stored_losses_are_those_of_todays_recipe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_checks import harness, training

    machine = harness.Machine(torch.device("cpu"), tmp_path)
    found = training.losses(machine, "pretrain", tmp_path / "run", "--max_steps", "200", on_cpu=True)
    assert training.deviation(found, training.stored()) < training.CURVE / 4


@pytest.mark.gpu
def test_every_check_passes_on_this_gpu(tmp_path):
    result = run("--output_dir", str(tmp_path), "--time_limit", "480")
    assert result.returncode == 0, result.stdout + result.stderr
