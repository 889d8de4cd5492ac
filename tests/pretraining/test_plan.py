"""The plan of a run: its length, size and cost before it starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_minigpt.recipes.benchmarks.shapes import measure_step

from hf_minigpt import preset
from hf_minigpt.data.token_store import PreparedCorpus
from hf_minigpt.pretraining.arguments import PlanArguments, PretrainArguments
from hf_minigpt.pretraining.data import open_documents, prepare_data
from hf_minigpt.pretraining.plan import make_plan, plan_pretraining
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.parsing import parse


ALL = (ModelArguments, DataArguments, PlanArguments, PretrainArguments)
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.mark.parametrize("name", ["books", "bookcorpus"])
def test_a_plan_in_steps_does_not_read_the_dataset(name):
    flags = ["--config", str(CONFIGS / f"{name}.yaml"), "--dataset", "no/dataset", "--flops_per_second", "1e12"]
    model, data, plan_args, args = parse(ALL, [*flags, "--torch_compile", "false"])
    plan = plan_pretraining(model, data, plan_args, args)
    assert plan.num_tokens == args.max_steps * args.rows_per_step * model.context_length
    assert plan.num_parameters > 0
    assert plan.price is None and "price" not in str(plan)


def test_a_plan_in_epochs_counts_the_tokens_of_the_dataset(tmp_path):
    flags = ["--max_examples", "100", "--cache_dir", str(tmp_path), "--vocab_size", "320", "--context_length", "32"]
    flags += ["--num_train_epochs", "2", "--flops_per_second", "1e12", "--price_per_hour", "3"]
    model, data, plan_args, args = parse(ALL, flags)
    plan = plan_pretraining(model, data, plan_args, args)
    _, corpus = prepare_data(model, data, open_documents(data))
    assert isinstance(corpus, PreparedCorpus)
    assert 1.8 * corpus.train.num_tokens < plan.num_tokens <= 2 * corpus.train.num_tokens + plan.tokens_per_step
    assert plan.price == pytest.approx(3 * plan.seconds / 3600)


@pytest.mark.parametrize(
    ("name", "rows", "length", "dtype", "optimizer", "checkpointing", "gib"),
    [
        # 32 with all logits
        ("gpt2", 64, 512, torch.bfloat16, "muon", False, 14.5),
        ("gpt2-bookcorpus", 16, 512, torch.float16, "adamw", False, 6),
        ("gpt2-bookcorpus", 64, 512, None, "adamw", True, 6),
        # 22 if the squared ReLU ran in float32
        ("minigpt-base", 32, 1024, torch.bfloat16, "muon", False, 17),
        ("minigpt-large", 8, 2048, torch.bfloat16, "muon", True, 9),
        ("minigpt-small", 16, 512, None, "muon", False, 6),
    ],
)
def test_peak_memory_is_bounded_and_planned(name, rows, length, dtype, optimizer, checkpointing, gib):
    config = preset(name)
    args = SimpleNamespace(
        device=torch.device("cuda"),
        world_size=1,
        max_steps=1,
        train_batch_size=rows,
        rows_per_step=rows,
        gradient_accumulation_steps=1,
        optimizer=optimizer,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        gradient_checkpointing=checkpointing,
    )
    plan = make_plan(config, args, PlanArguments(flops_per_second=1e14), length, rows_per_epoch=0)
    meter = measure_step(config, rows, length, optimizer, dtype, checkpointing)
    assert meter.peak < gib * 2**30
    assert plan.memory_bytes == pytest.approx(meter.peak, rel=0.05)
