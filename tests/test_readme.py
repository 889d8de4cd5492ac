"""The README's commands name what exists, and its Python runs."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset

from hf_minigpt.classification.arguments import ClassificationArguments, ReviewArguments, SeedArguments
from hf_minigpt.instructions.arguments import InstructionArguments, SFTArguments
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.lora import LoraArguments
from tests.tiny import tiny_model


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# of the recipes whose flags are dataclasses
ARGUMENTS = {
    "recipes/pretrain.py": (ModelArguments, DataArguments, PlanArguments, PretrainArguments),
    "recipes/finetune_imdb.py": (
        ModelArguments,
        ReviewArguments,
        ClassificationArguments,
        LoraArguments,
        SeedArguments,
    ),
    "recipes/sft.py": (InstructionArguments, SFTArguments, LoraArguments),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_what_exists(command):
    script = None
    for word in shlex.split(command):
        if word.startswith(("recipes/", "constraints")):
            assert (ROOT / word).exists(), word
            script = word if word.endswith(".py") else script
        elif word.startswith("--") and script in ARGUMENTS:
            flags = {field.name for argument_type in ARGUMENTS[script] for field in dataclasses.fields(argument_type)}
            assert word.removeprefix("--") in flags | {"config"}, word
        elif word.startswith("--") and script is not None:
            assert word in (ROOT / script).read_text(encoding="utf-8"), word


def test_the_map_is_true():
    block = README.split("## Map")[1].split("```text\n")[1].split("```")[0]
    listed, folder = set(), ROOT
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
        path = folder / name if line.startswith(" ") else folder
        assert path.is_dir(), path
        listed.add(path)
    packages = {path.parent for path in ROOT.glob("hf_minigpt/*/__init__.py")}
    assert packages <= listed


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_runs(snippet, tmp_path, monkeypatch):
    texts = ["Once upon a time there was a mill, and nobody knew why."] * 20
    tokenizer = train_tokenizer(texts, 320, model_max_length=64, show_progress=False)
    model = tiny_model("modern", vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0, pad_token_id=1)
    monkeypatch.chdir(tmp_path)
    for part in (model, tokenizer):
        part.save_pretrained("runs/pretrain")
    reviews = Dataset.from_dict({"text": texts[:4], "label": [0, 1, 0, 1]})
    for split in ("train", "test"):
        reviews.to_csv(f"{split}.csv")
    exec(snippet, {"my_dataset": Dataset.from_dict({"text": texts})})
