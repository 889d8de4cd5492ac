"""
Train a ladder of character-level models, from a bigram table to a GPT, where each rung adds one idea, and compare.

    python recipes/ladder.py

Without arguments it trains on the embedded tales, on a laptop's CPU, without network, in about three minutes. It
prints a table, and saves `ladder.png` and one model per rung. Held-out loss in nats per character: bigram 2.10, one
head 2.01, several heads 1.86, feed-forward 1.76; a stack of six such blocks hardly learns (2.89); residual connections
1.24, LayerNorm 1.15; dropout hurts a model this small (1.52); the scaled-up model reaches 0.32. On your own text, on
selected rungs, and with the article's two columns of hyperparameters:

    python recipes/ladder.py --dataset FOLDER_OR_FILE --output_dir runs/ladder-books
    python recipes/ladder.py --rungs blocks residual layer-norm --config_overrides num_hidden_layers=10
    python recipes/ladder.py --config recipes/configs/baby_cpu.yaml
    python recipes/ladder.py --config recipes/configs/baby_gpu.yaml

`--push_to_hub true` pushes all rungs to one repository. The rungs are `BABY_RUNGS` of hf_minigpt.presets. Their
LayerNorm normalizes over the width. The article's own implementation normalizes over the batch, which leaks
information between texts.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from hf_minigpt.commands import command_for
from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.flags import COUNT, Unique
from hf_minigpt.presets import BABY_RUNGS, baby_rung
from hf_minigpt.pretraining.data import open_documents
from hf_minigpt.pretraining.ladder import LadderArguments, train_rung
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.publishing.plots import plot_rungs
from hf_minigpt.tokenization import num_ids, train_character_tokenizer
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.evaluation import decode_documents
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import check_writable, use_all_cores
from hf_minigpt.training.safeguards import optional, written


# Enough that no rung memorizes its text, few enough for two minutes
NUM_TALES = 3000


@dataclass
class RungArguments:
    rungs: Annotated[list[str], Unique()] = field(
        default_factory=lambda: list(BABY_RUNGS),
        metadata={"help": f"Rungs to train: {', '.join(BABY_RUNGS)}. Default: all."},
    )
    preset: str = field(default="baby", metadata={"help": "Preset of the last rung: baby or baby-large."})
    config_overrides: list[str] = field(
        default_factory=lambda: ["num_hidden_layers=6"],
        metadata={"help": "Fields of MiniGPTConfig that replace those of the preset. Default: num_hidden_layers=6."},
    )
    eval_batches: Annotated[int, COUNT] = field(
        default=100, metadata={"help": "Number of training batches of each split in an evaluation."}
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argument_types = (RungArguments, DataArguments, LadderArguments)
    rung_args, data_args, args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)
    overrides = ModelArguments(config_overrides=rung_args.config_overrides).overrides()
    for name in rung_args.rungs:
        # find mistakes in the last rung before the first is trained
        baby_rung(name, rung_args.preset, **overrides)
    folder = Path(args.output_dir)
    check_writable(args.output_dir)
    if data_args.dataset is None and data_args.max_examples is None:
        data_args.max_examples = NUM_TALES

    # Data: each character is a token
    documents = open_documents(data_args)
    prepare_push(args)
    tokenizer = train_character_tokenizer(documents, model_max_length=1)
    with args.main_process_first(desc="tokenizing"):
        corpus = prepare_corpus(
            documents,
            tokenizer,
            data_args.cache_dir,
            validation_fraction=data_args.validation_fraction,
            seed=data_args.split_seed,
        )
    overrides["vocab_size"] = num_ids(tokenizer)
    overrides |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    floor = None
    if data_args.dataset is None:
        held_out = decode_documents(corpus.validation, tokenizer)
        bits = -sum(map(tales.log2_probability, held_out))
        # including the end token of each tale
        floor = bits * math.log(2) / sum(len(text) + 1 for text in held_out)

    # Training
    print(f"{len(tokenizer)} characters, {corpus.train.num_tokens:,} in training; {args.describe_hardware()}")
    print(f"{'rung':15} {'parameters':>12} {'training':>9} {'held out':>9} {'seconds':>8}")
    results: dict[str, dict[str, float]] = {}
    for name in rung_args.rungs:
        own_args = copy.copy(args)
        own_args.output_dir, own_args.push_to_hub = str(folder / name), False
        config = baby_rung(name, rung_args.preset, **overrides)
        rung = results[name] = train_rung(config, corpus, tokenizer, rung_args.eval_batches, own_args)
        print(
            f"{name:15} {rung['parameters']:12,} {rung['eval_train_loss']:9.4f} {rung['eval_loss']:9.4f} "
            f"{rung['train_runtime']:8.0f}",
            flush=True,
        )
        metrics = {f"{name}_{key}": value for name, rung in results.items() for key, value in rung.items()}
        if args.process_index == 0:
            # saved after each rung, because a later one may fail
            (folder / "all_results.json").write_text(json.dumps(metrics, indent=4) + "\n")

    # Results
    if args.process_index == 0:
        training = {name: rung["eval_train_loss"] for name, rung in results.items()}
        held_out = {name: rung["eval_loss"] for name, rung in results.items()}
        with optional("drawing ladder.png"):
            plot_rungs(held_out, training, folder / "ladder.png", floor)
        print(f"{folder} contains one model per rung{written(folder, 'all_results.json', 'ladder.png')}. Next:")
        print(f"  {command_for('demo')} {folder / name}")
    with optional("pushing to the Hub"):
        push_run(args)
    return metrics


if __name__ == "__main__":
    main()
