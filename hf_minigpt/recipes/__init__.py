"""
The recipes as modules, such as `hf_minigpt.recipes.pretrain`.

In a clone this package points to the folder recipes/. The wheel contains that folder instead of this file.
"""

from pathlib import Path


__path__ = [str(Path(__file__).parents[2] / "recipes")]
