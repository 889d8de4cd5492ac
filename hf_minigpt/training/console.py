"""What a run prints: a header with its plan, its progress with one row for each evaluation, and a summary."""

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from .processes import print_once
from .safeguards import printable


# Metric of an evaluation -> title and format of its column. A metric without an entry is not shown.
COLUMNS = {
    "loss": ("held-out loss", ".4g"),
    "bits_per_byte": ("bits/byte", ".4g"),
    "perplexity": ("perplexity", ".4g"),
    "accuracy": ("accuracy", ".1%"),
    "f1": ("F1", ".3f"),
    "roc_auc": ("ROC AUC", ".3f"),
}


def is_terminal() -> bool:
    """Whether both output streams are terminals. Else lines are neither wrapped nor overwritten."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def _width() -> int:
    """Return the columns of the terminal."""
    return os.get_terminal_size(sys.stdout.fileno()).columns or 80


def short_number(value: float) -> str:
    """Return 987, 12.3k, 4.56M or 7.89B."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.0f}"


def _figure(value: float, digits: str) -> str:
    # not 5.026e+04, which the perplexity of a new model would be
    return f"{value:,.0f}" if 1e4 <= value < 1e7 else format(value, digits)


def print_line(text: str, max_width: int | None = None) -> None:
    """Print a line above the progress bar, cut to the width of the terminal. In a file it is cut to `max_width`."""
    width = _width() if is_terminal() else max_width or len(text)
    # a young model also writes control characters
    text = printable("".join(c if c.isprintable() else "\ufffd" for c in text))
    tqdm.write(text if len(text) <= width else text[: width - 3] + "...", file=sys.stdout)
    sys.stdout.flush()


def _wrap(name: str, value: str) -> str:
    """Wrap the value at the width of the terminal, below itself. In a file a row is one line."""
    if not is_terminal():
        return name + value
    width = _width()
    return textwrap.fill(
        value,
        width,
        initial_indent=name,
        subsequent_indent=" " * len(name),
        break_long_words=False,
        break_on_hyphens=False,
    )


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' own progress bars. A bar for each file of each checkpoint would break the table."""
    was_enabled = logging.is_progress_bar_enabled()
    if was_enabled:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def print_header(title: str, rows: Mapping[str, str]) -> None:
    """
    Print what a run is about to do, in the main process only.

    Args:
        title: the first line, such as the job and the output folder.
        rows: a line each, such as {"model": "...", "data": "...", "device": "...", "plan": "..."}.
    """
    width = max(map(len, rows), default=0)
    print_once(printable("\n".join([title, *(_wrap(f"  {name:<{width}}  ", value) for name, value in rows.items())])))


def print_sample(text: str) -> None:
    """Print a text that the model has written, in the main process only."""
    lines = ["".join(c for c in line if c.isprintable()) for line in text.splitlines() if line.strip()]
    lines = [_wrap("  ", line) for line in lines]
    print_once(printable("\n".join(["", "Sample", *lines])))


def print_summary(
    metrics: Mapping[str, str], output_dir: str | Path, files: Sequence[str], next_commands: Sequence[str]
) -> None:
    """
    Print the results of a run, in the main process only.

    Args:
        metrics: name and formatted value, a line each.
        output_dir: where the model is.
        files: names in `output_dir` to look at, such as the model card and the loss plot; those that exist are listed.
        next_commands: shell commands that use the model.
    """
    width = max(map(len, metrics), default=0)
    lines = ["", "Results", *(_wrap(f"  {name:<{width}}  ", value) for name, value in metrics.items())]
    paths = [str(Path(output_dir, name)) for name in files if Path(output_dir, name).is_file()]
    lines += ["", f"Model and tokenizer: {output_dir}", *(f"  {path}" for path in paths)]
    lines += ["", "Next", *(f"  {command}" for command in next_commands)]
    print_once(printable("\n".join(lines)))


def describe_model(model: Any, name: str | None = None) -> str:
    """Return one line about a model: name, parameters, layers x width, context, vocabulary.

    Args:
        model: with the configuration of a MiniGPT or another transformers decoder.
        name: preset or checkpoint.
    """
    config = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.num_parameters()
    vocab_size = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
    learning = "" if trained == total else f" ({trained:,} trained)"
    return (
        f"{f'{name}: ' if name else ''}{total:,} parameters{learning}, {config.num_hidden_layers} layers x "
        f"{config.hidden_size} wide, context {config.max_position_embeddings:,}, vocabulary {vocab_size:,}"
    )


def describe_plan(args: Any, num_steps: int, tokens_per_step: int | None = None) -> str:
    """Return one line about what a run will do: steps, tokens, batch, optimizer and learning rates.

    Args:
        args: `RecipeArguments`. Batches hold rows, or with `tokens_per_batch` at most this many tokens.
        tokens_per_step: over all processes, if it is constant.
    """
    tokens = ""
    if tokens_per_step is not None:
        tokens = f" of {tokens_per_step:,} tokens, {short_number(num_steps * tokens_per_step)} tokens in all"
    batch = f"{args.rows_per_step:,} rows"
    if hasattr(args, "tokens_per_batch"):
        batch = f"{args.tokens_per_batch * args.gradient_accumulation_steps * args.world_size:,} tokens"
    rates = f"learning rate {args.learning_rate:g}"
    if args.optimizer == "muon":
        rates = f"learning rates {args.matrix_learning_rate:g} (matrices) and {args.learning_rate:g}"
    optimizer = getattr(args.optim, "value", args.optim) if args.optimizer == "trainer" else args.optimizer
    return f"{num_steps:,} steps{tokens}, batch {batch}, {optimizer}, {rates}"


class ConsoleCallback(TrainerCallback):
    """
    Shows the progress of a Trainer in the main process. Replaces transformers' ProgressCallback and PrinterCallback.

    In a terminal: one progress bar with loss, tokens per second and time left, and above it one row for each
    evaluation. Elsewhere, and with `--disable_tqdm true`: a line for each logging step and each evaluation.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._in_training = False
        self._columns: list[str] = []
        self._train_loss: float | None = None
        self._since = (0.0, 0)
        self._seconds_evaluating = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._close_bar()
        self._in_training = True
        self._columns, self._train_loss = [], None
        self._seconds_evaluating = 0.0
        self._begin = time.perf_counter()
        self._first_step = state.global_step
        self._since = (self._begin, state.num_input_tokens_seen)
        if is_terminal() and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._show_training(state, logs)
            return
        prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "train")
        if prefix != "train":
            self._show_evaluation(state, prefix, logs)

    def on_train_end(self, args, state, control, **kwargs):
        self._in_training = False
        self._close_bar()

    def _show_training(self, state, logs: Mapping[str, float]) -> None:
        now, (then, tokens) = time.perf_counter(), self._since
        rate = logs.get("tokens_per_second")
        if rate is None and state.num_input_tokens_seen > tokens:
            rate = (state.num_input_tokens_seen - tokens) / max(now - then - self._seconds_evaluating, 1e-9)
        self._since, self._seconds_evaluating = (now, state.num_input_tokens_seen), 0.0
        self._train_loss = logs["loss"]
        parts = [f"loss {self._train_loss:.4g}"] + ([f"{short_number(rate)} tokens/s"] if rate else [])
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            return
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if done > 0:
            parts.append(f"{tqdm.format_interval((now - self._begin) / done * left)} left")
        print_line(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}")

    def _show_evaluation(self, state, prefix: str, logs: Mapping[str, float]) -> None:
        self._seconds_evaluating += logs[f"{prefix}_runtime"]
        found = {name: logs[f"{prefix}_{name}"] for name in COLUMNS if f"{prefix}_{name}" in logs}
        scores = {COLUMNS[name][0]: _figure(value, COLUMNS[name][1]) for name, value in found.items()}
        step = str(state.global_step)
        if not self._in_training:
            step = "final" if prefix == "eval" and state.global_step else prefix
        if not is_terminal() or (self._bar is None and self._in_training):
            position = f"step {step}/{state.max_steps}" if self._in_training else step
            print_line(f"{position}: {', '.join(f'{name} {value}' for name, value in scores.items())}")
            return
        cells = {"step": step}
        if state.num_input_tokens_seen:
            cells["tokens"] = short_number(state.num_input_tokens_seen)
        if self._train_loss is not None:
            cells["train loss"] = f"{self._train_loss:.4g}"
        cells |= scores
        widths = {name: max(len(name), 7) for name in cells}
        if list(cells) != self._columns:
            self._columns = list(cells)
            print_line("  ".join(f"{name:>{width}}" for name, width in widths.items()))
        print_line("  ".join(f"{cells[name]:>{width}}" for name, width in widths.items()))

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
