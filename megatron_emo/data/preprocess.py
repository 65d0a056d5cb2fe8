"""Text to Megatron's indexed data sets: one .bin/.idx pair per JSON key."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_emo.data.documents import DocumentError, DocumentReader, InputFormat, expand_inputs
from megatron_emo.data.encode import (
    EncodedBatch,
    Encoder,
    EncoderOptions,
    encode_batches,
    start_fork_server,
)
from megatron_emo.data.files import IndexedDatasetWriter, refuse_existing
from megatron_emo.data.megatron_tokenizer import TokenizerOptions

ON_ERROR = ("fail", "skip")
_SHOWN_ERRORS = 10
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessConfig:
    """What `preprocess` is to do; every field is a flag of tools/preprocess_data.py."""

    input: Sequence[str]
    """JSON lines or text files, or glob patterns; .gz is read as well."""
    output_prefix: str
    """The files are {output_prefix}_{key}_document.bin and .idx."""
    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    input_format: InputFormat = field(default_factory=InputFormat)
    append_eod: bool = False
    """End every document with the tokenizer's end-of-document id."""
    workers: int = 1
    """Tokenizing processes; 1 is this process alone."""
    log_interval: int = 1000
    """Documents between progress lines."""
    on_error: str = "fail"
    """fail: stop at the first unusable document, leaving no output; skip: count it and go on."""
    max_documents: int | None = None
    """Read no more documents than this."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"--on-error {self.on_error}: expected one of {ON_ERROR}")
        for name in ("workers", "log_interval", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        if len(set(self.json_keys)) != len(self.json_keys):
            raise ValueError(f"--json-keys {' '.join(self.json_keys)}: a key is named twice")

    def prefixes(self) -> list[str]:
        """Return the pairs' paths without suffix, one per key: what --data-path wants."""
        return [f"{self.output_prefix}_{key}_document" for key in self.json_keys]


@dataclass
class PreprocessSummary:
    """Counts of one run of `preprocess`."""

    prefixes: list[str]
    num_documents: int = 0
    """Documents written."""
    num_tokens: list[int] = field(default_factory=list)
    """Tokens written, per key."""
    num_empty: int = 0
    """Documents left out because a key's text was empty."""
    num_skipped: int = 0
    """Unusable documents left out (on_error "skip")."""
    num_empty_files: int = 0
    num_bytes: int = 0
    """Input bytes, decompressed, JSON around the text included."""
    seconds: float = 0.0
    """Reading, tokenizing and writing, without the start-up."""


def preprocess(config: PreprocessConfig) -> PreprocessSummary:
    """Tokenize the input into one .bin/.idx pair per key, and return the counts.

    The pairs appear complete and at the end, or not at all. Progress and warnings are logged.

    Raises:
        DocumentError: for an unusable document (`FILE:LINE: ...`), unless on_error is "skip".
        ValueError: for flags that do not fit, and input without any document.
        OSError: if a file cannot be read or written (a full disk; an output that exists).
        RuntimeError: if a worker dies.
    """
    paths = expand_inputs(config.input)
    prefixes = config.prefixes()
    outputs = [Path(prefix + suffix) for prefix in prefixes for suffix in (".bin", ".idx")]
    refuse_existing(outputs, config.overwrite)
    reader = DocumentReader(paths, config.input_format, config.on_error)
    if config.workers > 1:
        start_fork_server()
    options = EncoderOptions(config.tokenizer, config.json_keys, config.append_eod)
    encoder = Encoder(options)
    with contextlib.ExitStack() as cleanup:
        writers = []
        for prefix in prefixes:
            writers.append(IndexedDatasetWriter(prefix, encoder.dtype))
            cleanup.callback(writers[-1].discard)
        summary = _write_documents(config, options, encoder, reader, writers)
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
    return summary


def _write_documents(
    config: PreprocessConfig,
    options: EncoderOptions,
    encoder: Encoder,
    reader: DocumentReader,
    writers: Sequence[IndexedDatasetWriter],
) -> PreprocessSummary:
    summary = PreprocessSummary(config.prefixes(), num_tokens=[0] * len(writers))
    progress = _Progress(reader, config.log_interval)
    documents = itertools.islice(reader, config.max_documents)
    # Closed at once when a document is refused, for the pool to end before the error is seen.
    with contextlib.closing(encode_batches(documents, encoder, options, config.workers)) as batches:
        for batch in batches:
            if batch.errors and config.on_error == "fail":
                raise DocumentError(batch.errors[0])
            _report_left_out(batch, summary)
            for tokens in batch.documents:
                for index, writer in enumerate(writers):
                    writer.add_document(tokens[index])
                    summary.num_tokens[index] += len(tokens[index])
            summary.num_documents += len(batch.documents)
            summary.num_bytes += batch.num_bytes
            progress.update(batch.num_documents, summary)
    summary.seconds = progress.seconds()
    summary.num_empty_files = len(reader.empty_files)
    if summary.num_documents == 0:
        raise ValueError(
            f"--input {' '.join(config.input)}: no document to write "
            f"({summary.num_empty} empty, {summary.num_skipped} skipped)"
        )
    return summary


def _report_left_out(batch: EncodedBatch, summary: PreprocessSummary) -> None:
    for error in batch.errors:
        summary.num_skipped += 1
        if summary.num_skipped <= _SHOWN_ERRORS:
            logger.warning("skipped: %s", error)
        elif summary.num_skipped == _SHOWN_ERRORS + 1:
            logger.warning("skipped: more documents, counted at the end")
    if batch.empty and summary.num_empty == 0:
        logger.warning("%s: empty document left out; others are only counted", batch.empty[0])
    summary.num_empty += len(batch.empty)


class _Progress:
    """Logs a line each time `log_interval` more documents have been read."""

    def __init__(self, reader: DocumentReader, log_interval: int) -> None:
        self._reader, self._log_interval = reader, log_interval
        self._start = time.monotonic()
        self._num_read = 0

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def update(self, num_documents: int, summary: PreprocessSummary) -> None:
        before, self._num_read = self._num_read, self._num_read + num_documents
        if before // self._log_interval == self._num_read // self._log_interval:
            return
        seconds = max(self.seconds(), 1e-9)
        # Batches in flight were read but not encoded yet: the estimate is a little early.
        share = max(self._reader.bytes_read, 1) / max(self._reader.total_bytes, 1)
        remaining = max(seconds / share - seconds, 0)
        logger.info(
            "%d documents | %.0f%% | %.2f MB/s | %.0f tokens/s | ETA %dm%02ds",
            self._num_read,
            100 * share,
            summary.num_bytes / 1e6 / seconds,
            sum(summary.num_tokens) / seconds,
            *divmod(round(remaining), 60),
        )
