"""Documents to token ids, in this process or in several, in the documents' order."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from megatron_emo.data.documents import DocumentError, RawDocument, decode_document
from megatron_emo.data.megatron_tokenizer import (
    TokenizerOptions,
    build_megatron_tokenizer,
    end_of_document_id,
)
from megatron_emo.data.upstream import import_indexed_dataset

BATCH_DOCUMENTS = 256
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class EncoderOptions:
    """What a worker needs in order to build its Encoder."""

    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False


@dataclass
class EncodedBatch:
    """The tokens of a batch's usable documents, and what was wrong with the others."""

    documents: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Per document, its tokens under each key, in the data set's dtype."""
    errors: list[str] = field(default_factory=list)
    """One `FILE:LINE: ...` per document that cannot be used."""
    empty: list[str] = field(default_factory=list)
    """`FILE:LINE` of each document without a token under one of its keys."""
    num_documents: int = 0
    num_bytes: int = 0
    """Input bytes of all its documents."""


class Encoder:
    """Turns batches of raw documents into tokens; builds the tokenizer, which takes seconds.

    Raises ValueError or FileNotFoundError for tokenizer flags that do not work, and for
    `append_eod` with a tokenizer that has no end-of-document token.
    """

    def __init__(self, options: EncoderOptions) -> None:
        self._keys = tuple(options.json_keys)
        self._tokenizer = build_megatron_tokenizer(options.tokenizer)
        sizes = (self._tokenizer.vocab_size, options.tokenizer.vocab_size)
        self.vocab_size = min(size for size in sizes if size is not None)
        self.dtype = import_indexed_dataset().DType.optimal_dtype(self.vocab_size)
        self._suffix = [end_of_document_id(self._tokenizer)] if options.append_eod else []

    def __call__(self, batch: Sequence[RawDocument]) -> EncodedBatch:
        """Return the batch's tokens. A document with an empty text is left out under every key, so
        that the data sets of several keys stay aligned."""
        encoded = EncodedBatch(num_documents=len(batch))
        for document in batch:
            encoded.num_bytes += len(document.data)
            try:
                tokens = [
                    self._tokens(document, text) for text in decode_document(document, self._keys)
                ]
            except DocumentError as error:
                encoded.errors.append(str(error))
                continue
            if all(len(part) for part in tokens):
                encoded.documents.append(tuple(tokens))
            else:
                encoded.empty.append(document.location)
        return encoded

    def _tokens(self, document: RawDocument, text: str) -> np.ndarray:
        ids = self._tokenizer.tokenize(text) if text else []
        if not ids:
            return np.empty(0, dtype=self.dtype)
        ids = np.array(ids + self._suffix, dtype=np.int64)
        # Here and not in the file's dtype, where 70000 has become 4464.
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            outside = ids[(ids < 0) | (ids >= self.vocab_size)]
            raise DocumentError(
                f"{document.location}: token id {outside[0]} is outside the vocabulary "
                f"[0, {self.vocab_size}); {len(outside)} such ids in the document"
            )
        return ids.astype(self.dtype)


def encode_batches(
    documents: Iterable[RawDocument], encoder: Encoder, options: EncoderOptions, num_workers: int
) -> Iterator[EncodedBatch]:
    """Yield the documents' batches in order, encoded by `encoder` or by `num_workers` processes.

    At most two batches per worker are in flight, so memory does not grow with the corpus.

    Raises:
        RuntimeError: if a worker dies (out of memory, killed); naming the first document at risk.
    """
    batches = _batches(documents)
    if num_workers == 1:
        yield from map(encoder, batches)
        return
    pool = _start_pool(options, num_workers)
    pending: deque[tuple[RawDocument, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            pending.append((batch[0], pool.submit(_encode_in_worker, batch)))
            if len(pending) >= 2 * num_workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    except BrokenProcessPool as error:  # from submit, when a worker died in an earlier batch
        raise _worker_died(pending[0][0] if pending else batch[0]) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_fork_server() -> None:
    """Let the fork server import megatron.core while this process does so too."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["megatron_emo.data.fork_server"]
    )
    multiprocessing.forkserver.ensure_running()


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.data)
        if len(batch) == BATCH_DOCUMENTS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _start_pool(options: EncoderOptions, num_workers: int) -> ProcessPoolExecutor:
    # Not multiprocessing.Pool, which waits for ever for the batch of a worker that was killed;
    # and not fork, which copies this process's threads' locks in whatever state they are.
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(options,)
    )


def _result(first: RawDocument, future: Future[EncodedBatch]) -> EncodedBatch:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _worker_died(first) from error


def _worker_died(first: RawDocument) -> RuntimeError:
    return RuntimeError(
        f"a tokenizer worker died (killed, or out of memory) within the {BATCH_DOCUMENTS} "
        f"documents from {first.location} on, or soon after; try fewer --workers"
    )


_worker_encoder: Encoder | None = None


def _start_worker(options: EncoderOptions) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = Encoder(options)


def _exit_with_parent() -> None:
    """End this worker when the parent is gone: a killed one cannot tell it to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: list[RawDocument]) -> EncodedBatch:
    if _worker_encoder is None:
        raise RuntimeError("a tokenizer worker began without its encoder")
    return _worker_encoder(batch)
