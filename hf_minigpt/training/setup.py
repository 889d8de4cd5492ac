"""From flags to the things that a pretraining loop needs: text, tokenizer, model, rows."""

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from ..atomic import made_at_once
from ..configuration_minigpt import MiniGPTConfig
from ..data.corpora import Documents, ShardedDocuments, load_documents, stream_documents
from ..data.rows import AlignedDocumentRows, ShuffledDocumentRows
from ..data.streaming import StreamedCorpus, StreamedRows, prepare_stream, sample_documents
from ..data.token_store import PreparedCorpus, prepare_corpus
from ..modeling_minigpt import MiniGPTForCausalLM
from ..presets import preset
from ..tokenization import check_tokenizer_fits, load_tokenizer, num_ids, padded_vocab_size, train_tokenizer
from .arguments import DataArguments, ModelArguments, PretrainArguments
from .sealing import MANIFEST, verify_checkpoint


# Entries of a tokenizer trained by default. The tales have some 300 words; for real text a small model on a CPU spends
# most of its time in a large vocabulary's head, and the benchmark counts bits per byte, which compare across sizes.
TALES_VOCAB_SIZE = 1024
DEFAULT_VOCAB_SIZE = 4096


def check_streaming(data_args: DataArguments, args: PretrainArguments) -> None:
    """Refuse flags that `--streaming` cannot go with, and have the Trainer read its rows in their order."""
    if not data_args.streaming:
        return
    for is_wrong, message in (
        (args.max_steps <= 0, f"max_steps={args.max_steps}: a stream has no length; set --max_steps"),
        (data_args.dataset is None, "dataset=None: the tales need no streaming; name a corpus with --dataset"),
        (data_args.max_documents is not None, "max_documents is not read; set --max_steps, leave out --max_documents"),
        (args.dataloader_num_workers > 0, "dataloader_num_workers: threads tokenize already; leave it out"),
        (args.auto_find_batch_size, "auto_find_batch_size would lose the place in the stream; leave it out"),
        (data_args.shuffle_characters < 1, "shuffle_characters must be at least 1"),
    ):
        if is_wrong:
            raise ValueError(f"streaming=True with {message}.")
    args.train_sampling_strategy = "sequential"


def open_documents(args: DataArguments) -> Documents | ShardedDocuments:
    """The corpus that the flags name."""
    if args.streaming:
        assert args.dataset is not None
        return stream_documents(
            args.dataset,
            config_name=args.dataset_config,
            split=args.dataset_split,
            text_column=args.text_column,
            join_sentences=args.join_sentences,
            document_separator=args.document_separator,
        )
    return load_documents(
        args.dataset,
        config_name=args.dataset_config,
        split=args.dataset_split,
        text_column=args.text_column,
        join_sentences=args.join_sentences,
        document_separator=args.document_separator,
        max_documents=args.max_documents,
    )


def context_length(args: ModelArguments) -> int:
    """Tokens in a row: the flag, else the model's own.

    Raises:
        ValueError: longer than the table of learned positions of the checkpoint to go on from.
    """
    if args.model is None:
        overrides = args.overrides()
        own = preset(args.preset, **overrides).max_position_embeddings
        return args.context_length or own
    config = _checkpoint_config(args)
    own = config.max_position_embeddings
    if args.context_length is not None and args.context_length > own and config.position_embedding_type == "learned":
        raise ValueError(
            f"context_length={args.context_length} is beyond the {own} learned positions of {args.model}: choose at "
            f"most {own}."
        )
    return args.context_length or own


def _checkpoint_config(args: ModelArguments) -> MiniGPTConfig:
    assert args.model is not None
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not isinstance(config, MiniGPTConfig):
        raise ValueError(
            f"model={args.model!r} is a {config.model_type}, not a MiniGPT: convert it first (hf_minigpt.conversion)."
        )
    return config


def trained_vocab_size(args: ModelArguments, data_args: DataArguments) -> int:
    """Entries of the tokenizer that would be trained."""
    return args.vocab_size or (TALES_VOCAB_SIZE if data_args.dataset is None else DEFAULT_VOCAB_SIZE)


def given_tokenizer(args: ModelArguments) -> PreTrainedTokenizerFast:
    """`--tokenizer`, else that of `--model`."""
    source = args.tokenizer or args.model
    assert source is not None
    tokenizer = load_tokenizer(source, model_max_length=context_length(args), trust_remote_code=args.trust_remote_code)
    if args.model is not None:
        check_tokenizer_fits(tokenizer, _checkpoint_config(args))
    return tokenizer


def prepare_tokenizer(args: ModelArguments, data_args: DataArguments, documents: Documents) -> PreTrainedTokenizerFast:
    """`--tokenizer`, else that of `--model`, else one trained on the corpus, which the cache keeps."""
    if args.tokenizer or args.model:
        return given_tokenizer(args)
    length = context_length(args)
    vocab_size = trained_vocab_size(args, data_args)
    # the version counts up when trained tokenizers change: 2 puts end-of-text in front of a text
    key = hashlib.blake2b(f"2 {documents.fingerprint} {vocab_size}".encode(), digest_size=16).hexdigest()
    folder = Path(data_args.cache_dir) / "tokenizers" / key
    if not folder.is_dir():
        _train_and_save(documents, vocab_size, length, folder)
    return load_tokenizer(folder, model_max_length=length)


def prepare_data(
    args: ModelArguments, data_args: DataArguments, documents: Documents | ShardedDocuments
) -> tuple[PreTrainedTokenizerFast, PreparedCorpus | StreamedCorpus]:
    """The tokenizer and the tokenized corpus, or of one to be streamed the held-out part, made now or found in the
    cache.

    Let one process of a machine do it first: the others then find what it made.
    """
    if isinstance(documents, ShardedDocuments):
        split: dict[str, Any] = {"validation_fraction": data_args.validation_fraction, "seed": data_args.split_seed}
        texts = sample_documents(documents, data_args.streaming_sample, held_out=False, **split)
        tokenizer = prepare_tokenizer(args, data_args, texts)
        num_sampled = data_args.streaming_sample
        return tokenizer, prepare_stream(documents, tokenizer, data_args.cache_dir, num_sampled=num_sampled, **split)
    tokenizer = prepare_tokenizer(args, data_args, documents)
    corpus = prepare_corpus(
        documents,
        tokenizer,
        data_args.cache_dir,
        validation_fraction=data_args.validation_fraction,
        seed=data_args.split_seed,
    )
    return tokenizer, corpus


def training_rows(
    corpus: PreparedCorpus | StreamedCorpus,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    data_args: DataArguments,
    args: PretrainArguments,
) -> AlignedDocumentRows | ShuffledDocumentRows | StreamedRows:
    """The rows to train on, of `length` tokens."""
    if isinstance(corpus, PreparedCorpus):
        rows = AlignedDocumentRows if data_args.rows == "aligned" else ShuffledDocumentRows
        return rows(corpus.train, length, seed=args.seed)
    return StreamedRows(
        corpus.documents,
        tokenizer,
        length,
        args.max_steps * args.rows_per_step,
        rows_per_batch=args.train_batch_size,
        num_processes=args.world_size,
        process_index=args.process_index,
        seed=args.seed,
        shuffle_characters=data_args.shuffle_characters,
        validation_fraction=data_args.validation_fraction,
        split_seed=data_args.split_seed,
    )


def _train_and_save(documents: Iterable[str], vocab_size: int, length: int, folder: Path) -> None:
    tokenizer = train_tokenizer(documents, vocab_size, model_max_length=length)
    with made_at_once(folder) as work:
        tokenizer.save_pretrained(work)


def build_config(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> MiniGPTConfig:
    """The configuration of a model for this tokenizer."""
    if args.model is not None:
        return _checkpoint_config(args)
    table, ids = padded_vocab_size(tokenizer), num_ids(tokenizer)
    fields = {
        "vocab_size": table,
        "unpadded_vocab_size": ids if ids < table else None,
        "max_position_embeddings": context_length(args),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return preset(args.preset, **(args.overrides() | fields))


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> MiniGPTForCausalLM:
    """The model to train, in float32: the checkpoint to go on from, else a fresh one; it samples when it generates."""
    attention = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if args.model is not None:
        model = load_checkpoint(
            AutoModelForCausalLM, args.model, trust_remote_code=args.trust_remote_code, **attention
        )
    else:
        config = build_config(args, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    assert isinstance(model, MiniGPTForCausalLM)
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def load_checkpoint(
    model_class: type, name_or_path: str, may_be_new: Container[str] = (), **options: Any
) -> MiniGPTForCausalLM:
    """A checkpoint of ours in float32; nothing of it may be missing or of another shape, unless listed.

    Args:
        model_class: an Auto class or a class of ours.
        may_be_new: parameters that may be missing in the checkpoint, and then start afresh.
        options: of `from_pretrained`; fields of the config among them.

    Raises:
        ValueError: a damaged or incomplete checkpoint.
    """
    if Path(name_or_path, MANIFEST).is_file():
        verify_checkpoint(name_or_path)
    remedy = "Its files are damaged or incomplete, or belong to another config.json: get them again."
    try:
        # mismatched ones would be an error that does not name them
        loaded: Any = model_class.from_pretrained(  # type: ignore[attr-defined]
            name_or_path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"model={name_or_path!r} cannot be loaded: {str(error).splitlines()[0]} {remedy}") from error
    model, info = loaded
    # transformers starts these afresh
    missing = [name for name in sorted(info["missing_keys"]) if name not in may_be_new]
    if missing:
        raise ValueError(f"model={name_or_path!r} has no {', '.join(missing)}. {remedy}")
    mismatched = [keys for keys in sorted(info["mismatched_keys"]) if keys[0] not in may_be_new]
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"model={name_or_path!r} has {name} of shape {tuple(found)} where its config.json wants "
            f"{tuple(expected)}. {remedy}"
        )
    return model
