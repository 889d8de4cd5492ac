r"""
From a pretrained MiniGPT, a GPT-2, a GPT-1 or nothing to a classifier of texts, with the linear baseline beside it.

Without arguments: embedded reviews of tales, whose sentiment hangs on the order of the words; above 95 % of the
held-out ones right, where words and pairs of words tell 65 %, in under 3 minutes on two cores, without network:

    accelerate launch recipes/finetune_imdb.py --baseline true

The film reviews of IMDb from scratch, on two cores. The test reviews are set aside first, by `--split_seed`;
pretraining reads what may be trained on, and the finetuning makes the same split again:

    python recipes/finetune_imdb.py --config recipes/configs/imdb.yaml --write_training_texts reviews.parquet
    accelerate launch recipes/pretrain.py --config recipes/configs/imdb_pretrain.yaml --dataset reviews.parquet
    accelerate launch recipes/finetune_imdb.py --config recipes/configs/imdb.yaml --model runs/imdb-pretrain \
        --seeds 1 2 --baseline true

Your own texts, from a file with a column of texts and one of labels; GPT-2 as a start; its adapters only:

    python recipes/finetune_imdb.py --dataset reviews.csv --label_column stars --class_names bad good \
        --label_map 1=bad 5=good
    accelerate launch recipes/finetune_imdb.py --config recipes/configs/imdb.yaml --model openai-community/gpt2 \
        --context_length 512 --optimizer adamw --learning_rate 5e-5 --layer_decay 0.9 --pooling last \
        --adversarial_epsilon 0
    accelerate launch recipes/finetune_imdb.py --model runs/imdb-pretrain --dataset stanfordnlp/imdb --lora_rank 8 \
        --optimizer adamw --learning_rate 1e-3 --output_dir runs/imdb-lora

Interrupted, the same command with `--resume_from_checkpoint auto` goes on as if nothing had been.
"""

import copy
import shlex
import sys
from collections.abc import Sequence

from transformers import EarlyStoppingCallback, set_seed

from hf_minigpt.classification.arguments import (
    ClassificationArguments,
    ReviewArguments,
    SeedArguments,
)
from hf_minigpt.classification.baseline import check_baseline_possible, compare_with_baseline
from hf_minigpt.classification.batching import ReviewCollator
from hf_minigpt.classification.cards import (
    FIGURES,
    format_classification_metrics,
    save_classification_card,
)
from hf_minigpt.classification.data import ReviewRows, write_texts
from hf_minigpt.classification.metrics import accuracy_interval, classification_metrics
from hf_minigpt.classification.model import build_classifier, check_lora_possible
from hf_minigpt.classification.report import (
    ask_command,
    classification_report,
    describe_data,
    draw_figures,
    evaluate_pipeline,
    spread,
)
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.training.arguments import ModelArguments, parse
from hf_minigpt.training.checkpoints.sealing import check_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.loading import check_base_exists
from hf_minigpt.training.lora import LoraArguments, add_lora
from hf_minigpt.training.processes import check_writable, end_training, use_all_cores
from hf_minigpt.training.safeguards import optional, written


def train(seed, output_dir, model_args, review_args, args, lora_args, splits) -> tuple[ClassificationTrainer, dict]:
    """One classifier: its trainer, and its metrics on the validation texts (`eval_`) and the test texts (`test_`)."""
    # only the best one goes to the Hub, and only at the end
    args, push = copy.copy(args), args.push_to_hub and output_dir == args.output_dir
    args.seed, args.output_dir, args.push_to_hub = seed, output_dir, push
    set_seed(seed)
    model, tokenizer = build_classifier(model_args, args, splits, review_args.truncation)
    if lora_args.lora_rank:
        model = add_lora(model, lora_args)
    length = model.config.truncation_length

    def rows(data, **options):
        return ReviewRows(data.texts, data.labels, tokenizer, length, review_args.truncation, **options)

    train_rows = rows(splits.train, training=True, token_dropout=args.token_dropout, seed=seed)
    test_rows = rows(splits.test)
    patience = args.early_stopping_patience
    trainer = ClassificationTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=rows(splits.validation),
        data_collator=ReviewCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=classification_optimizer(args),
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer.accelerator.print(f"{num_parameters:,} parameters learn, seed {seed}; {args.describe_hardware()}")
    trainer.accelerator.print(describe_data(splits, train_rows, test_rows))
    metrics = train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics
    metrics |= trainer.evaluate()
    trainer.test_logits = trainer.predict_logits(test_rows)
    metrics |= {f"test_{k}": v for k, v in classification_metrics(trainer.test_logits, splits.test.labels).items()}
    metrics["test_share_truncated"] = test_rows.num_truncated / len(test_rows)
    return trainer, metrics | {"context_length": length}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    argument_types = (ModelArguments, ReviewArguments, ClassificationArguments, LoraArguments, SeedArguments)
    model_args, review_args, args, lora_args, seed_args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)

    # Whatever can be wrong is found before anything takes long.
    check_lora_possible(lora_args, model_args)
    check_base_exists(model_args.model, model_args.tokenizer, model_args.trust_remote_code)
    model_args.overrides()
    if review_args.baseline:
        check_baseline_possible()
    splits = review_args.load()
    if review_args.write_training_texts is not None:
        write_texts(splits.pretraining_texts, review_args.write_training_texts)
        print(f"{len(splits.pretraining_texts):,} texts in {review_args.write_training_texts}")
        return {}
    check_writable(args.output_dir)
    seeds = seed_args.seeds or [args.seed]
    folders = {seed: f"{args.output_dir}/seed-{seed}" if len(seeds) > 1 else args.output_dir for seed in seeds}
    for folder in folders.values():
        check_resume(args.resume_from_checkpoint, folder)
    prepare_push(args)

    # One classifier a seed; the best on the validation texts is kept.
    trainer, metrics, accuracies = None, {}, []
    for seed, folder in folders.items():
        found, its_metrics = train(seed, folder, model_args, review_args, args, lora_args, splits)
        accuracies.append(its_metrics["test_accuracy"])
        found.accelerator.print(f"seed {seed}: {accuracies[-1]:.2%} of the test texts right")
        if folder != args.output_dir:
            found.save_metrics("finetune", its_metrics)
        if trainer is None or its_metrics["eval_accuracy"] > metrics["eval_accuracy"]:
            trainer, metrics = found, its_metrics
    if len(seeds) > 1:
        metrics["test_accuracy_mean"], metrics["test_accuracy_spread"] = spread(accuracies)

    # Results: first what cannot be had again
    trainer.args.output_dir = args.output_dir
    if lora_args.merge_lora:
        trainer.model = trainer.model.merge_and_unload()
    trainer.model.config.use_cache = True
    # called so, it leaves pushing to the end
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        if lora_args.saves_adapter:
            trainer.model.config.save_pretrained(args.output_dir)
        command = f"accelerate launch recipes/finetune_imdb.py {shlex.join(argv)}".strip()

        figures: list[str] = []

        def save_results(more: dict[str, float]) -> None:
            metrics.update({f"test_{name}": value for name, value in more.items()})
            trainer.save_metrics("finetune", metrics)
            with optional("writing the model card"):
                report = classification_report(
                    model_args, review_args, args, lora_args, trainer.model, splits, metrics, command
                )
                save_classification_card(report, args.output_dir, figures)

        more = accuracy_interval(trainer.test_logits, splits.test.labels)
        save_results(more)
        with optional("drawing the figures"):
            draw_figures(trainer.test_logits, splits, args.output_dir)
            figures.extend(FIGURES.values())
        if review_args.baseline:
            with optional("the baseline"):
                more |= compare_with_baseline(trainer.test_logits.argmax(-1).numpy(), splits)
        if review_args.pipeline_examples > 0:
            with optional("the evaluation through the pipeline"):
                first = splits.test.select(range(min(review_args.pipeline_examples, len(splits.test))))
                logits = trainer.test_logits[: len(first)]
                more |= evaluate_pipeline(trainer.model, trainer.processing_class, first, logits)
        save_results(more)
        shown = {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}
        shown |= {"examples_per_second": metrics["train_examples_per_second"]}
        print("\n".join(f"{name:75} {value}" for name, value in format_classification_metrics(shown).items()))
        files = written(args.output_dir, "README.md", *figures)
        print(f"\n{args.output_dir} holds the model, its tokenizer and code{files}. Next:")
        print(f"  {ask_command(args.output_dir, lora_args, splits.test.texts[0][:80])}")
    with optional("pushing to the Hub"):
        push_run(args)
    end_training(trainer.accelerator, trainer, found)
    return metrics


if __name__ == "__main__":
    main()
