"""
The recipes as modules, such as `hf_minigpt.recipes.pretrain`.

An installed wheel has the scripts in this folder. In a clone, this package points to the folder recipes/.
"""

from pathlib import Path


if not Path(__file__).with_name("pretrain.py").is_file():
    __path__ = [str(Path(__file__).parents[2] / "recipes")]
