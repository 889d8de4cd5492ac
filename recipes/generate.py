"""
Generate text from a prompt, and print it as it is generated.

    python recipes/generate.py runs/pretrain --prompt "Once upon a time" --max_new_tokens 200 --top_k 50
    python recipes/generate.py runs/books --prompt "She was" --greedy

MODEL is a folder or a Hub name, of a MiniGPT or another causal language model. Without a prompt the model begins a new
document.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from hf_minigpt.adapters import load_causal_lm
from hf_minigpt.flags import number
from hf_minigpt.sampling import add_sampling_flags, sampling_options
from hf_minigpt.tokenization import encode_prompt, load_tokenizer
from hf_minigpt.training.processes import use_all_cores
from hf_minigpt.training.safeguards import allow_any_output


class WindowStreamer(TextStreamer):
    """Print the tokens of several `generate` calls as one text, also where a character spans two calls."""

    def end(self):
        # Keep the text that is not printed yet for the next call.
        self.next_tokens_are_prompt = True

    def finish(self):
        """Print the rest of the text, without an incomplete last character."""
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs) if self.token_cache else ""
        self.on_finalized_text(without_incomplete_character(text[self.print_len :]), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        print(text, end="", flush=True)


def without_incomplete_character(text: str) -> str:
    """Remove the replacement characters that stand for an incomplete last character."""
    return text.rstrip("\ufffd")


def windows(length: int, max_new_tokens: int, context_length: int | None) -> Iterator[tuple[int, int]]:
    """
    Split a long generation into windows that fit into the context.

    When the context is full, the next window starts from its second half, so that most tokens use the cache.

    Args:
        length: number of prompt tokens.
        max_new_tokens: number of tokens to generate in all.
        context_length: longest input of the model, or None if its positions have no limit.

    Yields:
        The number of last tokens to keep as the prompt, and the number of tokens to generate after them.
    """
    while max_new_tokens > 0:
        if context_length is None:
            kept, num = length, max_new_tokens
        else:
            kept = length if length < context_length else max(context_length // 2, 1)
            # The last generated token is never an input, so a window has room for one more.
            num = min(max_new_tokens, context_length + 1 - kept)
        yield kept, num
        length += num
        max_new_tokens -= num


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument(
        "--max_new_tokens", type=number(int, least=1), default=200, help="number of tokens to generate; default: 200"
    )
    add_sampling_flags(parser, temperature=0.8)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)
    allow_any_output()
    sampling = sampling_options(parser, args)

    use_all_cores()
    if args.seed is not None:
        set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model = load_causal_lm(args.model, trust_remote_code=args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )

    ids = encode_prompt(tokenizer, args.prompt)
    # GPT-2 and similar models lack the field and have learned positions.
    has_table = getattr(model.config, "position_embedding_type", "learned") in ("learned", "absolute")
    context_length = model.config.max_position_embeddings if has_table else None
    if context_length is not None and len(ids) + args.max_new_tokens > context_length + 1:
        print(
            f"The model's context is {context_length} tokens. Longer text depends on the most recent tokens only.",
            file=sys.stderr,
        )
    print(args.prompt, end="", flush=True)
    streamer = WindowStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for kept, max_new_tokens in windows(len(ids), args.max_new_tokens, context_length):
        window = torch.tensor([ids[-kept:]], device=model.device)
        config.max_new_tokens = max_new_tokens
        output = model.generate(
            window,
            attention_mask=torch.ones_like(window),
            generation_config=config,
            streamer=streamer,
        )
        ids += output[0, kept:].tolist()
        if ids[-1] == tokenizer.eos_token_id:
            break
    streamer.finish()
    print()
    return without_incomplete_character(tokenizer.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    main()
