"""
Serve a demo page for a language model: text generation, next-token probabilities and attention weights.

    python recipes/demo.py runs/pretrain
    python recipes/demo.py runs/pretrain --classifier runs/imdb --port 7860
    python recipes/demo.py you/your-minigpt --space my-space

The model and the classifier are folders or names on the Hub, of MiniGPT or any other architecture. The page is
reachable from this machine only (`--host 0.0.0.0` opens it to the network), and makes no requests to the internet.

`--space` writes a folder for a Hub Space instead. Local models are copied into it, models on the Hub are loaded from
there. Push it by

    hf upload you/my-space my-space --repo-type space

Requires `pip install "hf_minigpt[demo]"`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_minigpt.adapters import is_adapter, merged, save_merged
from hf_minigpt.flags import number
from hf_minigpt.publishing import page
from hf_minigpt.training.processes import use_all_cores


APP = '''\
"""Demo page of {title}."""

import page


app = page.build(
    page.load_page({model!r}, {classifier!r}, trust_remote_code=True),
    {title!r},
    {prompt!r},
)

if __name__ == "__main__":
    page.launch(app)
'''
README = """\
---
title: {title}
emoji: 📖
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
{models}short_description: Generate text, see next-token probabilities and attention
---

A demo of {title}, a language model made with hf_minigpt. It generates text, and shows the probabilities of the next
token and the attention weights of each head.
"""
REQUIREMENTS = ("torch", "transformers")


def copy_model(source: str, folder: Path, name: str) -> str:
    """Copy a local model into the folder of a Space. Return its name there, or its name on the Hub."""
    if not Path(source).is_dir():
        return source
    if is_adapter(source):
        # A Space has neither PEFT nor the base model.
        save_merged(source, folder / name)
        return name
    ignored = shutil.ignore_patterns("checkpoint-*", "_*", "*.bin", "*.pt", "runs", "README.md", "*.png")
    shutil.copytree(source, folder / name, ignore=ignored)
    return name


def write_space(folder: Path, model: str, classifier: str | None, title: str, prompt: str) -> None:
    """Write the folder of a Hub Space, which runs without this package."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"space={folder} is not empty. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("gradio", *REQUIREMENTS)}
    on_hub = [name for name in (model, classifier) if name is not None and not Path(name).is_dir()]
    models = "".join(["models:\n", *(f"- {json.dumps(name)}\n" for name in on_hub)]) if on_hub else ""
    fields = {
        "title": title,
        "prompt": prompt,
        "model": copy_model(model, folder, "model"),
        "classifier": None if classifier is None else copy_model(classifier, folder, "classifier"),
    }
    shutil.copy(page.__file__, folder / "page.py")
    (folder / "app.py").write_text(APP.format(**fields))
    readme = README.format(title=json.dumps(title), gradio=versions["gradio"], models=models)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{name}=={versions[name]}\n" for name in REQUIREMENTS))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--classifier", help="folder or Hub name of a text classifier, shown in a tab")
    parser.add_argument("--title", help="title of the page (default: name of the model)")
    parser.add_argument("--prompt", default="Once upon a time", help="initial text")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument(
        "--port",
        type=number(int, least=1, most=65535),
        help="port to listen on (default: the first free one from 7860)",
    )
    parser.add_argument("--space", type=Path, help="write a Hub Space into this folder instead of serving")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow code from the repositories of the models"
    )
    args = parser.parse_args(argv)
    title = args.title or Path(args.model).name
    if args.space is not None:
        write_space(args.space, args.model, args.classifier, title, args.prompt)
        print(f"Hub Space: {args.space}\nNext:\n  hf upload you/{args.space.name} {args.space} --repo-type space")
        return
    use_all_cores()
    with contextlib.ExitStack() as stack:
        names = [
            name and stack.enter_context(merged(name, trust_remote_code=args.trust_remote_code))
            for name in (args.model, args.classifier)
        ]
        loaded = page.load_page(names[0], names[1], args.trust_remote_code)
    page.launch(page.build(loaded, title, args.prompt), server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
