"""Under FSDP2 the loss is computed without logits, and equals one process's in value and gradient."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_minigpt.model.loss_minigpt import can_skip_logits
from hf_minigpt.model.products_minigpt import is_plain_linear


ROOT = Path(__file__).parents[2]


def test_two_processes_with_a_sharded_head_are_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.programs.sharded_head"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal:") == 9


def test_only_fsdps_own_hooks_are_accepted(tmp_path):
    """With any other hook the head must be called for its logits."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    try:
        head = nn.Linear(4, 8)
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
        assert can_skip_logits(head) and not is_plain_linear(head)
        for register in (head.register_forward_hook, head.register_forward_pre_hook, head.register_full_backward_hook):
            handle = register(lambda *args: None)
            assert not can_skip_logits(head)
            handle.remove()
        assert can_skip_logits(head)
        head.forward = head.forward
        assert not can_skip_logits(head)
    finally:
        torch.distributed.destroy_process_group()
