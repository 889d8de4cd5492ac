"""Checkpoints of FSDP2, sharded and whole, are resumed from with any number of processes, with and without FSDP."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minigpt.recipes import convert
from hf_minigpt.training.checkpoints.sealing import BrokenCheckpoint, verify_checkpoint
from hf_minigpt.training.checkpoints.sharded import is_sharded, merge_checkpoint
from tests.programs.sharded_checkpoints import SAVED, STEPS


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folders of all runs of tests/programs/sharded_checkpoints.py."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.programs.sharded_checkpoints", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    # the time limit ends a run that hangs
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return folder


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


@pytest.mark.parametrize(("run", "processes"), [("two", 2), ("four_after_two", 4), ("one_after_two", 1)])
def test_each_process_writes_its_part_and_all_are_sealed(folder, run, processes):
    checkpoint = folder / run / f"checkpoint-{STEPS}"
    files = verify_checkpoint(checkpoint)["files"]
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        expected = {f"{part}/.metadata", *(f"{part}/__{rank}_0.distcp" for rank in range(processes))}
        assert expected == {name for name in files if name.startswith(part)}
    assert not list(checkpoint.glob("*.safetensors"))


RUNS = ("two", "two_resumed", "four_after_two", "one_after_two", "one", "two_after_one", "alone_after_two")
RUNS += ("whole_after_sharded", "whole", "sharded_after_whole", "alone_after_whole")


@pytest.mark.parametrize("run", RUNS)
def test_every_run_ends_like_one_process(folder, run):
    assert (folder / run / f"checkpoint-{SAVED}").is_dir()
    expected, found = weights(folder / "alone"), weights(folder / run)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)


def test_a_resumed_run_is_exact(folder):
    expected, found = weights(folder / "two"), weights(folder / "two_resumed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_becomes_a_model_folder(folder, tmp_path, capsys):
    checkpoint = folder / "two" / f"checkpoint-{STEPS}"
    assert is_sharded(checkpoint) and not is_sharded(folder / "alone" / f"checkpoint-{STEPS}")
    convert.main([str(checkpoint), str(tmp_path / "model")])
    assert f"generate.py {tmp_path}/model" in capsys.readouterr().out
    expected, found = weights(folder / "two"), weights(tmp_path / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokenizer, copy = (AutoTokenizer.from_pretrained(path) for path in (folder / "tokenizer", tmp_path / "model"))
    assert copy.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "model/training_settings.json").is_file()


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_a_damaged_file_is_never_read(folder, tmp_path, name, monkeypatch):
    """They hold pickles, which run code when they are read."""
    checkpoint = Path(shutil.copytree(folder / "two" / f"checkpoint-{STEPS}", tmp_path / "checkpoint-6"))
    path = checkpoint / "pytorch_model_fsdp_0" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(torch.distributed.checkpoint, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(BrokenCheckpoint, match=name):
        merge_checkpoint(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_only_sharded_checkpoints_are_merged(folder, tmp_path):
    with pytest.raises(ValueError, match="is not a sharded checkpoint"):
        merge_checkpoint(folder / "alone" / f"checkpoint-{STEPS}", tmp_path)
