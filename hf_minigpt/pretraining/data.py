"""From flags to the things that a pretraining loop needs: text, tokenizer, model, rows."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..atomic import made_at_once
from ..data.corpora import Documents, ShardedDocuments, load_documents, stream_documents
from ..data.rows import AlignedDocumentRows, ShuffledDocumentRows
from ..data.streaming import StreamedCorpus, StreamedRows, prepare_stream, sample_documents
from ..data.token_store import PreparedCorpus, prepare_corpus
from ..pretraining.arguments import PretrainArguments
from ..tokenization import check_tokenizer_fits, load_tokenizer, train_tokenizer
from ..training.arguments import DataArguments, ModelArguments
from ..training.loading import checkpoint_config, context_length, trained_vocab_size


def check_streaming(data_args: DataArguments, args: PretrainArguments) -> None:
    """Refuse flags that `--streaming` cannot go with, and have the Trainer read its rows in their order."""
    if not data_args.streaming:
        return
    for is_wrong, message in (
        (args.max_steps <= 0, f"max_steps={args.max_steps}: a stream has no length; set --max_steps"),
        (data_args.dataset is None, "dataset=None: the tales need no streaming; name a corpus with --dataset"),
        (data_args.max_examples is not None, "max_examples is not read; set --max_steps, leave out --max_examples"),
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
            split=args.train_split,
            text_column=args.text_column,
            join_sentences=args.join_sentences,
            document_separator=args.document_separator,
        )
    return load_documents(
        args.dataset,
        config_name=args.dataset_config,
        split=args.train_split,
        text_column=args.text_column,
        join_sentences=args.join_sentences,
        document_separator=args.document_separator,
        max_examples=args.max_examples,
    )


def given_tokenizer(args: ModelArguments) -> PreTrainedTokenizerFast:
    """`--tokenizer`, else that of `--model`."""
    source = args.tokenizer or args.model
    assert source is not None
    tokenizer = load_tokenizer(source, model_max_length=context_length(args), trust_remote_code=args.trust_remote_code)
    if args.model is not None:
        check_tokenizer_fits(tokenizer, checkpoint_config(args))
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
