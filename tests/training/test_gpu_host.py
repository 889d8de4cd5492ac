"""What the arguments and the Trainers do on hosts with GPUs, pretended here: devices, TF32, compilation, syncs."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn
from transformers.utils.import_utils import enable_tf32

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.classification.arguments import ClassificationArguments
from hf_minigpt.classification.batching import ReviewCollator, ReviewRows
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import ShuffledDocumentRows
from hf_minigpt.instructions.arguments import SFTArguments
from hf_minigpt.instructions.rows import InstructionCollator, PackedRows
from hf_minigpt.instructions.trainer import InstructionTrainer
from hf_minigpt.presets import preset
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.recipes import pretrain_loop
from hf_minigpt.training import arguments, flops
from hf_minigpt.training.checkpoints.signals import StopSignals
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.flops import peak_flops_of, peak_flops_per_second
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.trainer import LanguageModelTrainer, RecipeTrainer
from tests.instructions.tiny_chat import chat_model, tokenized
from tests.pretended_gpu import count_syncs, pretended_gpu, to_gpu
from tests.programs.distributed_training import open_store
from tests.tiny import tiny_config


ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_host(monkeypatch):
    """A host with four A100s, as far as the arguments look. No tensor can be put on them."""
    for name, value in {
        "is_available": True,
        "device_count": 4,
        "is_bf16_supported": True,
        "set_device": None,
        "get_device_name": "NVIDIA A100-SXM4-80GB",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for module in ("hf_minigpt.training.arguments", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_tf32_available", lambda: True)
    arguments.print_launch_command.cache_clear()
    # it changes the switch only at its first call
    enable_tf32.cache_clear()
    yield
    enable_tf32.cache_clear()
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    # the next test shall find the CPU again
    AcceleratorState._reset_state(reset_partial_state=True)


def make_trainer(args: PretrainArguments, monkeypatch) -> LanguageModelTrainer:
    monkeypatch.setattr(LanguageModelTrainer, "_move_model_to_device", lambda *args: None)
    return LanguageModelTrainer(MiniGPTForCausalLM(tiny_config("modern")), args)


def test_without_a_launcher_one_of_several_gpus_is_used(gpu_host, tmp_path, capsys):
    for _ in range(2):
        args = PretrainArguments(str(tmp_path), per_device_train_batch_size=8)
    assert (args.n_gpu, args.train_batch_size, args.eval_batch_size) == (1, 8, 32)
    assert (args.device, args.world_size) == (torch.device("cuda:0"), 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "GPUs" in line]
    assert "one of 4 GPUs" in line and "accelerate launch --config_file recipes/launch/ddp.yaml" in line


def test_a_launch_on_the_cpu_of_a_gpu_host_is_in_fp32(gpu_host, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = PretrainArguments(str(tmp_path))
    assert (args.device.type, args.n_gpu, args.bf16, args.tf32) == ("cpu", 0, False, None)


def test_the_trainer_wraps_no_model_in_data_parallel(gpu_host, monkeypatch, tmp_path):
    trainer = make_trainer(PretrainArguments(str(tmp_path), eval_strategy="no"), monkeypatch)
    assert not isinstance(trainer._wrap_model(trainer.model, training=True), nn.DataParallel)


@pytest.mark.parametrize("tf32", [None, True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_tf32_can_be_read_by_inductor(gpu_host, monkeypatch, tmp_path, tf32, precision):
    """Before compiling with max-autotune, Inductor reads the switches of torch's older API."""
    options = {"torch_compile": True, "torch_compile_mode": "max-autotune", "eval_strategy": "no"}
    args = PretrainArguments(str(tmp_path), precision=precision, tf32=tf32, **options)
    for _ in range(2):
        expected = tf32 is not False
        assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == expected
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if expected else "ieee")
        # accelerate would enable it for compiled models in fp32
        make_trainer(args, monkeypatch)


@pytest.mark.parametrize(
    ("name", "fp16", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 312),
        ("NVIDIA A100-PCIE-40GB", 312, 312),
        ("NVIDIA A100 80GB PCIe", 312, 312),
        ("NVIDIA H100 80GB HBM3", 989, 989),
        ("NVIDIA H100 PCIe", 756, 756),
        ("NVIDIA H100 NVL", 835, 835),
        ("NVIDIA H200", 989, 989),
        ("NVIDIA H200 NVL", 835, 835),
        ("NVIDIA H20", 148, 148),
        ("NVIDIA GH200 480GB", 989, 989),
        ("NVIDIA B200", 2250, 2250),
        ("NVIDIA GB200", 2500, 2500),
        ("NVIDIA L4", 121, 121),
        ("NVIDIA L40", 181, 181),
        ("NVIDIA L40S", 362, 362),
        ("NVIDIA A10", 125, 125),
        ("NVIDIA A10G", 70, 70),
        ("NVIDIA A40", 149.7, 149.7),
        ("NVIDIA RTX A6000", 154.8, 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 364.2),
        ("NVIDIA GeForce RTX 3090", 71, 71),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5, 209.5),
        # no bf16
        ("Tesla T4", 65, None),
        ("Tesla V100-SXM2-16GB", 125, None),
        ("Tesla V100-PCIE-32GB", 112, None),
        ("Tesla V100S-PCIE-32GB", 130, None),
        # names that contain those of other GPUs
        ("NVIDIA T400 4GB", None, None),
        ("NVIDIA T4G", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA RTX A4000", None, None),
        ("NVIDIA A100X", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("Quadro RTX 6000", None, None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None, None),
        ("NVIDIA GB10", None, None),
    ],
)
def test_peak_flops_are_of_the_gpu_with_that_name(name, fp16, bf16):
    for dtype, expected in ((torch.float16, fp16), (torch.bfloat16, bf16), (torch.float32, None)):
        assert peak_flops_of(name, dtype) == (None if expected is None else expected * 1e12)


def test_the_peak_of_an_unknown_gpu_is_measured(gpu_host, monkeypatch):
    monkeypatch.setattr(flops, "measure_flops_per_second", lambda *args, **kwargs: 1e9)
    peak_flops_per_second.cache_clear()
    device = torch.device("cuda:0")
    assert peak_flops_per_second(device, torch.bfloat16) == 312e12
    assert peak_flops_per_second(device, torch.float32) == 1e9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T400 4GB")
    peak_flops_per_second.cache_clear()
    assert peak_flops_per_second(device, torch.float16) == 1e9
    peak_flops_per_second.cache_clear()


# Syncs of an optimizer step with two micro-batches. Those of the model and the optimizer have tests of their own.


STEPS = 3
OPTIONS = {
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_strategy": "no",
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def pretraining(folder: Path, **options) -> RecipeTrainer:
    args = PretrainArguments(str(folder), per_device_train_batch_size=4, **OPTIONS, **options)
    return LanguageModelTrainer(
        MiniGPTForCausalLM(tiny_config("modern")),
        args,
        train_dataset=ShuffledDocumentRows(open_store(folder / "store"), 16, seed=3),
        data_collator=LanguageModelCollator(pad_token_id=1),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
    )


def instructions(folder: Path) -> RecipeTrainer:
    model, tokenizer, _ = chat_model()
    args = SFTArguments(str(folder), per_device_train_batch_size=1, **OPTIONS)
    return InstructionTrainer(
        model,
        args,
        train_dataset=PackedRows(tokenized(tokenizer), 64),
        data_collator=InstructionCollator(tokenizer.pad_token_id),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
    )


def classification(folder: Path) -> RecipeTrainer:
    _, tokenizer, _ = chat_model()
    texts = ["here is " + "the box " * (1 + i % 7) for i in range(40)]
    options = {"load_best_model_at_end": False, "early_stopping_patience": None, "adversarial_epsilon": 0.01}
    args = ClassificationArguments(str(folder), tokens_per_batch=64, **OPTIONS, **options)
    config = tiny_config("modern", vocab_size=len(tokenizer), unpadded_vocab_size=None)
    config.pad_token_id = tokenizer.pad_token_id
    return ClassificationTrainer(
        MiniGPTForSequenceClassification(config),
        args,
        train_dataset=ReviewRows(texts, [i % 2 for i in range(40)], tokenizer, 24, training=True),
        data_collator=ReviewCollator(tokenizer.pad_token_id),
        optimizer_cls_and_kwargs=classification_optimizer(args),
    )


@pytest.mark.parametrize(
    ("make", "options", "allowed"),
    [
        (pretraining, {"optimizer": "muon", "precision": "bf16"}, 0),
        # torch's loss scaler asks whether to skip the step, if the optimizer is not fused
        (pretraining, {"optimizer": "muon", "precision": "fp16"}, 1),
        # how many targets there are, most tokens having none
        (instructions, {}, 1),
        (classification, {}, 0),
    ],
)
def test_a_step_of_the_trainer_does_not_wait_for_the_gpu(gpu_host, monkeypatch, tmp_path, make, options, allowed):
    totals: list[Counter] = []

    def get_batch_samples(self, *args):
        totals.append(Counter(syncs))
        return fetch(self, *args)

    fetch = RecipeTrainer.get_batch_samples
    monkeypatch.setattr(RecipeTrainer, "get_batch_samples", get_batch_samples)
    monkeypatch.setattr(RecipeTrainer, "_move_model_to_device", lambda self, model, device: to_gpu(model))
    with pretended_gpu(), count_syncs() as syncs:
        trainer = make(tmp_path, **options)
        # a copy from other memory waits, even if it shall not
        assert trainer.get_train_dataloader().pin_memory
        train_safely(trainer)
    # the first step also moves what stays on the GPU
    for before, after in itertools.pairwise(totals[1:]):
        found = after - before
        assert found.total() <= allowed, found
    assert len(totals) == STEPS


def test_a_step_of_the_loop_does_not_wait_for_the_gpu(gpu_host, monkeypatch, tmp_path):
    class Enough(Exception):
        pass

    def requested(self):
        totals.append(Counter(syncs))
        if len(totals) == STEPS:
            raise Enough
        return False

    totals: list[Counter] = []
    monkeypatch.setattr(StopSignals, "requested", requested)
    build = pretrain_loop.build_model
    monkeypatch.setattr(pretrain_loop, "build_model", lambda *args: to_gpu(build(*args)))
    flags = "--max_examples 30 --context_length 16 --vocab_size 320 --gradient_accumulation_steps 2 --cpu_threads 1"
    sizes = "--config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=2"
    folders = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    argv = [*f"{flags} --max_steps 20 {sizes}".split(), *folders]
    argv += ["--eval_strategy", "no", "--save_strategy", "no"]
    with pretended_gpu(), count_syncs() as syncs, pytest.raises(Enough):
        pretrain_loop.main(argv)
    for before, after in itertools.pairwise(totals):
        assert not after - before


CONFIGS = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes/configs").glob("*.yaml")]
# each architecture once
COMPILED = sorted(
    {
        (values["preset"], values.get("activation_checkpointing", False))
        for values in CONFIGS
        if values.get("torch_compile")
    }
)


@pytest.mark.parametrize(("name", "checkpointing"), COMPILED)
def test_the_models_of_configs_that_compile_are_one_graph(name, checkpointing):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"intermediate_size": 64, "vocab_size": 320, "max_position_embeddings": 32}
    model = MiniGPTForCausalLM(preset(name, **sizes)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, 320, (2, 33))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "shift_labels": ids[:, 1:]}
    gradients = []
    torch.compiler.reset()
    options = {"num_items_in_batch": torch.tensor(64), "skip_logits": True, "count_correct": True, "use_cache": False}
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(0)
        forward(**batch, **options).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
