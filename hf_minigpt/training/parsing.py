"""Parses the recipes' command lines and YAML files into argument dataclasses."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..commands import find_config
from ..flags import check_flags, did_you_mean
from .safeguards import allow_any_output


# Flags of earlier versions, with their present names
RENAMED = {
    "held_out_fraction": "validation_fraction",
    "max_documents": "max_examples",
    "max_records": "max_examples",
    "max_train_examples": "max_examples",
    "max_length": "context_length",
    "dataset_split": "train_split",
    "max_lost": "max_lost_fraction",
    "pretraining_share": "pretraining_fraction",
    "adversarial_share": "adversarial_epsilon",
    "lora_r": "lora_rank",
    "lora": "lora_rank",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, and shows defaults."""


def parse(
    dataclass_types: Sequence[Any],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple:
    """Parse flags into dataclasses, and let standard output accept any character from then on.

    `--config FILE.yaml` sets values, which flags override. An unknown key or flag ends the program with a message that
    suggests the closest known one. Values are checked as `hf_minigpt.flags` describes.

    Args:
        dataclass_types: each field is a flag.
        argv: command line. Default: `sys.argv[1:]`.
        description: shown by `--help`.
        defaults: values by field that replace the dataclasses' defaults. The YAML file and flags override them.

    Returns:
        One object for each dataclass.

    Raises:
        ValueError: if a value does not meet a condition of its flag, or conflicts with another value.
    """
    allow_any_output()
    parser = HfArgumentParser(
        dataclass_types,
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--FLAG VALUE ...]   (--help lists the flags)",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file with values for the flags below. Flags override it.")
    parser.set_defaults(**(defaults or {}))
    known = [f.name for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type) if f.init]

    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        parser.error(f"unknown flag {unknown[0]}.{_suggestion(name, known, '--')}")
    flags: list[str] = []
    if namespace.config is not None:
        flags = _yaml_flags(_read_yaml(namespace.config, known, parser), parser)
    given = list(sys.argv[1:] if argv is None else argv)
    check_flags(dataclass_types, vars(parser.parse_args(flags + given)))
    *parsed, _ = parser.parse_args_into_dataclasses(flags + given, look_for_args_file=False)
    return tuple(parsed)


def _suggestion(name: str, known: list[str], prefix: str = "") -> str:
    """Return a sentence with the new name of a renamed flag, or else with the closest known one."""
    new = RENAMED.get(name)
    return f" It was renamed to {prefix}{new}." if new in known else did_you_mean(name, known, prefix)


def _read_yaml(path: str, known: list[str], parser: HfArgumentParser) -> dict[str, Any]:
    try:
        values = yaml.safe_load(find_config(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must be a mapping of flags to values.")
    for key in values:
        if key not in known:
            parser.error(f"--config {path}: unknown key {key!r}.{_suggestion(str(key), known)}")
    return values


def _yaml_flags(values: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """Convert YAML values to flags, so that they are checked and converted in the same way."""
    flags = []
    for key, value in values.items():
        if value is None:
            parser.set_defaults(**{key: None})
        elif key == "config_overrides" and isinstance(value, dict):
            # strings are kept as they are, because YAML 1.1 reads 1e-6 as a string
            items = {name: item if isinstance(item, str) else json.dumps(item) for name, item in value.items()}
            flags += [f"--{key}", *(f"{name}={item}" for name, item in items.items())]
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
