r"""
Chat with a finetuned model in the terminal. Answers are printed as they are generated.

    python recipes/chat.py runs/sft
    python recipes/chat.py runs/assistant --system "Answer in one sentence." --temperature 0.7 --top_p 0.9
    python recipes/chat.py runs/sft --greedy --prompt "Open a tale of Mira the baker in a mill."

MODEL is a folder or a Hub name of any checkpoint whose tokenizer has a chat template, LoRA adapters included. With
--prompt, only one answer is printed, for use in scripts. In a conversation, /new starts over, and /exit or the end of
the input leaves. When the context is full, the oldest messages are dropped with a notice.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from hf_minigpt.adapters import load_causal_lm
from hf_minigpt.flags import number
from hf_minigpt.sampling import add_sampling_flags, sampling_options
from hf_minigpt.tokenization import load_tokenizer
from hf_minigpt.training.processes import use_all_cores
from hf_minigpt.training.safeguards import allow_any_output


Messages = list[dict[str, str]]


class AnswerStreamer(TextStreamer):
    """Print an answer as it is generated, and keep its text."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def drop_oldest_messages(tokenizer, messages: Messages, max_tokens: int) -> tuple[Messages, list[int], int]:
    """Drop the oldest messages, except the system message, until the prompt has at most `max_tokens` tokens.

    Returns:
        The remaining messages, their ids with the generation prompt, and the number of dropped messages.

    Raises:
        ValueError: the last question alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    for first in range(0, len(turns), 2):
        kept = system + turns[first:]
        ids = tokenizer.apply_chat_template(kept, add_generation_prompt=True)["input_ids"]
        if len(ids) <= max_tokens:
            return kept, ids, first
    raise ValueError(f"the message has {len(ids)} tokens, and the context has room for {max_tokens}. Shorten it.")


def main(argv: Sequence[str] | None = None) -> Messages:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--prompt", help="print the answer to this prompt and exit")
    parser.add_argument("--system", help="system message at the start of the conversation")
    parser.add_argument(
        "--max_new_tokens", type=number(int, least=1), help="longest answer; default: 128, at most half the context"
    )
    add_sampling_flags(parser, temperature=0.7)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)
    allow_any_output()
    sampling = sampling_options(parser, args)

    use_all_cores()
    if args.seed is not None:
        set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if tokenizer.chat_template is None:
        parser.error(f"{args.model} has no chat template. Finetune it with recipes/sft.py, or use generate.py.")
    model = load_causal_lm(args.model, trust_remote_code=args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    context = model.config.max_position_embeddings
    max_new_tokens = args.max_new_tokens or min(128, context // 2)
    if max_new_tokens >= context:
        parser.error(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt in the context of {context} tokens. Set "
            f"it below {context}."
        )
    end_ids = model.generation_config.eos_token_id
    end_ids = set([end_ids] if isinstance(end_ids, int) else end_ids or []) | {tokenizer.eos_token_id}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )

    def answer(messages: Messages) -> Messages:
        # + 1: the last token is generated but not fed back
        messages, ids, num_dropped = drop_oldest_messages(tokenizer, messages, context + 1 - max_new_tokens)
        if num_dropped:
            print(f"(The context is full: the oldest {num_dropped} messages were dropped.)", file=sys.stderr)
        streamer = AnswerStreamer(tokenizer)
        input_ids = torch.tensor([ids], device=model.device)
        model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, streamer=streamer
        )
        return [*messages, {"role": "assistant", "content": streamer.text}]

    start: Messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.prompt is not None:
        try:
            return answer([*start, {"role": "user", "content": args.prompt}])
        except ValueError as error:
            parser.error(str(error))
    messages = start
    print("/new starts over, /exit leaves.")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return messages
        if text == "/exit":
            return messages
        if text == "/new":
            messages = start
        elif text:
            try:
                messages = answer([*messages, {"role": "user", "content": text}])
            except ValueError as error:
                print(f"({error})", file=sys.stderr)
            except KeyboardInterrupt:
                # an interrupted answer is not kept
                print()


if __name__ == "__main__":
    main()
