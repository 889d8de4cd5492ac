"""Imports run one way: model, data, publishing, training, the jobs, recipes. No job imports another."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_minigpt"
JOBS = {"pretraining", "classification", "instructions"}
# What each part of the package may import, beside itself. Files at the top of the package are one part.
TOP = {"model", "top"}
ALLOWED = {
    "model": set(),
    "top": {"model"},
    "data": TOP,
    "publishing": TOP,
    "deploy": TOP,
    "training": TOP | {"data", "publishing", "deploy"},
    **dict.fromkeys(JOBS, TOP | {"data", "publishing", "deploy", "training"}),
    "command line": TOP | {"deploy"},
}
FILES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The part of the package that a module belongs to."""
    names = module.split(".")
    if names[-1] in ("__main__", "cli"):
        return "command line"
    return names[1] if len(names) > 1 and (PACKAGE / names[1]).is_dir() else "top"


def imports(path: Path):
    """Modules of the package that a file imports, with the names taken from each."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "hf_minigpt")
        elif isinstance(node, ast.ImportFrom):
            above = list(path.parts[: len(path.parts) - node.level]) if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            if module.split(".")[0] != "hf_minigpt":
                continue
            for alias in node.names:
                inner = PACKAGE.parent / Path(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield (f"{module}.{alias.name}", []) if is_module else (module, [alias.name])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    part = part_of(".".join(path.with_suffix("").parts))
    for module, _ in imports(path):
        imported = part_of(module)
        assert imported == part or imported in ALLOWED[part], f"{part} must not import {module}"


RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("recipes/**/*.py"))


@pytest.mark.parametrize("path", FILES + RECIPES, ids=str)
def test_private_names_stay_in_their_file(path):
    private = [f"{module}.{name}" for module, names in imports(path) for name in names if name.startswith("_")]
    assert not private
