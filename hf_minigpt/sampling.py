"""The flags of recipes/generate.py and recipes/chat.py that choose how text is sampled."""

import argparse
from typing import Any

from .flags import number


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add the flags.

    Args:
        temperature: default of `--temperature`.
    """
    parser.add_argument(
        "--temperature",
        type=number(float, least=0),
        default=temperature,
        help=f"lower: more predictable; default: {temperature}",
    )
    parser.add_argument(
        "--top_k", type=number(int, least=0), default=0, help="sample from the k most likely tokens; 0: from all"
    )
    parser.add_argument(
        "--top_p",
        type=number(float, above=0, most=1),
        default=1.0,
        help="sample from the most likely tokens whose probabilities sum to p",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--seed", type=number(int, least=0, most=2**32 - 1), help="makes sampled text repeatable")


def sampling_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `GenerationConfig` that the flags choose. Exits with a message if they contradict."""
    if args.greedy:
        return {"do_sample": False}
    if args.temperature <= 0:
        parser.error(f"--temperature {args.temperature} must be above 0. Use --greedy for the most likely text.")
    return {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
