"""
The same as recipes/pretrain.py, with the same flags, but with a plain Accelerate loop that you can edit.

    accelerate launch recipes/pretrain_loop.py
    accelerate launch recipes/pretrain_loop.py --dataset my_books/ --max_steps 200 --output_dir runs/books

`--resume_from_checkpoint auto` resumes an interrupted run. Unlike recipes/pretrain.py, it writes no model card and
pushes no checkpoints (`--push_to_hub true` pushes at the end).
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin, send_to_device
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerState, get_scheduler, set_seed

from hf_minigpt.commands import command_for
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.rows import AlignedDocumentRows, DocumentRows, ShuffledDocumentRows
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.pretraining.data import open_documents, prepare_data, training_rows
from hf_minigpt.pretraining.report import format_metrics
from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.publishing.plots import plot_losses
from hf_minigpt.tokenization import num_ids
from hf_minigpt.training.arguments import DataArguments, ModelArguments
from hf_minigpt.training.checkpoints.divergence import LossGuard
from hf_minigpt.training.checkpoints.fingerprints import check_same_run, dataset_fingerprint, run_fingerprint
from hf_minigpt.training.checkpoints.sealing import CheckpointSealer, check_resume, resolve_resume, run_lock
from hf_minigpt.training.checkpoints.signals import StopSignals
from hf_minigpt.training.console import describe_model, describe_plan, print_header, print_sample, print_summary
from hf_minigpt.training.evaluation import evaluate_language_model, sample_texts
from hf_minigpt.training.loading import build_model, context_length, whole_model
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.parsing import parse
from hf_minigpt.training.processes import (
    check_writable,
    end_training,
    print_once,
    use_all_cores,
    use_exact_reductions,
    with_own_class,
)
from hf_minigpt.training.safeguards import optional
from hf_minigpt.training.settings import save_settings


Batch = dict[str, torch.Tensor]
# Losses are read from the device after this many steps, and before evaluations and checkpoints. Reading waits for it.
READ_EVERY = 100


def endless_batches(
    loader: DataLoader,
    rows: AlignedDocumentRows | ShuffledDocumentRows,
    generator: torch.Generator,
    seed: int,
    first: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield batches epoch after epoch, beginning with batch `first`. The order of an epoch depends on its number."""
    first_epoch, skipped = divmod(first, len(loader))
    for epoch in itertools.count(first_epoch):
        rows.set_epoch(epoch)
        loader.set_epoch(epoch)
        # the generator of the sampler and the loader, which would otherwise draw from the generator of the dropout
        generator.manual_seed(seed + epoch)
        for batch in skip_first_batches(loader, skipped if epoch == first_epoch else 0):
            # from pinned memory, without waiting for the device
            yield send_to_device(batch, device, non_blocking=loader.pin_memory)


def check_loop_possible(args: PretrainArguments) -> None:
    """Refuse flags that this loop does not support."""
    for name in ("eval_strategy", "save_strategy"):
        if getattr(args, name) not in ("no", "steps"):
            raise ValueError(f"{name}={getattr(args, name).value!r}: this loop counts steps. Set steps or no.")
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} requires the Trainer. Choose another, or use "
            "recipes/pretrain.py."
        )
    if args.uses_deepspeed:
        raise ValueError("This loop does not train with DeepSpeed. Launch it without, or use recipes/pretrain.py.")
    if args.optimizer == "trainer":
        raise ValueError("optimizer='trainer': this loop has no Trainer. Set muon or adamw.")
    for name in ("load_best_model_at_end", "auto_find_batch_size", "neftune_noise_alpha"):
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)}: this loop does not support it. Leave it out.")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data_args, args = parse((ModelArguments, DataArguments, PretrainArguments), argv, description=__doc__)
    use_all_cores(args.cpu_threads)
    if data_args.streaming:
        raise ValueError("streaming=True: this loop reads stored rows. Stream with recipes/pretrain.py.")
    check_loop_possible(args)
    check_writable(args.output_dir)
    check_resume(args.resume_from_checkpoint, args.output_dir)
    length = context_length(model_args)
    documents = open_documents(data_args)
    prepare_push(args)
    mixed_precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=args.use_cpu,
        # the loop moves the model and the batches
        device_placement=False,
        dynamo_plugin=TorchDynamoPlugin(args.torch_compile_backend, args.torch_compile_mode),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=bool(args.ddp_broadcast_buffers))],
    )
    args.apply_tf32()
    use_exact_reductions(accelerator)
    with accelerator.local_main_process_first():
        tokenizer, corpus = prepare_data(model_args, data_args, documents)

    set_seed(args.seed)
    rows = training_rows(corpus, tokenizer, length, data_args, args)
    held_out = DocumentRows(corpus.validation, length)
    collator = LanguageModelCollator(tokenizer.pad_token_id, num_ids(tokenizer))
    generator = torch.Generator().manual_seed(args.seed)
    options = {"sampler": RandomSampler(rows, generator=generator), "generator": generator, "drop_last": True}
    pin_memory = args.dataloader_pin_memory and accelerator.device.type == "cuda"
    loader = DataLoader(rows, args.train_batch_size, collate_fn=collator, pin_memory=pin_memory, **options)
    model = build_model(model_args, tokenizer).to(accelerator.device)
    factory_and_kwargs = optimizer_cls_and_kwargs(args)
    assert factory_and_kwargs is not None
    factory, optimizer_kwargs = factory_and_kwargs
    optimizer = factory()(model, **optimizer_kwargs)

    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    num_steps = int(args.num_train_epochs * len(rows) / rows_per_step)
    if args.max_steps > 0:
        num_steps = args.max_steps
    warmup_steps, scheduler_kwargs = args.get_warmup_steps(num_steps), args.scheduler_kwargs(num_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, num_steps, scheduler_kwargs)
    # the scheduler is not prepared: accelerate would step it once for every process
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if len(loader) == 0:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size}: the {len(rows)} rows fill no batch on "
            f"{accelerator.num_processes} processes. Set a smaller batch size."
        )
    if rows_per_step > len(rows) or num_steps == 0:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} makes steps of {rows_per_step} rows, "
            f"more than num_train_epochs={args.num_train_epochs} of {len(rows)} rows. Set a smaller step."
        )
    # eval_steps and save_steps may be fractions of the run
    intervals = TrainerState()
    intervals.compute_steps(args, num_steps)
    run = run_fingerprint(args, model, dataset_fingerprint(rows), args.optimizer)

    print_header(
        f"Pretraining in {args.output_dir}",
        {
            "model": describe_model(model, model_args.model or model_args.preset),
            "data": f"{documents.name}: {', '.join(f'{k.lower()} {v}' for k, v in corpus.describe().items())}",
            "device": args.describe_hardware(),
            "plan": describe_plan(args, num_steps, rows_per_step * length),
        },
    )
    history: list[dict[str, float]] = []
    unread: list[dict[str, Any]] = []
    losses = LossGuard(args.output_dir)
    start = time.perf_counter()

    def evaluate(max_rows: int | None) -> dict[str, float]:
        results = evaluate_language_model(model, held_out, collator, args.eval_batch_size, accelerator, max_rows)
        history.append(
            {"step": step, "num_input_tokens_seen": tokens_seen, **{f"eval_{k}": v for k, v in results.items()}}
        )
        print_once(
            f"step {step}/{num_steps}: train loss {history[-2]['loss']:.4g}, held-out loss {results['loss']:.4g}, "
            f"bits/byte {results['bits_per_byte']:.4g}, {time.perf_counter() - start:,.0f} s"
        )
        return results

    sealer = CheckpointSealer(args.output_dir, args.save_total_limit, run)
    with run_lock(args.output_dir), StopSignals(args.ddp_timeout) as stop, sealer:
        checkpoint = resolve_resume(args.resume_from_checkpoint, args.output_dir)
        step = 0
        if checkpoint is not None:
            check_same_run(checkpoint, run, args.allow_changed_run)
            accelerator.load_state(checkpoint)
            state = json.loads(Path(checkpoint, "loop.json").read_text())
            step, history = state["step"], state["history"]
            scheduler.load_state_dict(state["scheduler"])
        tokens_seen = step * rows_per_step * length
        first = step * args.gradient_accumulation_steps
        batches = endless_batches(loader, rows, generator, args.seed, first, accelerator.device)
        wrapped.train()
        while step < num_steps:
            step += 1
            # The loss of a step is the mean over the tokens of all micro-batches on all processes. So count them
            # first, and divide the loss of every micro-batch by the same number.
            micro_batches = list(itertools.islice(batches, args.gradient_accumulation_steps))
            num_tokens = sum((batch["shift_labels"] != -100).sum() for batch in micro_batches)
            num_tokens = accelerator.reduce(num_tokens, "sum")
            total = torch.zeros((), device=accelerator.device)
            for i, batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                with nullcontext() if is_last else accelerator.no_sync(wrapped), accelerator.autocast():
                    loss = wrapped(**batch, num_items_in_batch=num_tokens, skip_logits=True, use_cache=False).loss
                    # DDP averages the gradients over the processes, but they must be summed
                    accelerator.backward(loss * accelerator.num_processes)
                total += loss.detach()
            if args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            tokens_seen += rows_per_step * length
            total = accelerator.reduce(total, "sum")
            losses.record(step, total)
            unread.append({"step": step, "num_input_tokens_seen": tokens_seen, "loss": total})

            stopping = stop.requested()
            evaluating = args.eval_strategy == "steps" and step % intervals.eval_steps == 0 and step < num_steps
            saving = args.save_strategy == "steps" and step % intervals.save_steps == 0
            saving = saving or stopping or step == num_steps
            if evaluating or saving or step % READ_EVERY == 0:
                losses.check()
                values = torch.stack([entry["loss"] for entry in unread]).tolist()
                history += [entry | {"loss": value} for entry, value in zip(unread, values, strict=True)]
                unread.clear()
            if evaluating:
                evaluate(args.eval_max_rows)
            if saving:
                with sealer.saving(step) as folder:
                    accelerator.save_state(folder)
                    if accelerator.is_main_process:
                        state = {"step": step, "history": history, "scheduler": scheduler.state_dict()}
                        (folder / "loop.json").write_text(json.dumps(state))
            if stopping:
                break
    stop.exit_if_requested()

    # The weights first: nothing that fails later may lose them.
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        with with_own_class(model):
            model.save_pretrained(args.output_dir, state_dict=weights)
        tokenizer.save_pretrained(args.output_dir)
        save_settings(args, args.output_dir)
    results = evaluate(None)
    if accelerator.is_main_process:
        Path(args.output_dir, "all_results.json").write_text(json.dumps(results, indent=2) + "\n")
        with optional("drawing loss.png"):
            plot_losses(history, Path(args.output_dir, "loss.png"), title=Path(args.output_dir).name)
        with optional("sampling a text"):
            whole = whole_model(model, args.output_dir)
            print_sample(sample_texts(whole, tokenizer, 1, max_new_tokens=min(length - 1, 200), seed=args.seed)[0])
        print_summary(
            format_metrics(results), args.output_dir, ["loss.png"], [f"{command_for('generate')} {args.output_dir}"]
        )
    with optional("pushing to the Hub"):
        push_run(args)
    del wrapped
    end_training(accelerator)
    return results


if __name__ == "__main__":
    main()
