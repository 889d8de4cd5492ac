r"""
Train a text classifier from a pretrained MiniGPT, GPT-2 or GPT-1, or from scratch.

Without flags, classify the embedded reviews of tales, whose sentiment depends on word order: more than 95% accuracy in
less than 3 minutes on two cores, without network, where the linear baseline reaches 65%:

    accelerate launch recipes/finetune_imdb.py --baseline true

IMDb from scratch on two cores. Write the training texts, pretrain on them, and finetune with the same split:

    python recipes/finetune_imdb.py --config recipes/configs/imdb.yaml --write_training_texts reviews.parquet
    accelerate launch recipes/pretrain.py --config recipes/configs/imdb_pretrain.yaml --dataset reviews.parquet
    accelerate launch recipes/finetune_imdb.py --config recipes/configs/imdb.yaml --model runs/imdb-pretrain \
        --seeds 1 2 --baseline true

Your own texts, from a file with a text and a label column; GPT-2; LoRA:

    python recipes/finetune_imdb.py --dataset reviews.csv --label_column stars --class_names bad good \
        --label_map 1=bad 5=good
    accelerate launch recipes/finetune_imdb.py --config recipes/configs/imdb.yaml --model openai-community/gpt2 \
        --context_length 512 --optimizer adamw --learning_rate 5e-5 --layer_decay 0.9 --pooling last \
        --adversarial_epsilon 0
    accelerate launch recipes/finetune_imdb.py --model runs/imdb-pretrain --dataset stanfordnlp/imdb --lora_rank 8 \
        --optimizer adamw --learning_rate 1e-3 --output_dir runs/imdb-lora

To resume an interrupted run, repeat its command with `--resume_from_checkpoint auto`.
"""

import copy
import shlex
import sys
from collections.abc import Sequence

from transformers import EarlyStoppingCallback, set_seed

from hf_minigpt.classification.arguments import ClassificationArguments, ReviewArguments, SeedArguments
from hf_minigpt.classification.baseline import check_baseline_possible
from hf_minigpt.classification.batching import ReviewCollator, ReviewRows
from hf_minigpt.classification.data import load_reviews, write_texts
from hf_minigpt.classification.metrics import classification_metrics
from hf_minigpt.classification.model import build_classifier, check_lora_possible
from hf_minigpt.classification.report import spread
from hf_minigpt.classification.results import print_plan, save_results
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer
from hf_minigpt.commands import command_for
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.training.arguments import ModelArguments
from hf_minigpt.training.checkpoints.sealing import check_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.loading import check_base_exists
from hf_minigpt.training.lora import LoraArguments, add_lora
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import check_writable, end_training, use_all_cores
from hf_minigpt.training.safeguards import optional


def train(seed, output_dir, model_args, review_args, args, lora_args, splits):
    """Train one classifier. Return its trainer, its test logits and its validation and test metrics."""
    args = copy.copy(args)
    # With several seeds, only the best model is pushed, after all runs.
    args.push_to_hub = args.push_to_hub and output_dir == args.output_dir
    args.seed, args.output_dir = seed, output_dir
    set_seed(seed)
    model, tokenizer = build_classifier(model_args, args, splits, review_args.truncation)
    if lora_args.lora_rank:
        model = add_lora(model, lora_args)

    def rows(data, **options):
        length = model.config.truncation_length
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
    print_plan(trainer, model_args, splits, test_rows)
    metrics = train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics
    metrics |= trainer.evaluate()
    logits = trainer.predict_logits(test_rows)
    metrics |= {f"test_{name}": value for name, value in classification_metrics(logits, splits.test.labels).items()}
    metrics["test_share_truncated"] = test_rows.num_truncated / len(test_rows)
    metrics["context_length"] = model.config.truncation_length
    return trainer, logits, metrics


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    argument_types = (ModelArguments, ReviewArguments, ClassificationArguments, LoraArguments, SeedArguments)
    model_args, review_args, args, lora_args, seed_args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)

    # Find errors before anything takes long.
    check_lora_possible(lora_args, model_args)
    check_base_exists(model_args.model, model_args.tokenizer, model_args.trust_remote_code)
    model_args.overrides()
    if review_args.baseline:
        check_baseline_possible()
    splits = load_reviews(review_args)
    if review_args.write_training_texts is not None:
        write_texts(splits.pretraining_texts, review_args.write_training_texts)
        print(f"Wrote {len(splits.pretraining_texts):,} texts to {review_args.write_training_texts}")
        return {}
    check_writable(args.output_dir)
    seeds = seed_args.seeds or [args.seed]
    folders = {seed: f"{args.output_dir}/seed-{seed}" if len(seeds) > 1 else args.output_dir for seed in seeds}
    for folder in folders.values():
        check_resume(args.resume_from_checkpoint, folder)
    prepare_push(args)

    # Train one classifier per seed, and keep the best by validation accuracy.
    arguments = (model_args, review_args, args, lora_args)
    best, accuracies = None, []
    for seed, folder in folders.items():
        trainer, logits, metrics = train(seed, folder, *arguments, splits)
        accuracies.append(metrics["test_accuracy"])
        trainer.accelerator.print(f"Seed {seed}: test accuracy {accuracies[-1]:.2%}")
        if folder != args.output_dir:
            trainer.save_metrics("finetune", metrics)
        if best is None or metrics["eval_accuracy"] > best[2]["eval_accuracy"]:
            best = trainer, logits, metrics
    last_trainer = trainer
    trainer, logits, metrics = best
    if len(seeds) > 1:
        metrics["test_accuracy_mean"], metrics["test_accuracy_spread"] = spread(accuracies)

    # Save the model before everything that may fail.
    trainer.args.output_dir = args.output_dir
    if lora_args.merge_lora:
        trainer.model = trainer.model.merge_and_unload()
    trainer.model.config.use_cache = True
    # As an internal call it does not push to the Hub yet.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        if lora_args.saves_adapter:
            trainer.model.config.save_pretrained(args.output_dir)
        command = f"{command_for('classify', launch=True)} {shlex.join(argv)}".strip()
        save_results(trainer, logits, metrics, splits, *arguments, command)
    with optional("pushing to the Hub"):
        push_run(args)
    end_training(trainer.accelerator, trainer, last_trainer)
    return metrics


if __name__ == "__main__":
    main()
