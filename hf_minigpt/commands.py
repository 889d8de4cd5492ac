"""The subcommands of `hf-minigpt`, and the YAML files that come with the recipes."""

import importlib
from pathlib import Path
from typing import NamedTuple

from .flags import did_you_mean


class Command(NamedTuple):
    """A module with a `main`, and its description in one line."""

    module: str
    summary: str


COMMANDS = {
    "pretrain": Command("hf_minigpt.recipes.pretrain", "pretrain a MiniGPT"),
    "classify": Command("hf_minigpt.recipes.finetune_imdb", "finetune a text classifier"),
    "sft": Command("hf_minigpt.recipes.sft", "finetune a model on instructions"),
    "generate": Command("hf_minigpt.recipes.generate", "continue a prompt"),
    "chat": Command("hf_minigpt.recipes.chat", "talk with a finetuned model"),
    "perplexity": Command("hf_minigpt.recipes.perplexity", "compute bits per byte and perplexity of models"),
    "convert": Command("hf_minigpt.recipes.convert", "convert a GPT-1, GPT-2, nanoGPT or NanoChat to MiniGPT"),
    "export": Command("hf_minigpt.recipes.export", "export to GPT-2, NanoChat, ONNX, torch.export or GGUF"),
    "demo": Command("hf_minigpt.recipes.demo", "open a page to try a model in the browser"),
    "serve": Command("hf_minigpt.deploy.serving", "serve a model with an OpenAI-compatible API"),
}


def recipes_folder() -> Path:
    """Return the folder of the recipes: `recipes/` of a clone, or inside the installed package."""
    return Path(next(iter(importlib.import_module("hf_minigpt.recipes").__path__)))


def command_for(name: str, *, launch: bool = False) -> str:
    """
    Return the shell command that runs a subcommand from the working directory.

    Args:
        name: a key of `COMMANDS`.
        launch: start it with `accelerate launch`, for training.

    Returns:
        `python recipes/generate.py` in the root of a clone, `hf-minigpt generate` elsewhere.
    """
    script = Path("recipes", COMMANDS[name].module.rpartition(".")[2] + ".py")
    in_clone = script.is_file() and script.samefile(recipes_folder() / script.name)
    if launch:
        return f"accelerate launch {script.as_posix() if in_clone else f'-m hf_minigpt {name}'}"
    return f"python {script.as_posix()}" if in_clone else f"hf-minigpt {name}"


def find_config(name: str) -> Path:
    """
    Return the YAML file that `--config` names.

    Args:
        name: the path of a file, or the name of a file in `recipes/configs`: "imdb" or "imdb.yaml".

    Raises:
        FileNotFoundError: there is neither. The message lists the files in `recipes/configs`.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = {path.stem: path for path in sorted((recipes_folder() / "configs").glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in packaged:
        return packaged[stem]
    names = list(packaged)
    raise FileNotFoundError(
        f"no such file. Give the path of a YAML file, or one of {', '.join(names)}.{did_you_mean(stem, names)}"
    )
