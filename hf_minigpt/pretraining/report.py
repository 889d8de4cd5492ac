"""From a finished run to what its model card says."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..data.streaming import StreamedCorpus
from ..data.token_store import PreparedCorpus
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..pretraining.arguments import PretrainArguments
from ..training.arguments import DataArguments, ModelArguments
from ..training.report import HYPERPARAMETERS, METRICS, TrainingReport, plain


LIMITS = (
    "It continues text in the manner of its corpus; it knows nothing else, follows no instructions, and what it says "
    "may be false.",
    "It repeats the biases of its corpus, and may repeat passages of it word for word.",
)


def pretraining_report(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PretrainArguments,
    model: MiniGPTForCausalLM,
    corpus: PreparedCorpus | StreamedCorpus,
    metrics: Mapping[str, float],
    sample: str,
    command: str,
    plot: str | None = "loss.png",
) -> TrainingReport:
    """The report of `recipes/pretrain.py`; `metrics` are the Trainer's, with their prefixes."""
    on_tales = data_args.dataset is None
    on_hub = not on_tales and not os.path.exists(str(data_args.dataset))
    dataset = "the tales of hf_minigpt" if on_tales else str(data_args.dataset)
    if not on_tales and not on_hub:
        # the folders of somebody's machine are nobody's business
        dataset = Path(dataset).resolve().name
    shown = [*HYPERPARAMETERS]
    if args.optimizer == "muon":
        shown[2:2] = ["matrix_learning_rate", "muon_scaling"]
    config = model.config
    figures = {name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics}
    return TrainingReport(
        name=args.hub_model_id or Path(args.output_dir or "").resolve().name,
        description="A GPT-style language model made with hf_minigpt"
        + (f", trained on from {model_args.model}." if model_args.model else f" from scratch ({model_args.preset})."),
        num_parameters=model.num_parameters(),
        architecture={
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "context": config.max_position_embeddings,
            "vocabulary": config.unpadded_vocab_size or config.vocab_size,
        },
        dataset=dataset,
        dataset_on_hub=on_hub,
        data=corpus.describe(),
        hyperparameters={name: plain(getattr(args, name)) for name in shown}
        | {"tokens seen": f"{metrics['train_tokens']:,}"},
        hardware=args.describe_hardware(),
        seconds=metrics["train_runtime"],
        metrics=figures | {"tokens_per_second": metrics["train_tokens_per_second"]},
        sample=sample,
        command=command,
        plot=plot,
        limits=LIMITS,
        license="mit" if on_tales else "unknown",
        language="en" if on_tales else None,
        base_model=model_args.model if model_args.model and not os.path.exists(model_args.model) else None,
    )
