r"""
Finetune a base model on instructions. Without arguments, a small base model is pretrained on the embedded tales and
finetuned to answer questions about them: about five minutes on a laptop's CPU, without network.

    accelerate launch recipes/sft.py

On your own records, from your own base model. The records are a file or folder of .json, .jsonl, .csv or .parquet, or
a dataset on the Hub, with instruction, input and output; prompt and completion; or messages with roles.

    accelerate launch recipes/sft.py --model runs/books --dataset instructions.json --num_train_epochs 3 \
        --show_examples 3 --output_dir runs/assistant
    accelerate launch recipes/sft.py --config recipes/configs/sft_alpaca.yaml --model runs/books

With LoRA adapters, or with a tenth of the rows pretraining text against forgetting:

    accelerate launch recipes/sft.py --model runs/books --dataset instructions.json --lora_rank 16
    accelerate launch recipes/sft.py --model runs/books --dataset instructions.json --pretraining_fraction 0.1 \
        --pretraining_dataset books/

To resume an interrupted run, repeat the command with `--resume_from_checkpoint auto`. To chat with the model:

    python recipes/chat.py runs/sft
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.atomic import follow_umask
from hf_minigpt.commands import command_for
from hf_minigpt.instructions.answers import Answer, answer_metrics, chat_command, generate_answers
from hf_minigpt.instructions.arguments import InstructionArguments, SFTArguments
from hf_minigpt.instructions.data import load_conversations, tokenize_splits, training_rows
from hf_minigpt.instructions.model import (
    EMBEDDED_BASE_FLAGS,
    describe_settings,
    embedded_base_folder,
    inherited_settings,
    prepare_for_chat,
)
from hf_minigpt.instructions.report import format_figures, save_sft_card, sft_report
from hf_minigpt.instructions.rows import InstructionCollator, highlight_loss_tokens
from hf_minigpt.instructions.trainer import InstructionTrainer
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.publishing.plots import plot_losses
from hf_minigpt.recipes import pretrain
from hf_minigpt.training.checkpoints.sealing import check_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.console import describe_plan, print_header, print_summary
from hf_minigpt.training.loading import check_base_exists, load_base_model, whole_model
from hf_minigpt.training.lora import LoraArguments, add_lora
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import check_writable, end_training, use_all_cores
from hf_minigpt.training.safeguards import optional


# Held-out prompts on the model card, answered before and after training
NUM_SAMPLES = 4


def embedded_base(sft_args: InstructionArguments, args: SFTArguments) -> str:
    """Return the folder of the base model of a run without --model; pretrain it if it is not in the cache."""
    folder = embedded_base_folder(sft_args.cache_dir)
    if not (folder / "all_results.json").is_file():
        flags = ["--output_dir", str(folder), "--cache_dir", sft_args.cache_dir, "--resume_from_checkpoint", "auto"]
        threads = [] if args.cpu_threads is None else ["--cpu_threads", str(args.cpu_threads)]
        pretrain.main([*EMBEDDED_BASE_FLAGS, *flags, *threads, "--disable_tqdm", str(args.disable_tqdm)])
        # safetensors makes weights readable only by their owner, but several users may share a cache
        follow_umask(folder)
    return str(folder)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    argument_types = (InstructionArguments, SFTArguments, LoraArguments)
    sft_args, args, lora_args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)

    # Find errors before anything slow starts.
    check_writable(args.output_dir)
    check_resume(args.resume_from_checkpoint, args.output_dir)
    check_base_exists(sft_args.model, sft_args.tokenizer, sft_args.trust_remote_code)
    conversations = load_conversations(sft_args)
    prepare_push(args)

    # Base model. The settings of the run that trained it are the defaults of this run's flags.
    base = sft_args.model or embedded_base(sft_args, args)
    inherited = inherited_settings(base, sft_args.learning_rate_factor, adapter=lora_args.lora_rank > 0)
    # prepare_push has completed the name
    hub_model_id = args.hub_model_id
    sft_args, args, lora_args = parse(argument_types, argv, description=__doc__, defaults=inherited)
    args.hub_model_id = hub_model_id
    model, tokenizer = load_base_model(
        MiniGPTForCausalLM,
        base,
        tokenizer=sft_args.tokenizer,
        trust_remote_code=sft_args.trust_remote_code,
        attn_implementation=sft_args.attn_implementation,
    )
    set_seed(args.seed)
    new_ids = prepare_for_chat(model, tokenizer, sft_args.chat_format)

    # Data
    data = tokenize_splits(sft_args, conversations, tokenizer, model.config)
    train_rows = training_rows(sft_args, data, tokenizer, args.seed)

    # Training
    trainer = InstructionTrainer(
        model=add_lora(model, lora_args, new_ids) if lora_args.lora_rank else model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=data.held_out_rows,
        data_collator=InstructionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
    )
    if trainer.is_sharded and lora_args.merge_lora:
        raise ValueError(
            "merge_lora=True: sharded adapters cannot be merged. Leave it out, and merge the saved adapter in one "
            "process with `hf_minigpt.adapters.save_merged(adapter, folder)`."
        )
    print_header(
        f"Instruction finetuning in {args.output_dir}",
        {
            "model": f"{base}, {model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary",
            "data": data.describe(),
            "rows": f"{len(train_rows):,}, context_length={data.max_length}, packing={sft_args.packing}",
            "optimizer": describe_settings({name: getattr(args, name) for name in inherited}),
            "device": args.describe_hardware(),
            "plan": describe_plan(args, trainer.num_steps),
        },
    )
    for index in range(min(sft_args.show_examples, len(data.training))):
        trainer.accelerator.print(highlight_loss_tokens(tokenizer, data.training, index), end="\n\n")
    is_main = trainer.is_world_process_zero()
    # the Trainer leaves a model that is yet to be sharded on the CPU
    model.to(args.device)
    held_out = data.held_out.conversations
    answers_before: list[Answer] = []
    if is_main:
        with optional("answering before the training"):
            answers_before = generate_answers(
                model, tokenizer, held_out[:NUM_SAMPLES], max_new_tokens=sft_args.max_new_tokens
            )
    metrics = trainer.evaluate(metric_key_prefix="before")
    metrics |= train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics
    metrics |= trainer.evaluate()

    # Results. The model is saved first: everything else can be computed again.
    if lora_args.merge_lora:
        trainer.model = trainer.model.merge_and_unload()
    model.config.use_cache = True
    # _internal_call: do not push yet
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if is_main:
        command = f"{command_for('sft', launch=True)} {shlex.join(argv)}".strip()
        answers: list[Answer] = []
        plot = None

        def save_results() -> None:
            trainer.save_metrics("sft", metrics)
            with optional("writing the model card"):
                report = sft_report(sft_args, args, lora_args, model, tokenizer, data, metrics, command, plot)
                save_sft_card(report, metrics, answers_before, answers[:NUM_SAMPLES], args.output_dir)

        save_results()
        if sft_args.eval_answers > 0:
            with optional("answering after the training"):
                asked = held_out[: sft_args.eval_answers]
                whole = whole_model(trainer.model, args.output_dir)
                answers = generate_answers(whole, tokenizer, asked, max_new_tokens=sft_args.max_new_tokens)
                metrics |= {f"eval_{name}": value for name, value in answer_metrics(answers).items()}
        with optional("drawing loss.png"):
            path = Path(args.output_dir, "loss.png")
            plot_losses(trainer.state.log_history, path, title=Path(args.output_dir).name)
            plot = path.name
        save_results()
        next_commands = [chat_command(args.output_dir, held_out)]
        print_summary(format_figures(metrics), args.output_dir, ["README.md", "loss.png"], next_commands)
    with optional("pushing to the Hub"):
        push_run(args)
    end_training(trainer.accelerator, trainer)
    return metrics


if __name__ == "__main__":
    main()
