r"""
Finetune a base model on instructions. Without arguments: a small base model is pretrained on the embedded tales, then
taught to answer questions about them, on a laptop's CPU, without network, in about five minutes.

    accelerate launch recipes/sft.py

On your own records (instruction, input and output; prompt and completion; or messages with roles; a file or folder of
.json, .jsonl, .csv, .parquet, or a name on the Hub), from your own base model; first look at what is trained:

    accelerate launch recipes/sft.py --model runs/books --dataset instructions.json --num_train_epochs 3 \
        --show_examples 3 --output_dir runs/assistant
    accelerate launch recipes/sft.py --config recipes/configs/sft_alpaca.yaml --model runs/books

An adapter instead of a whole model; a tenth of the rows pretraining text, against forgetting:

    accelerate launch recipes/sft.py --model runs/books --dataset instructions.json --lora_rank 16
    accelerate launch recipes/sft.py --model runs/books --dataset instructions.json --pretraining_fraction 0.1 \
        --pretraining_dataset ../shared/data/books

Interrupted: the same command with `--resume_from_checkpoint auto`. Then talk to it:

    python recipes/chat.py runs/sft
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.atomic import follow_umask
from hf_minigpt.instructions.data import InstructionCollator, colored
from hf_minigpt.instructions.report import format_figures, save_sft_card, sft_report
from hf_minigpt.instructions.trainer import (
    EMBEDDED_BASE_FLAGS,
    Answer,
    InstructionArguments,
    InstructionTrainer,
    SFTArguments,
    answer_all,
    answer_metrics,
    embedded_base_folder,
    inherited_settings,
    open_conversations,
    prepare_for_chat,
    tokenize_splits,
    training_rows,
)
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.publishing.plots import plot_losses
from hf_minigpt.recipes import pretrain
from hf_minigpt.training.checkpoints.sealing import check_resume
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.loading import check_base_exists, load_base_model
from hf_minigpt.training.lora import LoraArguments, add_lora
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import check_writable, end_training, use_all_cores
from hf_minigpt.training.safeguards import optional, written


NUM_SAMPLES = 4


def embedded_base(sft_args: InstructionArguments, args: SFTArguments) -> str:
    """The base model of a run without --model, pretrained now or found in the cache."""
    folder = embedded_base_folder(sft_args.cache_dir)
    if not (folder / "all_results.json").is_file():
        flags = ["--output_dir", str(folder), "--cache_dir", sft_args.cache_dir, "--resume_from_checkpoint", "auto"]
        threads = [] if args.cpu_threads is None else ["--cpu_threads", str(args.cpu_threads)]
        pretrain.main([*EMBEDDED_BASE_FLAGS, *flags, *threads, "--disable_tqdm", str(args.disable_tqdm)])
        # safetensors writes weights that only their owner can read, and a cache may be shared
        follow_umask(folder)
    return str(folder)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    argument_types = (InstructionArguments, SFTArguments, LoraArguments)
    sft_args, args, lora_args = parse(argument_types, argv, description=__doc__)
    use_all_cores(args.cpu_threads)

    # Whatever can be wrong is found before anything takes long.
    check_writable(args.output_dir)
    check_resume(args.resume_from_checkpoint, args.output_dir)
    check_base_exists(sft_args.model, sft_args.tokenizer, sft_args.trust_remote_code)
    conversations = open_conversations(sft_args)
    prepare_push(args)

    # The base model, and what it hands down; flags win
    base = sft_args.model or embedded_base(sft_args, args)
    inherited = inherited_settings(base, sft_args.learning_rate_factor, adapter=lora_args.lora_rank > 0)
    hub_model_id = args.hub_model_id
    sft_args, args, lora_args = parse(argument_types, argv, description=__doc__, defaults=inherited)
    args.hub_model_id = hub_model_id
    options = {"trust_remote_code": sft_args.trust_remote_code, "attn_implementation": sft_args.attn_implementation}
    model, tokenizer = load_base_model(MiniGPTForCausalLM, base, tokenizer=sft_args.tokenizer, **options)
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
    say = trainer.accelerator.print
    settings = ", ".join(f"{name}={value}" for name, value in inherited.items())
    say(
        f"Inherited from {base}: context_length={data.max_length}, its tokenizer ({len(tokenizer)} tokens), {settings}"
    )
    say(f"{data.describe()}\n{args.describe_hardware()}")
    for index in range(min(sft_args.show_examples, len(data.training))):
        say(colored(tokenizer, data.training, index), end="\n\n")
    samples = data.held_out.conversations[:NUM_SAMPLES]
    on_main = trainer.is_world_process_zero() and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    before: list[Answer] = []
    if on_main:
        with optional("answering before the training"):
            before = answer_all(model, tokenizer, samples, max_new_tokens=sft_args.max_new_tokens)
    metrics = trainer.evaluate(metric_key_prefix="before")
    metrics |= train_safely(trainer, allow_changed_run=args.allow_changed_run).metrics
    metrics |= trainer.evaluate()

    # Results: first what cannot be had again
    if lora_args.merge_lora:
        trainer.model = trainer.model.merge_and_unload()
    model.config.use_cache = True
    # called so, it leaves pushing to the end
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        command = f"accelerate launch recipes/sft.py {shlex.join(argv)}".strip()
        answers: list[Answer] = []
        plot = None

        def save_results() -> None:
            trainer.save_metrics("sft", metrics)
            with optional("writing the model card"):
                report = sft_report(sft_args, args, lora_args, model, tokenizer, data, metrics, command, plot)
                save_sft_card(report, metrics, before, answers[:NUM_SAMPLES], args.output_dir)

        save_results()
        if on_main and sft_args.eval_answers > 0:
            with optional("answering after the training"):
                asked = data.held_out.conversations[: sft_args.eval_answers]
                answers = answer_all(trainer.model, tokenizer, asked, max_new_tokens=sft_args.max_new_tokens)
                metrics |= {f"eval_{name}": value for name, value in answer_metrics(answers).items()}
        with optional("drawing loss.png"):
            path = Path(args.output_dir, "loss.png")
            plot_losses(trainer.state.log_history, path, title=Path(args.output_dir).name)
            plot = path.name
        save_results()
        print("\n".join(f"{name:40} {value}" for name, value in format_figures(metrics).items()))
        files = written(args.output_dir, "README.md", "loss.png")
        print(f"\n{args.output_dir} holds the model, its tokenizer and template{files}. Next:")
        prompts = [c.prompt[0]["content"] for c in data.held_out.conversations if len(c.prompt) == 1]
        short = [f" --greedy --prompt {shlex.quote(prompt)}" for prompt in prompts if "\n" not in prompt]
        print(f"  python recipes/chat.py {args.output_dir}{short[0] if short else ''}")
    with optional("pushing to the Hub"):
        push_run(args)
    end_training(trainer.accelerator, trainer)
    return metrics


if __name__ == "__main__":
    main()
