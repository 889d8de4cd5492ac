"""Training with FSDP2 in two processes on CPUs with gloo equals one process, for tests/model/test_head_under_fsdp.py.

Started by torchrun from the repository's root: `-m tests.programs.sharded_head`
"""

import os
import sys
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.model import loss_minigpt
from tests.tiny import random_ids, tiny_model


ROWS, LENGTH, VOCABULARY, NUM_IDS = 8, 16, 160, 150
CHUNK_ROWS = 16


def shard(model, reshard_after_forward: bool, mp_policy: MixedPrecisionPolicy | None = None) -> None:
    """Shard as accelerate does: a group for each block, one for the embedding, and one for the norm and the head."""
    options = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
    }
    for block in model.model.layers:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    tail = [model.model.norm, model.lm_head]
    if model.config.tie_word_embeddings:
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(tail, reshard_after_forward=False, **options)
    fully_shard(model, reshard_after_forward=reshard_after_forward, **options)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return output


def build(name: str, **overrides):
    return tiny_model(name, vocab_size=VOCABULARY, unpadded_vocab_size=NUM_IDS, **overrides).train()


def language_model(name: str, reshard_after_forward: bool, micro_batches: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = [random_ids(world_size * ROWS, LENGTH, vocab_size=NUM_IDS, seed=i) for i in range(micro_batches)]
    reference, model = build(name), build(name)
    shard(model, reshard_after_forward)
    assert type(model.lm_head).__name__ == "FSDPLinear"
    for _ in range(2):
        expected = [reference(ids, labels=ids, skip_logits=False).loss / micro_batches for ids in batches]
        sum(expected).backward()
        for i, ids in enumerate(batches):
            model.set_requires_gradient_sync(i == micro_batches - 1)
            mine = ids[rank * ROWS : (rank + 1) * ROWS]
            with LargestTensor() as largest:
                output = model(mine, labels=mine, skip_logits=True, count_correct=True)
            # neither the rank's logits nor a copy of them, though each chunk of them was computed
            assert CHUNK_ROWS * VOCABULARY <= largest.num_elements < ROWS * LENGTH * VOCABULARY, largest.num_elements
            assert output.logits is None and output.num_correct.dtype == torch.int64
            loss = output.loss / micro_batches
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / world_size, expected[i].detach(), rtol=1e-5, atol=1e-6)
        parameters = dict(model.named_parameters())
        for key, parameter in reference.named_parameters():
            found = parameters[key].grad.full_tensor()
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        for trained in (reference, model):
            torch.optim.SGD(trained.parameters(), lr=0.1).step()
            trained.zero_grad()
    # in evaluation nothing registers a backward pass
    with torch.no_grad():
        ids = batches[0]
        mine = ids[rank * ROWS : (rank + 1) * ROWS]
        loss = model.eval()(mine, labels=mine, skip_logits=True).loss
        torch.testing.assert_close(loss, reference.eval()(mine, labels=mine).loss, rtol=1e-5, atol=1e-5)
        assert model(mine, labels=mine).logits.shape == (ROWS, LENGTH, VOCABULARY)


def classifier() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    options = {"model_class": MiniGPTForSequenceClassification, "auxiliary_lm_weight": 0.5, "pad_token_id": 0}
    reference, model = build("modern", **options), build("modern", **options)
    shard(model, True)
    ids = random_ids(world_size * ROWS, LENGTH, vocab_size=NUM_IDS).clamp(min=1)
    labels = torch.arange(len(ids)) % 2
    reference(ids, labels=labels).loss.backward()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    with LargestTensor() as largest:
        model(ids[mine], labels=labels[mine]).loss.backward()
    assert largest.num_elements < ROWS * LENGTH * VOCABULARY
    parameters = dict(model.named_parameters())
    for key, parameter in reference.named_parameters():
        torch.testing.assert_close(parameters[key].grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-6)


def bfloat16() -> None:
    """Computation in bfloat16, sums and reduction in float32."""
    rank = dist.get_rank()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reference, model = build("modern"), build("modern")
    shard(model, True, policy)
    ids = random_ids(2 * ROWS, LENGTH, vocab_size=NUM_IDS)
    mine = ids[rank * ROWS : (rank + 1) * ROWS]
    expected = reference(ids, labels=ids).loss
    expected.backward()
    loss = model(mine, labels=mine, skip_logits=True).loss
    loss.backward()
    assert loss.dtype == torch.float32
    found, gradient = model.lm_head.weight.grad.full_tensor(), reference.lm_head.weight.grad
    assert found.dtype == torch.float32 and (found - gradient).norm() < 0.03 * gradient.norm()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    loss_minigpt.CHUNK_ELEMENTS["cpu"] = 1
    loss_minigpt.MIN_CHUNK_ROWS = CHUNK_ROWS
    for case in product(("gpt2", "modern"), (True, False), (1, 2)):
        language_model(*case)
        if dist.get_rank() == 0:
            print("equal:", *case, flush=True)
    classifier()
    bfloat16()
    dist.barrier()
    if dist.get_rank() == 0:
        print("equal: classifier, bfloat16", flush=True)
    # a process that destroys FSDP2's groups is sometimes aborted
    sys.stderr.flush()
    os._exit(0)
