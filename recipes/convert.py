"""
Convert a GPT-1, GPT-2, nanoGPT or NanoChat checkpoint to MiniGPT. `recipes/export.py` is the opposite direction. A
sharded checkpoint of FSDP2 becomes a whole model.

    python recipes/convert.py openai-community/gpt2 runs/gpt2
    python recipes/convert.py openai-community/openai-gpt runs/gpt1
    python recipes/convert.py nanoGPT/out/ckpt.pt --tokenizer openai-community/gpt2 runs/nanogpt
    python recipes/convert.py runs/pretrain/checkpoint-1000 runs/whole

SOURCE is a folder, a Hub name, or nanoGPT's ckpt.pt. The result has the same head (language model, classifier or none)
and tokenizer. The script compares the logits of both models on the same random ids and prints the largest difference,
about 2e-06 for GPT-2 small and medium. If MiniGPT cannot express the architecture, or the difference is more than
rounding, nothing is written. GPT-2 small takes ten seconds on two cores. Memory holds both models, and for half
precision one fp32 copy at a time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from hf_minigpt.commands import command_for
from hf_minigpt.deploy import conversion
from hf_minigpt.tokenization import num_ids
from hf_minigpt.training.checkpoints.sharded import is_sharded, merge_checkpoint


HEADS = {"gpt2": conversion.GPT2_HEADS, "gpt1": conversion.GPT1_HEADS, "nanochat": conversion.NANOCHAT_HEADS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, Hub name, nanoGPT's ckpt.pt, or checkpoint-N of FSDP2")
    parser.add_argument("output_dir", type=Path, help="folder for the result; must be empty or missing")
    parser.add_argument(
        "--from", dest="layout", choices=["auto", *conversion.FROM], default="auto", help="format of the source"
    )
    parser.add_argument("--tokenizer", help="folder or Hub name; default: the source's")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"output_dir={args.output_dir} is not empty. Choose another folder.")
    if is_sharded(args.source):
        print_result(merge_checkpoint(args.source, args.output_dir), args.output_dir)
        return
    layout = conversion.detect_layout(args.source) if args.layout == "auto" else args.layout
    if layout == "minigpt":
        parser.error(f"{args.source} is already a MiniGPT. Use `{command_for('export')}` for other formats.")

    tokenizer = conversion.find_tokenizer(args.tokenizer or args.source)
    if tokenizer is None and args.tokenizer is not None:
        parser.error(f"--tokenizer {args.tokenizer} has no tokenizer. Give another folder or Hub name.")

    if layout == "nanogpt":
        source = conversion.nanogpt_as_gpt2(args.source)
        overrides = {}
        if tokenizer is not None:
            # nanoGPT pads its embedding table without recording the number of real tokens.
            overrides = {"unpadded_vocab_size": num_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        model = conversion.from_nanogpt(args.source, **overrides)
    else:
        source, _ = conversion.load_source(args.source, HEADS[layout])
        model = conversion.FROM[layout](source)
    if tokenizer is not None and num_ids(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {num_ids(tokenizer)} ids, but the model has vocab_size={model.config.vocab_size}. Set "
            "--tokenizer to the tokenizer that the model was trained with."
        )

    difference = conversion.compare_logits(source, model)
    print(f"{type(source).__name__} -> {type(model).__name__}: largest difference of the logits {difference:.1e}")
    if not difference <= conversion.MAX_DIFFERENCE:
        raise RuntimeError(f"The difference is more than rounding ({conversion.MAX_DIFFERENCE}). Nothing was written.")
    model.save_pretrained(args.output_dir)
    if tokenizer is None:
        print("No tokenizer found. Set --tokenizer, or save one in the output folder.")
    else:
        tokenizer.save_pretrained(args.output_dir)
    print_result(model, args.output_dir)


def print_result(model: PreTrainedModel, output_dir: Path) -> None:
    print(f"Saved {model.num_parameters():,} parameters in {output_dir}. Next, if it is a language model:")
    print(f'    {command_for("generate")} {output_dir} --prompt "Once upon a time"')


if __name__ == "__main__":
    main()
