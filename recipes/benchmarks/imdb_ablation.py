"""Accuracy of finetuning on IMDb with few labels, as the recipe does it and with one choice changed.

    python recipes/benchmarks/imdb_ablation.py --model runs/imdb-pretrain

Unknown flags, such as `--dataset path/to/train.parquet`, are passed to recipes/finetune_imdb.py, which runs once for
each line of the table: about 5 minutes on one core. Few labels and short rows make it affordable; with all labels the
differences may be others. The test reviews are scored; no choice for the model in `model_cards` was made by them. The
last line has `accuracy` and `roc_auc`, means over the seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import make_parser, print_result


RECIPES = Path(__file__).parents[1]
CONFIGS = RECIPES / "configs"

# Two epochs of few labels are few steps, so the learning rates are above the configuration's. Adversarial training
# doubles the time and is left out.
FIXED = {
    "config": CONFIGS / "imdb.yaml",
    "context_length": 256,
    "tokens_per_batch": 4096,
    "learning_rate": 2e-3,
    "matrix_learning_rate": 0.01,
    "embedding_learning_rate": 0.01,
    "adversarial_epsilon": 0,
    "pipeline_examples": 0,
    "disable_tqdm": True,
}
CHANGES: dict[str, dict[str, object]] = {
    "nothing changed": {},
    "mean": {"pooling": "mean"},
    "last token": {"pooling": "last"},
    "lambda 0.5": {"auxiliary_lm_weight": 0.5},
    "adversarial embeddings": {"adversarial_epsilon": 0.005},
    "no token dropout": {"token_dropout": 0},
    "one learning rate for all blocks": {"layer_decay": 1},
    "head": {"truncation": "head"},
    "tail": {"truncation": "tail"},
    "windows": {"truncation": "windows"},
    "twice the context": {"context_length": 512},
    "no pretraining": {},
}


def initial_model_flags(change: str, model: str) -> list[str]:
    """Return the flags of the initial model: the pretrained one, or its shape and tokenizer only."""
    if change != "no pretraining":
        return ["--model", model]
    shape = yaml.safe_load((CONFIGS / "imdb_pretrain.yaml").read_text(encoding="utf-8"))
    overrides = [f"{name}={value}" for name, value in shape["config_overrides"].items()]
    return ["--preset", shape["preset"], "--tokenizer", model, "--config_overrides", *overrides]


def finetune(change: str, seed: int, args: argparse.Namespace, more: list[str]) -> dict[str, float]:
    """Run the recipe once and return its metrics."""
    flags = FIXED | {"max_examples": args.labels, "seed": seed} | CHANGES[change]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPES / "finetune_imdb.py"), *initial_model_flags(change, args.model)]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        done = subprocess.run([*command, *more, "--output_dir", folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{change!r} failed:\n{done.stderr[-2000:]}")
        return json.loads((Path(folder) / "all_results.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a model that recipes/pretrain.py trained on the reviews")
    parser.add_argument("--labels", type=int, default=2000, help="labelled reviews to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    args, more = parser.parse_known_args()
    found: dict[str, dict[str, float]] = {"accuracy": {}, "roc_auc": {}}
    for change in args.only:
        runs = [finetune(change, seed, args, more) for seed in args.seeds]
        for name, values in found.items():
            values[change] = statistics.mean(run[f"test_{name}"] for run in runs)
        each = ", ".join(f"{run['test_accuracy']:.2%} {run['test_roc_auc']:.4f}" for run in runs)
        seconds = statistics.mean(run["train_runtime"] for run in runs)
        print(f"{change:34} {found['accuracy'][change]:.2%} {found['roc_auc'][change]:.4f}  ({each}) "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
    print_result(**found)


if __name__ == "__main__":
    main()
