"""Register MiniGPT in every table of transformers and PEFT that lists model types."""

import importlib.abc
import importlib.util
import sys
import warnings
from types import ModuleType

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from .model.configuration_minigpt import MiniGPTConfig
from .model.modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel


# MiniGPT's modules have the names of Llama's, which PEFT knows, except that MiniGPT has no gate.
PEFT_TEMPLATE, PEFT_ABSENT = "llama", {"gate_proj"}


def register() -> None:
    """
    Register MiniGPT with the Auto classes, the pipelines, the Trainer, `transformers serve` and PEFT. Further calls
    have no effect.
    """
    AutoConfig.register(MiniGPTConfig.model_type, MiniGPTConfig, exist_ok=True)
    MiniGPTConfig.register_for_auto_class()
    for auto_class, model_class, table in (
        (AutoModel, MiniGPTModel, "MODEL_MAPPING_NAMES"),
        (AutoModelForCausalLM, MiniGPTForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        (
            AutoModelForSequenceClassification,
            MiniGPTForSequenceClassification,
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        ),
    ):
        auto_class.register(MiniGPTConfig, model_class, exist_ok=True)
        # `save_pretrained` then copies the code next to the weights.
        model_class.register_for_auto_class(auto_class.__name__)
        add_class_name(table, model_class.__name__)
        # `transformers serve` looks the class up in the package `transformers`.
        setattr(transformers, model_class.__name__, model_class)
    register_peft_targets()


def add_class_name(table: str, class_name: str) -> None:
    """Add a class to a table by name. With label smoothing the Trainer shifts labels only for the classes listed."""
    names = getattr(modeling_auto, table, None)
    try:
        names[MiniGPTConfig.model_type] = class_name  # type: ignore[index]
    except TypeError:
        warnings.warn(
            f"transformers {transformers.__version__} has no table modeling_auto.{table} for {class_name}. Do not use "
            "label_smoothing_factor, or install a version that hf_minigpt supports.",
            stacklevel=2,
        )


def register_peft_targets() -> None:
    """Add PEFT's default targets now if PEFT is loaded, else on its import, which is slow."""
    if "peft.utils.constants" in sys.modules:
        add_peft_targets(sys.modules["peft.utils.constants"])
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def add_peft_targets(constants: ModuleType) -> None:
    """Add the default target modules of each method, such as LoRA, IA3 and VeRA."""
    filled = set()
    for name, table in vars(constants).items():
        if not name.endswith("_MODULES_MAPPING") or not isinstance(table, dict):
            continue
        if isinstance(modules := table.get(PEFT_TEMPLATE), list):
            table.setdefault(MiniGPTConfig.model_type, [module for module in modules if module not in PEFT_ABSENT])
            filled.add(name)
    if "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING" not in filled:
        warnings.warn(
            "This version of PEFT has no table of default modules. Set target_modules for adapters of MiniGPT, for "
            "example ['q_proj', 'v_proj'].",
            stacklevel=2,
        )


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Add the targets once `peft.utils.constants` is imported, then remove itself from `sys.meta_path`."""

    def find_spec(self, fullname, path, target=None):
        if fullname != "peft.utils.constants":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            add_peft_targets(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
