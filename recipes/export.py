"""
Export a MiniGPT to a class of transformers, ONNX, `torch.export` or llama.cpp.

    python recipes/export.py runs/pretrain runs/pretrain-nanochat --to nanochat
    python recipes/export.py runs/pretrain runs/pretrain-onnx --to onnx
    python recipes/export.py runs/pretrain runs/pretrain-pt2 --to torch-export
    python recipes/export.py runs/gpt2 runs/gpt2-gguf --to gguf

MODEL is a folder or a Hub name. Convert other checkpoints with `recipes/convert.py` first. The script runs the result
in its own runtime, compares its logits with the model's on the same random ids (several lengths, left padding, a
cache), and prints the largest difference: about 1e-6, with llama.cpp 1e-3. If the difference is more than rounding,
the output is deleted.

- gpt2, nanochat: the class of transformers, any head.
- onnx, torch-export: one decoding step with a cache, in fp32, for any language model. `hf_minigpt/deploy/export.py`
  documents its inputs and outputs.
- gguf: language models with GPT-2's architecture: learned positions, LayerNorm before each branch, tanh GELU,
  byte-level BPE.

If the target cannot express a field of the config, the error names it. onnx and gguf need
`pip install "hf_minigpt[export]"`. The model of the default pretraining run takes at most 15 seconds.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.adapters import merged
from hf_minigpt.commands import command_for
from hf_minigpt.deploy import conversion, export


TRANSFORMERS = {"gpt2": conversion.to_gpt2, "nanochat": conversion.to_nanochat}
SOURCES = {"gpt2": conversion.MINIGPT_TO_GPT2, "nanochat": conversion.MINIGPT_TO_NANOCHAT}
GRAPHS = {
    "onnx": (export.to_onnx, export.load_onnx, "model.onnx"),
    "torch-export": (export.to_torch_export, export.load_torch_export, "model.pt2"),
}
# llama.cpp computes partly in half precision.
MAX_DIFFERENCE_GGUF = 5e-2
NEXT = {
    **dict.fromkeys(TRANSFORMERS, '{generate} {folder} --prompt "Once upon a time"'),
    "onnx": "onnxruntime.InferenceSession('{folder}/model.onnx')",
    "torch-export": "torch.export.load('{folder}/model.pt2').module(check_guards=False)",
    "gguf": "{folder}/model.gguf, in any program of llama.cpp",
}


@torch.no_grad()
def compare_steps(model: MiniGPTForCausalLM, step: export.Step) -> float:
    """Return the largest difference of the logits over two rows, one with left padding, and one more decoding step."""
    length, padding = min(16, model.config.max_position_embeddings - 1), 3
    num_ids = conversion.num_model_ids(model.config)
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
def compare_gguf(model: MiniGPTForCausalLM, path: Path, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the largest difference of the next token's log-probabilities in llama.cpp, after three prompts."""
    num_ids = conversion.num_model_ids(model.config)
    next_log_probabilities = export.load_gguf(path, tokenizer, num_ids)
    ids = torch.randint(num_ids, (1, 32), generator=torch.Generator().manual_seed(0))
    differences = []
    for length in (1, 7, min(32, model.config.max_position_embeddings - 1)):
        ours = model(ids[:, :length]).logits[0, -1, :num_ids].log_softmax(-1)
        differences.append((ours - next_log_probabilities(ids[0, :length].tolist())).abs().max())
    return torch.stack(differences).max().item()


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, to: str, folder: Path) -> float:
    """Export `model` into `folder`, run it in its runtime, and return the largest difference of the logits."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if to in TRANSFORMERS:
        TRANSFORMERS[to](model).save_pretrained(folder)
        exported_class = SOURCES[to][type(model)]
        return conversion.compare_logits(model, exported_class.from_pretrained(folder))
    assert isinstance(model, MiniGPTForCausalLM)
    model = model.float()
    if to == "gguf":
        if tokenizer is None:
            raise ValueError("A GGUF file needs a tokenizer, and the model has none. Save one in its folder.")
        export.to_gguf(model, tokenizer, folder / "model.gguf")
        return compare_gguf(model, folder / "model.gguf", tokenizer)
    save, load, name = GRAPHS[to]
    save(model, folder / name)
    return compare_steps(model, load(folder / name))


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a MiniGPT")
    parser.add_argument("output_dir", type=Path, help="folder for the result; must be empty or missing")
    parser.add_argument("--to", choices=[*TRANSFORMERS, *GRAPHS, "gguf"], required=True, help="format of the result")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"output_dir={args.output_dir} is not empty. Choose another folder.")
    # A LoRA adapter is merged into its base model first.
    with merged(args.model) as folder:
        return export_model(parser, args, folder)


def export_model(parser: argparse.ArgumentParser, args: argparse.Namespace, folder: str) -> float:
    layout = conversion.detect_layout(folder)
    if layout != "minigpt":
        parser.error(f"{args.model} is a {layout} checkpoint. Convert it first with `{command_for('convert')}`.")
    heads = SOURCES[args.to] if args.to in TRANSFORMERS else {MiniGPTForCausalLM: MiniGPTForCausalLM}
    model, _ = conversion.load_source(folder, heads)
    tokenizer = conversion.find_tokenizer(folder)

    # Write into a temporary folder, and rename it once the logits agree.
    partial = args.output_dir.with_name(args.output_dir.name + ".partial")
    partial.mkdir(parents=True)
    try:
        difference = write(model.eval(), tokenizer, args.to, partial)
        limit = MAX_DIFFERENCE_GGUF if args.to == "gguf" else conversion.MAX_DIFFERENCE
        print(f"{args.model} -> {args.to}: largest difference of the logits {difference:.1e}")
        if not difference <= limit:
            raise RuntimeError(f"The difference is more than rounding ({limit}). Nothing was written.")
        partial.replace(args.output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Saved the model{' and its tokenizer' if tokenizer else ''} in {args.output_dir}. Next:")
    print(f"    {NEXT[args.to].format(folder=args.output_dir, generate=command_for('generate'))}")
    return difference


if __name__ == "__main__":
    main()
