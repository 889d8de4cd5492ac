"""
Every way of `generate` gives the argmax of full forward passes: in this process, in a process that has only the code
next to the checkpoint, and with a version of transformers that uses another name for the cache.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

from tests.programs import ways_to_generate
from tests.programs.ways_to_generate import WAYS, check_way
from tests.tiny import POSITIONS, tiny_model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", POSITIONS)
def test_every_way_gives_the_argmax_in_this_process(name, way):
    check_way(way, tiny_model(name))


@pytest.mark.parametrize(("name", "cache_name"), [("gpt2", None), ("modern", "memory")])
def test_every_way_gives_the_argmax_without_the_package(name, cache_name, tmp_path):
    if cache_name is not None and "past_key_values" not in BaseModelOutputWithPast.__dataclass_fields__:
        pytest.skip("this version of transformers has renamed the cache already")
    tiny_model(name).save_pretrained(tmp_path / "saved")
    site_packages = Path(transformers.__file__).parents[1]
    command = [sys.executable, "-I", ways_to_generate.__file__, tmp_path / "saved", site_packages]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    if cache_name is not None:
        command.append(cache_name)
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(WAYS)} ways are correct" in result.stdout
