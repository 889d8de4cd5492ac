r"""
Pretrain a MiniGPT. Without arguments: on the embedded tales, on a laptop's CPU, without network, in a few minutes.

    accelerate launch recipes/pretrain.py

On your own text (a file or folder of .txt, .jsonl, .json, .csv, .parquet, or a name on the Hub):

    accelerate launch recipes/pretrain.py --dataset ../shared/data/books --max_steps 200 --output_dir runs/books

Going on from a checkpoint, with its tokenizer; from a YAML file, flags winning over it; what a run would take:

    accelerate launch recipes/pretrain.py --model runs/books --dataset the-verdict.txt --output_dir runs/verdict
    accelerate launch recipes/pretrain.py --config recipes/configs/books.yaml --learning_rate 2e-3
    python recipes/pretrain.py --config recipes/configs/bookcorpus.yaml --plan --price_per_hour 3

Onto the Hub, after `hf auth login`: each checkpoint as it is made, at the end everything, the model card included:

    accelerate launch recipes/pretrain.py --push_to_hub true --hub_model_id you/your-minigpt

On a corpus larger than the disk, from the Hub, read and tokenized while the model trains:

    accelerate launch recipes/pretrain.py --streaming true --dataset HuggingFaceFW/fineweb-edu --max_steps 5000

Interrupted, by Ctrl-C or by a crash: the same command with `--resume_from_checkpoint auto` goes on as if nothing had
been; without it, a folder that holds checkpoints is refused. Two processes on one machine, started again if one dies
(the variable keeps torchrun from handing them the addresses of the dead ones):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node 2 --max-restarts 3 \
        recipes/pretrain.py --resume_from_checkpoint auto
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import DocumentRows
from hf_minigpt.pretraining.arguments import PlanArguments, PretrainArguments
from hf_minigpt.pretraining.data import check_streaming, open_documents, prepare_data, training_rows
from hf_minigpt.pretraining.plan import plan_pretraining
from hf_minigpt.pretraining.report import format_metrics, pretraining_report, save_model_card
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.publishing.plots import plot_losses
from hf_minigpt.tokenization import num_ids
from hf_minigpt.training.arguments import DataArguments, ModelArguments, check_writable, use_all_cores
from hf_minigpt.training.callbacks import PrintSample
from hf_minigpt.training.checkpoints.sealing import check_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.evaluation import decode_documents, sample_texts, tale_metrics
from hf_minigpt.training.loading import build_model, context_length
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.safeguards import optional, written
from hf_minigpt.training.trainer import LanguageModelTrainer, end_training


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    argument_types = (ModelArguments, DataArguments, PlanArguments, PretrainArguments)
    model_args, data_args, plan_args, args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)
    check_streaming(data_args, args)
    if plan_args.plan:
        print(plan_pretraining(model_args, data_args, plan_args, args))
        return {}

    # Whatever can be wrong is found before anything takes long.
    check_writable(args.output_dir)
    check_resume(args.resume_from_checkpoint, args.output_dir)
    length = context_length(model_args)
    documents = open_documents(data_args)
    prepare_push(args)

    # Data: one process tokenizes, the others open what it wrote.
    with args.main_process_first(desc="tokenizing"):
        tokenizer, corpus = prepare_data(model_args, data_args, documents)
    train_rows = training_rows(corpus, tokenizer, length, data_args, args)
    held_out_rows = DocumentRows(corpus.validation, length)

    # Model and training
    set_seed(args.seed)
    model = build_model(model_args, tokenizer)
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        data_collator=LanguageModelCollator(tokenizer.pad_token_id, num_ids(tokenizer)),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
        callbacks=[PrintSample(tokenizer)],
    )
    trainer.accelerator.print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} token vocabulary, corpus {documents.name}: "
        f"{', '.join(f'{name.lower()} {value}' for name, value in corpus.describe().items())}\n"
        f"{args.describe_hardware()}"
    )
    metrics = train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics

    # Results: first what cannot be had again
    model.config.use_cache = True
    # called so, it leaves pushing to the end
    trainer.save_model(_internal_call=True)
    trainer.save_metrics("pretrain", metrics)
    metrics |= trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        command = f"accelerate launch recipes/pretrain.py {shlex.join(argv)}".strip()
        sample, plot = "", None

        def save_results() -> None:
            trainer.save_metrics("pretrain", metrics)
            with optional("writing the model card"):
                report = pretraining_report(model_args, data_args, args, model, corpus, metrics, sample, command, plot)
                save_model_card(report, args.output_dir)

        save_results()
        with optional("sampling a text"):
            (sample,) = sample_texts(model, tokenizer, 1, max_new_tokens=min(length - 1, 200), seed=args.seed)
        if data_args.dataset is None:
            with optional("reading the model's tales"):
                tales = sample_texts(model, tokenizer, 64, max_new_tokens=length - 1, seed=args.seed + 1)
                held_out = decode_documents(corpus.validation, tokenizer)
                figures = tale_metrics(metrics["eval_bits_per_byte"], held_out, tales)
                metrics |= {f"eval_{name}": value for name, value in figures.items()}
        with optional("drawing loss.png"):
            path = Path(args.output_dir, "loss.png")
            plot_losses(trainer.state.log_history, path, title=Path(args.output_dir).name)
            plot = path.name
        save_results()
        shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        shown |= {"tokens_per_second": metrics["train_tokens_per_second"]}
        print("\n".join(f"{name:40} {value}" for name, value in format_metrics(shown).items()))
        files = written(args.output_dir, "README.md", "loss.png")
        print(f"\n{sample}\n\n{args.output_dir} holds the model, its tokenizer and code{files}. Next:")
        print(f"  python recipes/generate.py {args.output_dir} --prompt {shlex.quote(' '.join(sample.split()[:2]))}")
    with optional("pushing to the Hub"):
        push_run(args)
    end_training(trainer.accelerator, trainer)
    return metrics


if __name__ == "__main__":
    main()
