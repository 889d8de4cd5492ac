"""Prepares the data of pretraining: documents, tokenizer, token store and training rows."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..atomic import atomic_folder
from ..data.corpora import Documents, ShardedDocuments, load_documents, stream_documents
from ..data.rows import AlignedDocumentRows, ShuffledDocumentRows
from ..data.streaming import StreamedCorpus, StreamedRows, prepare_stream, sample_documents
from ..data.token_store import PreparedCorpus, prepare_corpus
from ..tokenization import check_tokenizer_fits, load_tokenizer, train_tokenizer
from ..training.arguments import DataArguments, ModelArguments
from ..training.loading import checkpoint_config, context_length, trained_vocab_size
from .arguments import PretrainArguments


def check_streaming(data_args: DataArguments, args: PretrainArguments) -> None:
    """Check that the flags allow `--streaming`, and set the Trainer to read the rows in order.

    Raises:
        ValueError: for a flag that conflicts with `--streaming`.
    """
    if not data_args.streaming:
        return
    for is_wrong, message in (
        (args.max_steps <= 0, f"max_steps={args.max_steps}, but a stream has no length. Set --max_steps"),
        (data_args.dataset is None, "dataset=None. The embedded tales cannot be streamed. Set --dataset"),
        (
            data_args.max_examples is not None,
            f"max_examples={data_args.max_examples}. Set --max_steps and remove --max_examples",
        ),
        (
            args.dataloader_num_workers > 0,
            f"dataloader_num_workers={args.dataloader_num_workers}. Threads tokenize the stream. Remove this flag",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True, which would lose the position in the stream. Remove this flag",
        ),
    ):
        if is_wrong:
            raise ValueError(f"streaming=True conflicts with {message}.")
    args.train_sampling_strategy = "sequential"


def open_documents(args: DataArguments) -> Documents | ShardedDocuments:
    """Open the dataset of the flags."""
    options: dict[str, Any] = {
        "config_name": args.dataset_config,
        "split": args.train_split,
        "text_column": args.text_column,
        "join_sentences": args.join_sentences,
        "document_separator": args.document_separator,
    }
    if args.streaming:
        assert args.dataset is not None
        return stream_documents(args.dataset, **options)
    return load_documents(args.dataset, **options, max_examples=args.max_examples)


def given_tokenizer(args: ModelArguments) -> PreTrainedTokenizerFast:
    """Load the tokenizer of `--tokenizer`, or else of `--model`."""
    source = args.tokenizer or args.model
    assert source is not None
    tokenizer = load_tokenizer(source, model_max_length=context_length(args), trust_remote_code=args.trust_remote_code)
    if args.model is not None:
        check_tokenizer_fits(tokenizer, checkpoint_config(args))
    return tokenizer


def prepare_tokenizer(args: ModelArguments, data_args: DataArguments, documents: Documents) -> PreTrainedTokenizerFast:
    """Load the tokenizer of `--tokenizer` or `--model`, or else train one on the documents and cache it."""
    if args.tokenizer or args.model:
        return given_tokenizer(args)
    length = context_length(args)
    vocab_size = trained_vocab_size(args, data_args)
    # The leading number is the version of the training: 2 prepends end-of-text to a text.
    key = hashlib.blake2b(f"2 {documents.fingerprint} {vocab_size}".encode(), digest_size=16).hexdigest()
    folder = Path(data_args.cache_dir) / "tokenizers" / key
    if not folder.is_dir():
        _train_and_save(documents, vocab_size, length, folder)
    return load_tokenizer(folder, model_max_length=length)


def prepare_data(
    args: ModelArguments, data_args: DataArguments, documents: Documents | ShardedDocuments
) -> tuple[PreTrainedTokenizerFast, PreparedCorpus | StreamedCorpus]:
    """Return the tokenizer and the tokenized corpus, from the cache if it has them.

    Of a stream, only the held-out part is tokenized. Call it in the main process first (`main_process_first`): the
    other processes then read the cache.
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
    """Return the training rows, of `length` tokens each."""
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
    with atomic_folder(folder) as work:
        tokenizer.save_pretrained(work)
