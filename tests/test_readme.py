"""The README files: commands name scripts, flags and extras that exist, links resolve, Python snippets run."""

import functools
import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from torch.distributed.run import get_args_parser

from hf_minigpt.presets import PRESETS
from hf_minigpt.tokenization import train_tokenizer
from tests.tiny import tiny_model


ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "recipes/README.md",
        ROOT / "recipes/benchmarks/README.md",
        *sorted((ROOT / "model_cards").glob("*.md")),
    )
}
README = PAGES["README.md"]
COMMANDS = list(
    dict.fromkeys(
        line
        for page in PAGES.values()
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    )
)
# the cards' snippets name models that only their reader has
SNIPPETS = [
    snippet
    for name, page in PAGES.items()
    if name.endswith("README.md")
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
]


@functools.cache
def known_flags(script: str) -> set[str]:
    """The flags in a script's --help."""
    path = ROOT / script
    output: list[str] = []
    # benchmarks import their common module as Python does for a script
    with (
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.object(sys, "argv", [script, "--help"]),
        mock.patch("argparse.ArgumentParser._print_message", lambda self, message, file=None: output.append(message)),
        pytest.raises(SystemExit),
    ):
        spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses look up their module
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.main()
    return set(re.findall(r"(?<![\w-])--\w+", "".join(output)))


LAUNCHES = re.compile(r"(\w+=\w+ )*(torchrun|accelerate launch) .*\.py")
LAUNCHERS = {"torchrun": get_args_parser, "accelerate": launch_command_parser}


@pytest.mark.parametrize("command", [command for command in COMMANDS if LAUNCHES.match(command)])
def test_flags_of_launchers_exist(command):
    words = shlex.split(command)
    launcher = next(word for word in words if word in LAUNCHERS)
    known = {flag for action in LAUNCHERS[launcher]()._actions for flag in action.option_strings}
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert {word for word in words[:script] if word.startswith("--")} <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_scripts_configs_and_flags_that_exist(command):
    script = None
    for word in shlex.split(command):
        if word == "&&":
            script = None
        elif word.startswith(("recipes/", "constraints")):
            assert (ROOT / word).is_file(), word
            script = word if word.endswith(".py") else script
        elif word.startswith("--") and script is not None:
            flags = known_flags(script)
            # imdb_ablation.py passes the flags that it does not know to this recipe
            if script == "recipes/benchmarks/imdb_ablation.py":
                flags = flags | known_flags("recipes/finetune_imdb.py")
            assert word.partition("=")[0] in flags, word


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for page in PAGES.values() for name in re.findall(r'"(?:hf_minigpt|\.)\[(\w+)\]"', page)}
    assert named
    assert named <= set(extras)


def test_every_recipe_and_benchmark_is_explained():
    for folder in ("recipes", "recipes/benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name not in ("__init__.py", "common.py", "pictures.py"):
                assert path.name in PAGES[f"{folder}/README.md"], path


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_resolve(name):
    page = re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if not target.startswith("https://"):
            assert (ROOT / name).parent.joinpath(target).exists(), target
    for path in re.findall(r"`((?:hf_minigpt|recipes|tests|docs)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
    # configurations and benchmarks are named without their folder
    for file in re.findall(r"`(\w+\.(?:yaml|py))\b", page):
        places = ("recipes", "recipes/benchmarks", "recipes/configs", "recipes/launch")
        assert any((ROOT / place / file).is_file() for place in places), file


@pytest.mark.smoke
def test_the_map_lists_every_folder():
    block = README.split("## Map")[1].split("```text\n")[1].split("```")[0]
    listed, folder = set(), ROOT
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
        path = folder / name if line.startswith(" ") else folder
        assert path.is_dir(), path
        listed.add(path)
    # hf_minigpt/recipes, where it exists, points to recipes/
    packages = {path.parent for path in ROOT.glob("hf_minigpt/*/__init__.py")} - {ROOT / "hf_minigpt/recipes"}
    assert packages <= listed


def test_presets_exist():
    section = README.split("## Presets")[1].split("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    }
    assert named - {"BABY_RUNGS"} <= set(PRESETS)
    # "`a` to `b`" stands for those between the two
    assert set(PRESETS) - named == {"gpt2-medium", "gpt2-large", "minigpt-nano", "minigpt-small", "minigpt-base"}


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
