"""
Convert a GPT-1, GPT-2, nanoGPT or NanoChat checkpoint to MiniGPT; `recipes/export.py` goes the other way.

    python recipes/convert.py openai-community/gpt2 runs/gpt2
    python recipes/convert.py openai-community/openai-gpt runs/gpt1
    python recipes/convert.py nanoGPT/out/ckpt.pt --tokenizer openai-community/gpt2 runs/nanogpt

SOURCE is a folder, a name on the Hub, or nanoGPT's ckpt.pt. Whatever its head (language model, classifier, none), the
result has it too; the tokenizer goes with it. Both models then read the same random ids, and the largest difference of
their logits is printed: the rounding of fp32, 2e-06 for random weights of GPT-2 small's and medium's size. Nothing is
written if the architecture cannot be expressed, or if they differ by more. GPT-2 small takes ten seconds on two cores.
Memory holds the source and the result and, of half-precision models, a copy of one at a time in fp32.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_minigpt.deploy import conversion
from hf_minigpt.tokenization import num_ids


# Rounding stays below it, also for logits in the hundreds; a parameter in the wrong place does not.
MAX_DIFFERENCE = 1e-2
HEADS = {"gpt2": conversion.GPT2_HEADS, "gpt1": conversion.GPT1_HEADS, "nanochat": conversion.NANOCHAT_HEADS}


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None
    # A folder without tokenizer files gives GPT-1's or GPT-2's class with nothing in it.
    return tokenizer if tokenizer.vocab_size > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder, a name on the Hub, or nanoGPT's ckpt.pt")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--from", dest="layout", choices=["auto", *conversion.FROM], default="auto")
    parser.add_argument("--tokenizer", help="a folder or a name on the Hub; default: the source's")
    args = parser.parse_args()
    layout = conversion.detect_layout(args.source) if args.layout == "auto" else args.layout
    if layout == "minigpt":
        parser.error(f"{args.source} is a MiniGPT already; recipes/export.py takes it to other layouts")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: choose another folder")

    tokenizer = find_tokenizer(args.tokenizer or args.source)
    if tokenizer is None and args.tokenizer is not None:
        parser.error(f"{args.tokenizer} holds no tokenizer")

    if layout == "nanogpt":
        source = conversion.nanogpt_as_gpt2(args.source)
        overrides = {}
        if tokenizer is not None:
            # nanoGPT pads its table and does not say so.
            overrides = {"unpadded_vocab_size": num_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        model = conversion.from_nanogpt(args.source, **overrides)
    else:
        source, _ = conversion.load_source(args.source, HEADS[layout])
        model = conversion.FROM[layout](source)
    if tokenizer is not None and num_ids(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {num_ids(tokenizer)} ids and the model vocab_size={model.config.vocab_size}: give the "
            "tokenizer that the model was trained with (--tokenizer)."
        )

    difference = conversion.compare_logits(source, model)
    print(f"{type(source).__name__} -> {type(model).__name__}: largest difference of the logits {difference:.1e}")
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(f"That is more than rounding ({MAX_DIFFERENCE}): nothing was written.")
    model.save_pretrained(args.output_dir)
    if tokenizer is None:
        print("No tokenizer found: name one with --tokenizer, or save one in the output folder.")
    else:
        tokenizer.save_pretrained(args.output_dir)
    print(f"Saved {model.num_parameters():,} parameters in {args.output_dir}. Next, if it is a language model:")
    print(f'    python recipes/generate.py {args.output_dir} --prompt "Once upon a time"')


if __name__ == "__main__":
    main()
