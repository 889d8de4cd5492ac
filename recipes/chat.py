r"""
Talk with a finetuned model in the terminal; its answers appear as they are written.

    python recipes/chat.py runs/sft
    python recipes/chat.py runs/assistant --system "Answer in one sentence." --temperature 0.7 --top_p 0.9
    python recipes/chat.py runs/sft --greedy --prompt "Open a tale of Mira the baker in a mill."

MODEL is a folder or a name on the Hub: any checkpoint whose tokenizer has a chat template, a LoRA adapter too. With
--prompt there is one answer, without colours or questions, for scripts. In a conversation /new forgets what was said,
/exit or the end of the input leaves. When the context is full the oldest turns are forgotten, and you are told.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from hf_minigpt.adapters import load_causal_lm
from hf_minigpt.flags import number
from hf_minigpt.tokenization import load_tokenizer
from hf_minigpt.training.processes import use_all_cores
from hf_minigpt.training.safeguards import allow_any_output


Messages = list[dict[str, str]]


class Stream(TextStreamer):
    """Prints an answer as it is written, and keeps it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def fit(tokenizer, messages: Messages, room: int) -> tuple[Messages, list[int], int]:
    """Leave out the oldest turns, the system's message apart, until the prompt has at most `room` tokens.

    Returns:
        The messages that stay, their ids with the generation prompt, and how many messages were left out.

    Raises:
        ValueError: the last question alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    for first in range(0, len(turns), 2):
        kept = system + turns[first:]
        ids = tokenizer.apply_chat_template(kept, add_generation_prompt=True)["input_ids"]
        if len(ids) <= room:
            return kept, ids, first
    raise ValueError(f"the message takes {len(ids)} tokens, and the model has room for {room}: make it shorter.")


def main(argv: Sequence[str] | None = None) -> Messages:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--prompt", help="say this, print the answer, and leave")
    parser.add_argument("--system", help="what the model is told before the conversation")
    parser.add_argument(
        "--max_new_tokens", type=number(int, least=1), help="longest answer; default: 128, at most half the context"
    )
    parser.add_argument(
        "--temperature", type=number(float, least=0), default=0.7, help="below 1 safer, above 1 wilder"
    )
    parser.add_argument(
        "--top_k", type=number(int, least=0), default=0, help="draw from the k likeliest tokens; 0: from all"
    )
    parser.add_argument(
        "--top_p",
        type=number(float, above=0, most=1),
        default=1.0,
        help="draw from the likeliest tokens that sum up to p",
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=number(int, least=0, most=2**32 - 1), help="for the same answers again")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)
    allow_any_output()
    if not args.greedy and args.temperature <= 0:
        parser.error(f"--temperature {args.temperature} must be above 0; for the likeliest answer use --greedy.")

    use_all_cores()
    if args.seed is not None:
        set_seed(args.seed)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if tokenizer.chat_template is None:
        parser.error(f"{args.model} has no chat template: finetune it first (recipes/sft.py), or use generate.py.")
    model = load_causal_lm(args.model, trust_remote_code=args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    context = model.config.max_position_embeddings
    max_new_tokens = args.max_new_tokens or min(128, context // 2)
    if max_new_tokens >= context:
        parser.error(f"--max_new_tokens {max_new_tokens} leaves no room in the context of {context} tokens.")
    ends = model.generation_config.eos_token_id
    ends = set([ends] if isinstance(ends, int) else ends or []) | {tokenizer.eos_token_id}
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    config = GenerationConfig(
        do_sample=not args.greedy,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        **({} if args.greedy else sampling),
    )

    def answer(messages: Messages) -> Messages:
        # the last token written is not read again
        messages, ids, num_forgotten = fit(tokenizer, messages, context + 1 - max_new_tokens)
        if num_forgotten:
            print(f"(The context is full: the oldest {num_forgotten} messages are forgotten.)", file=sys.stderr)
        stream = Stream(tokenizer)
        input_ids = torch.tensor([ids], device=model.device)
        model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, streamer=stream)
        return [*messages, {"role": "assistant", "content": stream.text}]

    start: Messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.prompt is not None:
        try:
            return answer([*start, {"role": "user", "content": args.prompt}])
        except ValueError as error:
            parser.error(str(error))
    messages = start
    print("/new forgets what was said, /exit leaves.")
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
                # what was said so far is not kept
                print()


if __name__ == "__main__":
    main()
