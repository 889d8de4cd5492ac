"""What "registered" means: every table of transformers and PEFT in which a model type must stand."""

import importlib.abc
import importlib.util
import sys

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from .configuration_minigpt import MiniGPTConfig
from .modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel


LORA_TARGETS = ["q_proj", "v_proj"]


def register() -> None:
    """
    Make the Auto classes, the pipelines, the Trainer, `transformers serve` and PEFT know MiniGPT. Calling it again
    does nothing new.
    """
    AutoConfig.register(MiniGPTConfig.model_type, MiniGPTConfig, exist_ok=True)
    MiniGPTConfig.register_for_auto_class()
    for auto_class, model_class, names in (
        (AutoModel, MiniGPTModel, modeling_auto.MODEL_MAPPING_NAMES),
        (AutoModelForCausalLM, MiniGPTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (
            AutoModelForSequenceClassification,
            MiniGPTForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
    ):
        auto_class.register(MiniGPTConfig, model_class, exist_ok=True)
        # Makes `save_pretrained` copy the code beside the weights.
        model_class.register_for_auto_class(auto_class.__name__)
        # The Trainer looks a class name up here, and with label smoothing shifts the labels only if it is found.
        names[MiniGPTConfig.model_type] = model_class.__name__
        # `transformers serve` takes the class from the top of the package.
        setattr(transformers, model_class.__name__, model_class)
    register_lora_targets()


def register_lora_targets() -> None:
    """PEFT's default targets: at once if PEFT is loaded, else when it will be, so that nobody pays for its import."""
    if "peft.utils.constants" in sys.modules:
        add_lora_targets(sys.modules["peft.utils.constants"])
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def add_lora_targets(constants) -> None:
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MiniGPTConfig.model_type, LORA_TARGETS)


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Waits for the import of `peft.utils.constants`, fills its table, and is gone."""

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
            add_lora_targets(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
