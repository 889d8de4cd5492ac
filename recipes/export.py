"""
Take a MiniGPT out of Python's transformers: to a stock class, ONNX, `torch.export` or llama.cpp.

    python recipes/export.py runs/pretrain runs/pretrain-nanochat --to nanochat
    python recipes/export.py runs/pretrain runs/pretrain-onnx --to onnx
    python recipes/export.py runs/pretrain runs/pretrain-pt2 --to torch-export
    python recipes/export.py runs/gpt2 runs/gpt2-gguf --to gguf

MODEL is a folder or a name on the Hub; another project's checkpoint comes in by `recipes/convert.py` first. The result
is run in its own runtime beside the model, on the same random ids (of several lengths, padded on the left, and going
on from a cache where it has one), and the largest difference of the logits is printed: some 1e-6, with llama.cpp
1e-3. Nothing is left behind if they differ by more than rounding.

- gpt2, nanochat: transformers' own class, weights renamed. Any head.
- onnx, torch-export: one step of decoding with a cache, in fp32. `hf_minigpt/deploy/export.py` names its
  inputs and outputs. Any language model.
- gguf: GPT-2-shaped language models: learned positions, LayerNorm before each branch, tanh GELU, byte-level BPE.

A config that the target cannot express is refused with the switch named. Needs `pip install "hf_minigpt[export]"` for
onnx and gguf. The default run's model takes a quarter of a minute or less.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from convert import MAX_DIFFERENCE, find_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.adapters import merged
from hf_minigpt.deploy import conversion, export


STOCK = {"gpt2": conversion.to_gpt2, "nanochat": conversion.to_nanochat}
SOURCES = {"gpt2": conversion.MINIGPT_TO_GPT2, "nanochat": conversion.MINIGPT_TO_NANOCHAT}
GRAPHS = {
    "onnx": (export.to_onnx, export.load_onnx, "model.onnx"),
    "torch-export": (export.to_torch_export, export.load_torch_export, "model.pt2"),
}
# llama.cpp computes parts in half precision.
MAX_DIFFERENCE_GGUF = 5e-2
NEXT = {
    "gpt2": 'python recipes/generate.py {folder} --prompt "Once upon a time"',
    "nanochat": 'python recipes/generate.py {folder} --prompt "Once upon a time"',
    "onnx": "onnxruntime.InferenceSession('{folder}/model.onnx')",
    "torch-export": "torch.export.load('{folder}/model.pt2').module(check_guards=False)",
    "gguf": "{folder}/model.gguf, in any program of llama.cpp",
}


def count_ids(model: MiniGPTForCausalLM) -> int:
    return model.config.unpadded_vocab_size or model.config.vocab_size


@torch.no_grad()
def compare_steps(model: MiniGPTForCausalLM, step: export.Step) -> float:
    """The largest difference of the logits of text over two rows, one padded on the left, then of one more token."""
    length, padding = min(16, model.config.max_position_embeddings - 1), 3
    num_ids = count_ids(model)
    ids = torch.randint(num_ids, (2, length + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache = export.empty_cache(model.config, 2)
    first, cache = step(ids[:, :length], mask[:, :length], cache)
    if not cache:
        mask = mask[:, :length]
    chunks = [first] if not cache else [first, step(ids[:, length:], mask, cache)[0]]
    theirs = torch.cat(chunks, 1)[..., :num_ids]
    ours = model(ids[:, : theirs.shape[1]], attention_mask=mask).logits[..., :num_ids]
    return (ours - theirs)[mask.bool()].abs().max().item()


@torch.no_grad()
def compare_next(model: MiniGPTForCausalLM, path: Path, tokenizer: PreTrainedTokenizerFast) -> float:
    """The largest difference of log-probabilities after prompts of several lengths, in llama.cpp."""
    num_ids = count_ids(model)
    next_log_probabilities = export.load_gguf(path, tokenizer, num_ids)
    ids = torch.randint(num_ids, (1, 32), generator=torch.Generator().manual_seed(0))
    differences = []
    for length in (1, 7, min(32, model.config.max_position_embeddings - 1)):
        ours = model(ids[:, :length]).logits[0, -1, :num_ids].log_softmax(-1)
        differences.append((ours - next_log_probabilities(ids[0, :length].tolist())).abs().max())
    return torch.stack(differences).max().item()


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, to: str, folder: Path) -> float:
    """Write `model` into `folder` and read it back in its runtime: the largest difference of the logits."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if to in STOCK:
        STOCK[to](model).save_pretrained(folder)
        exported_class = SOURCES[to][type(model)]
        return conversion.compare_logits(model, exported_class.from_pretrained(folder))
    assert isinstance(model, MiniGPTForCausalLM)
    model = model.float()
    if to == "gguf":
        if tokenizer is None:
            raise ValueError("A GGUF file holds a tokenizer, and the model comes with none: save it in its folder.")
        export.to_gguf(model, tokenizer, folder / "model.gguf")
        return compare_next(model, folder / "model.gguf", tokenizer)
    save, load, name = GRAPHS[to]
    save(model, folder / name)
    return compare_steps(model, load(folder / name))


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a MiniGPT")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--to", choices=[*STOCK, *GRAPHS, "gguf"], required=True)
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: choose another folder")
    # an adapter's folder holds no model: from here on it is a whole one
    with merged(args.model) as folder:
        return export_model(parser, args, folder)


def export_model(parser: argparse.ArgumentParser, args: argparse.Namespace, folder: str) -> float:
    layout = conversion.detect_layout(folder)
    if layout != "minigpt":
        parser.error(f"{args.model} is in the layout of {layout}: bring it in with recipes/convert.py first")
    heads = SOURCES[args.to] if args.to in STOCK else {MiniGPTForCausalLM: MiniGPTForCausalLM}
    model, _ = conversion.load_source(folder, heads)
    tokenizer = find_tokenizer(folder)

    # beside the folder, and renamed only once it is known to be right
    partial = args.output_dir.with_name(args.output_dir.name + ".partial")
    partial.mkdir(parents=True)
    try:
        difference = write(model.eval(), tokenizer, args.to, partial)
        print(f"{args.model} -> {args.to}: largest difference of the logits {difference:.1e}")
        if not difference <= (MAX_DIFFERENCE_GGUF if args.to == "gguf" else MAX_DIFFERENCE):
            raise RuntimeError("That is more than rounding: nothing was written.")
        partial.replace(args.output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.output_dir} holds it{' and its tokenizer' if tokenizer else ''}. Next:")
    print(f"    {NEXT[args.to].format(folder=args.output_dir)}")
    return difference


if __name__ == "__main__":
    main()
