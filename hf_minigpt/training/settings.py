"""Saves the optimizer settings of a run with its model, as defaults for finetuning that model."""

import json
import math
from pathlib import Path
from typing import Any


SETTINGS_FILE = "training_settings.json"

CHOICES = {"optimizer": ("muon", "adamw", "trainer"), "muon_scaling": ("original", "moonlight")}
LEARNING_RATES = ("learning_rate", "matrix_learning_rate", "embedding_learning_rate")
INHERITED = (
    *("optimizer", "learning_rate", "matrix_learning_rate", "embedding_learning_rate", "muon_scaling"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
)


def save_settings(args: Any, folder: str | Path) -> None:
    """Save the settings of a run that a later run on its model inherits."""
    settings = {name: getattr(args, name) for name in INHERITED if hasattr(args, name)}
    Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_settings(folder: str | Path) -> dict[str, Any] | None:
    """Load the settings of `save_settings`, or return None if the folder has none. Unknown fields are ignored.

    Raises:
        ValueError: if the file is damaged, or a value is not valid for the flag of that name.
    """
    path = Path(folder, SETTINGS_FILE)
    if not path.is_file():
        return None
    remedy = "Repair the file, or remove it and give the settings as flags."
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {remedy}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object. {remedy}")
    settings = {name: settings[name] for name in INHERITED if name in settings}
    for name, value in settings.items():
        if name in CHOICES:
            fits = value in CHOICES[name]
        elif value is None:
            fits = name == "embedding_learning_rate"
        else:
            fits = type(value) in (int, float) and math.isfinite(value) and value >= 0
        if not fits:
            allowed = "one of " + ", ".join(CHOICES[name]) if name in CHOICES else "a finite number of at least 0"
            raise ValueError(f"{path}: {name}={value!r:.60} must be {allowed}. {remedy}")
    return settings
