"""What the arguments and the Trainers do on hosts with GPUs, pretended here: devices, TF32, compilation, syncs."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers.utils.import_utils import enable_tf32

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.training import arguments, flops
from hf_minigpt.training.flops import peak_flops_of, peak_flops_per_second
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.tiny import tiny_config


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
