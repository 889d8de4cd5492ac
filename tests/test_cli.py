"""The command `hf-minigpt`, in a clone and from a wheel installed elsewhere."""

import importlib.metadata
import os
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_minigpt import cli
from hf_minigpt.commands import COMMANDS, command_for, find_config


ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in ROOT.glob("recipes/configs/*.yaml"))


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-minigpt", *arguments])
        cli.main()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page(name, run, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(name, "--help")
    printed = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert f"usage: hf-minigpt {name} " in printed.replace("Usage", "usage")
    # the commands that it shows exist without a clone
    assert "python recipes/" not in printed and "accelerate launch recipes/" not in printed


def test_wrong_commands_are_answered_with_the_list(run, capsys):
    for arguments in (["pretrian"], []):
        with pytest.raises(SystemExit) as exit_info:
            run(*arguments)
        assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'pretrian'" in error and all(f"'{name}'" in error for name in COMMANDS)
    with pytest.raises(SystemExit):
        run("--help")
    printed = capsys.readouterr().out
    assert all(command.summary in printed for command in COMMANDS.values())


def test_a_command_gets_its_arguments(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("generate", "runs/none", "--top_q", "3")
    assert "hf-minigpt generate: error: unrecognized arguments: --top_q 3" in capsys.readouterr().err


def test_next_commands_fit_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert command_for("generate") == "python recipes/generate.py"
    assert command_for("classify", launch=True) == "accelerate launch recipes/finetune_imdb.py"
    assert command_for("serve") == "hf-minigpt serve"
    # another project with scripts of the same names
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/generate.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert command_for("generate") == "hf-minigpt generate"
    assert command_for("pretrain", launch=True) == "accelerate launch -m hf_minigpt pretrain"


def test_configs_are_found_by_path_and_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    packaged = ROOT / "recipes/configs/imdb.yaml"
    assert find_config("imdb").samefile(packaged) and find_config("imdb.yaml").samefile(packaged)
    # a file in the working directory comes first
    Path("imdb.yaml").write_text("seed: 1")
    assert find_config("imdb.yaml") == Path("imdb.yaml")
    with pytest.raises(FileNotFoundError, match=r"no such file\. .* Did you mean imdb\?") as error:
        find_config("imbd")
    assert all(name in str(error.value) for name in CONFIGS)
    with pytest.raises(FileNotFoundError):
        find_config("configs/imdb.yaml")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a wheel is built from, without build folders of earlier versions."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("hf_minigpt", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def can_build() -> bool:
    """Whether the installed setuptools is as new as pyproject.toml requires."""
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def pip(*arguments) -> None:
    # else pip downloads setuptools
    isolation = ["--no-build-isolation"] if can_build() else []
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", *isolation]
    subprocess.run(command, check=True, cwd=arguments[-1] if Path(arguments[-1]).is_dir() else None)


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", folder, sources)
    (path,) = folder.glob("*.whl")
    return path


def run_outside(python: Path, folder: Path, *arguments: str, pythonpath: str = "") -> str:
    """Run Python in a folder outside the repository, and return what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": pythonpath} if pythonpath else {}
    result = subprocess.run([python, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_has_the_recipes_and_runs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path / "site")
    packaged = [*ROOT.glob("recipes/*.py"), *ROOT.glob("recipes/*/*.yaml"), *ROOT.glob("recipes/launch/*.sh")]
    expected = {f"hf_minigpt/{path.relative_to(ROOT).as_posix()}" for path in packaged}
    expected |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("hf_minigpt/**/*.py")}
    assert set(names) == expected | {"hf_minigpt/py.typed"}
    code = (
        "from hf_minigpt.commands import *; from hf_minigpt.recipes import pretrain; import hf_minigpt.cli; "
        "print(pretrain.__file__, find_config('imdb'), command_for('generate'), sep='\\n')"
    )
    printed = run_outside(Path(sys.executable), tmp_path, "-c", code, pythonpath=str(tmp_path / "site"))
    recipes = tmp_path / "site/hf_minigpt/recipes"
    assert printed.splitlines() == [
        str(recipes / "pretrain.py"),
        str(recipes / "configs/imdb.yaml"),
        "hf-minigpt generate",
    ]


@pytest.mark.skipif(not can_build(), reason="needs setuptools>=77")
def test_a_source_distribution_can_build_the_wheel(sources, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # Without the first of these files, setuptools does not find the package hf_minigpt.recipes.
    assert {"hf_minigpt/recipes/__init__.py", "recipes/pretrain.py", "recipes/configs/imdb.yaml"} <= names


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment, and a function that gives it the packages of this one, except hf_minigpt."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = (folder / "lib").glob("*/site-packages")

    def add_packages():
        # Files such as the editable install of hf_minigpt are not read from these folders.
        (site_packages / "packages.pth").write_text("\n".join(site.getsitepackages()))

    return folder, add_packages


TINY = shlex.split(
    "--context_length 32 --vocab_size 320 --max_examples 200 --max_steps 3 --per_device_train_batch_size 4 "
    "--cpu_threads 1 --disable_tqdm true --config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=1"
)


@pytest.mark.slow
def test_an_installed_wheel_trains_and_generates(wheel, environment, tmp_path):
    folder, add_packages = environment
    pip("--python", folder / "bin/python", "install", "--no-index", wheel)
    add_packages()
    python, command = folder / "bin/python", str(folder / "bin/hf-minigpt")
    for name in COMMANDS:
        assert f"hf-minigpt {name}" in run_outside(python, tmp_path, command, name, "--help")
    printed = run_outside(
        python, tmp_path, command, "pretrain", *TINY, "--output_dir", "out", "--cache_dir", str(tmp_path / "cache")
    )
    assert (tmp_path / "out/README.md").is_file() and "\nNext\n  hf-minigpt generate out --prompt " in printed
    arguments = ["out", "--prompt", "Once", "--greedy", "--max_new_tokens", "4"]
    text = run_outside(python, tmp_path, command, "generate", *arguments)
    assert text.startswith("Once")
    assert run_outside(python, tmp_path, "-m", "hf_minigpt", "generate", *arguments) == text


@pytest.mark.slow
def test_an_editable_install_finds_the_recipes_of_its_clone(sources, environment, tmp_path):
    folder, add_packages = environment
    # setuptools is a package of this environment
    add_packages()
    pip(
        "--python",
        folder / "bin/python",
        "install",
        "--no-index",
        "--ignore-installed",
        "--prefix",
        folder,
        "-e",
        sources,
    )
    for where in (tmp_path, sources):
        code = "from hf_minigpt.recipes import sft; print(sft.pretrain.__file__)"
        printed = run_outside(folder / "bin/python", where, "-c", code)
        assert printed.strip() == str(sources / "recipes/pretrain.py")
    script = [sources / "recipes/sft.py", "--help"]
    assert "usage: sft.py" in run_outside(folder / "bin/python", tmp_path, *map(str, script))
