r"""
Pretrain a MiniGPT. Without arguments: on the embedded tales, on a laptop's CPU, without network, in a few minutes.

    accelerate launch recipes/pretrain.py

On your own text (a file or folder of .txt, .jsonl, .json, .csv, .parquet, or a name on the Hub):

    accelerate launch recipes/pretrain.py --dataset my_books/ --max_steps 200 --output_dir runs/books

Continue from a checkpoint, with its tokenizer. Read settings from a YAML file; flags override it. Print what a run
would take, without training:

    accelerate launch recipes/pretrain.py --model runs/books --dataset the-verdict.txt --output_dir runs/verdict
    accelerate launch recipes/pretrain.py --config recipes/configs/books.yaml --learning_rate 2e-3
    python recipes/pretrain.py --config recipes/configs/bookcorpus.yaml --plan --price_per_hour 3

Push to the Hub, after `hf auth login`: each checkpoint when it is saved, and at the end the model and its card:

    accelerate launch recipes/pretrain.py --push_to_hub true --hub_model_id you/your-minigpt

Stream a corpus that is larger than the disk from the Hub. It is read and tokenized during training:

    accelerate launch recipes/pretrain.py --streaming true --dataset HuggingFaceFW/fineweb-edu --max_steps 5000

After Ctrl-C or a crash, the same command with `--resume_from_checkpoint auto` resumes the run exactly. Without it, a
folder with checkpoints is refused. Two processes on one machine, restarted if one dies (the variable keeps torchrun
from giving restarted processes the addresses of dead ones):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node 2 --max-restarts 3 \
        recipes/pretrain.py --resume_from_checkpoint auto
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from hf_minigpt.commands import command_for
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import DocumentRows
from hf_minigpt.pretraining.arguments import PlanArguments, PretrainArguments
from hf_minigpt.pretraining.data import check_streaming, open_documents, prepare_data, training_rows
from hf_minigpt.pretraining.plan import plan_pretraining
from hf_minigpt.pretraining.report import format_metrics, pretraining_report, save_model_card
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.publishing.plots import plot_losses
from hf_minigpt.tokenization import num_ids
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.callbacks import PrintSample
from hf_minigpt.training.checkpoints.sealing import check_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.console import describe_model, describe_plan, print_header, print_sample, print_summary
from hf_minigpt.training.evaluation import decode_documents, sample_texts, tale_metrics
from hf_minigpt.training.loading import build_model, context_length, whole_model
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import check_writable, end_training, use_all_cores
from hf_minigpt.training.safeguards import optional
from hf_minigpt.training.trainer import LanguageModelTrainer


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    argument_types = (ModelArguments, DataArguments, PlanArguments, PretrainArguments)
    model_args, data_args, plan_args, args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)
    check_streaming(data_args, args)
    if plan_args.plan:
        print(plan_pretraining(model_args, data_args, plan_args, args))
        return {}

    # Find mistakes before any long work starts.
    check_writable(args.output_dir)
    check_resume(args.resume_from_checkpoint, args.output_dir)
    length = context_length(model_args)
    documents = open_documents(data_args)
    prepare_push(args)

    # Data: one process tokenizes, the others read its files.
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
    facts = ", ".join(f"{name.lower()} {value}" for name, value in corpus.describe().items())
    print_header(
        f"Pretraining in {args.output_dir}",
        {
            "model": describe_model(model, model_args.model or model_args.preset),
            "data": f"{documents.name}: {facts}",
            "device": args.describe_hardware(),
            "plan": describe_plan(args, trainer.num_steps, args.rows_per_step * length),
        },
    )
    metrics = train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics

    # Results. The weights first: nothing that fails later may lose them.
    model.config.use_cache = True
    # an internal call does not push; the recipe pushes at the end
    trainer.save_model(_internal_call=True)
    trainer.save_metrics("pretrain", metrics)
    metrics |= trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        command = f"{command_for('pretrain', launch=True)} {shlex.join(argv)}".strip()
        sample, plot = "", None

        def save_results() -> None:
            trainer.save_metrics("pretrain", metrics)
            with optional("writing the model card"):
                report = pretraining_report(model_args, data_args, args, model, corpus, metrics, sample, command, plot)
                save_model_card(report, args.output_dir)

        save_results()
        with optional("sampling a text"):
            whole = whole_model(model, args.output_dir)
            (sample,) = sample_texts(whole, tokenizer, 1, max_new_tokens=min(length - 1, 200), seed=args.seed)
        if data_args.dataset is None:
            with optional("evaluating the model's tales"):
                whole = whole_model(model, args.output_dir)
                tales = sample_texts(whole, tokenizer, 64, max_new_tokens=length - 1, seed=args.seed + 1)
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
        prompt = " ".join(sample.split()[:2])
        # a young model also writes control characters
        prompt = prompt if prompt.isprintable() else "Once upon a time"
        commands = [f"{command_for('generate')} {args.output_dir} --prompt {shlex.quote(prompt)}"]
        print_sample(sample)
        print_summary(format_metrics(shown), args.output_dir, ["README.md", "loss.png"], commands)
    with optional("pushing to the Hub"):
        push_run(args)
    end_training(trainer.accelerator, trainer)
    return metrics


if __name__ == "__main__":
    main()
