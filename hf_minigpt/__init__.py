"""A GPT written from scratch that works wherever a transformers model works."""

from .model.configuration_minigpt import MiniGPTConfig
from .model.modeling_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel
from .presets import preset
from .registration import register


__version__ = "0.1.0"
__all__ = ["MiniGPTConfig", "MiniGPTForCausalLM", "MiniGPTForSequenceClassification", "MiniGPTModel", "preset"]

register()
