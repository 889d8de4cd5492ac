"""Both pretraining recipes in one start of two processes, for tests/recipes/test_pretrain_recipes.py.

Started by torchrun: `-m tests.programs.pretraining_recipes OUTPUT_DIR FLAG ...`
"""

import sys
from pathlib import Path
from unittest import mock

from torch.nn.parallel import DistributedDataParallel

from hf_minigpt.recipes import pretrain, pretrain_loop


if __name__ == "__main__":
    output_dir, *flags = sys.argv[1:]
    # the second recipe needs the process group that the first would leave
    pretrain.end_training = lambda *args: None
    with mock.patch.object(DistributedDataParallel, "_sync_buffers") as broadcast:
        pretrain.main([*flags, "--output_dir", str(Path(output_dir, "two"))])
        pretrain_loop.main([*flags, "--output_dir", str(Path(output_dir, "two_by_loop"))])
    print(f"broadcasts of buffers: {broadcast.call_count};")
