"""
Two pictures of a checkpoint reading a prompt: what each token may attend to, and what may come next.

    python recipes/pictures.py runs/pretrain --prompt "One morning Mira"
    python recipes/pictures.py runs/ladder/scaled-up --prompt "One morning" --top 15 --output_dir pictures

MODEL is a folder or a name on the Hub, of a MiniGPT or any other causal language model. `mask.png` is the causal mask
as a heatmap, read off the attention weights themselves: a token is seen where any head of any layer gives it weight.
`next_token.png` is the distribution over the next token as bars, the likeliest first. It takes seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import hf_minigpt  # noqa: F401 - makes AutoModelForCausalLM know our checkpoints
from hf_minigpt.flags import number
from hf_minigpt.publishing.plots import plot_attention_mask, plot_next_tokens
from hf_minigpt.tokenization import encode_prompt, load_tokenizer


def written(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token as text, its white space visible."""
    texts = (tokenizer.decode([token]) for token in ids)
    return [text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") for text in texts]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[tuple[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--prompt", default="", help="the text that the model reads; a document begins before it")
    parser.add_argument("--top", type=number(int, least=1), default=20, help="bars in the picture of the next token")
    parser.add_argument("--output_dir", type=Path, default=Path("."))
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    # the other kernels do not tell their weights
    model = AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=args.trust_remote_code, attn_implementation="eager"
    ).eval()
    ids = encode_prompt(tokenizer, args.prompt)
    # a prompt longer than the context keeps its end
    ids = ids[-model.config.max_position_embeddings :]

    output = model(torch.tensor([ids]), output_attentions=True)
    if output.attentions:
        weights = torch.stack(output.attentions).amax(dim=(0, 1, 2))  # (T, T)
        plot_attention_mask(weights > 0, written(ids, tokenizer), args.output_dir / "mask.png")
    else:
        print(f"{args.model} has no attention, hence no mask")
    best = output.logits[0, -1].float().softmax(-1).topk(min(args.top, len(tokenizer)))
    names = written(best.indices.tolist(), tokenizer)
    plot_next_tokens(best.values.tolist(), names, args.output_dir / "next_token.png", "".join(written(ids, tokenizer)))
    print(f"{args.output_dir} holds mask.png and next_token.png")
    return list(zip(names, best.values.tolist(), strict=True))


if __name__ == "__main__":
    main()
