"""Output files of which a reader sees the old version, the new one or none, but never a part."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megatron_emo.data.upstream import import_indexed_dataset

TEMPORARY_SUFFIX = ".tmp"


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raise FileExistsError for the first path that exists, unless `overwrite` is set."""
    for path in paths:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; pass --overwrite to replace it")


@contextlib.contextmanager
def name_path_on_error(path: Path) -> Iterator[None]:
    """Turn an OSError without a file name (a full disk says none) into one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends, and vanishes if it raises.

    Makes missing parent folders. Raises OSError naming `path` if it cannot be written, and
    FileExistsError if another process is writing it.
    """
    temporary = _temporary_path(path)
    handle = _claim(temporary)
    try:
        with name_path_on_error(path), handle:
            handle.truncate(0)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class IndexedDatasetWriter:
    """Writes `{prefix}.bin` and `{prefix}.idx` beside their place, then moves both into it.

    Call `add_document` for each document, `finish` when all went well, then `publish`; or
    `discard` at any time, which leaves an older pair as it was. A writer holds a lock on its
    temporary file: a second one for the same prefix raises FileExistsError.

    Args:
        prefix: path of the pair without suffix; missing parent folders are made.
        dtype: token type, as `DType.optimal_dtype(vocab_size)` chooses it.
    """

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._bin_temporary = _temporary_path(self.bin_path)
        self._idx_temporary = _temporary_path(self.idx_path)
        builder_class = import_indexed_dataset().IndexedDatasetBuilder
        self._lock = _claim(self._bin_temporary)
        self._builder = builder_class(str(self._bin_temporary), dtype=dtype)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document of one sequence. `tokens` [n] must fit the writer's dtype."""
        with name_path_on_error(self.bin_path):
            self._builder.add_document(tokens, [len(tokens)])

    def finish(self) -> None:
        """Write the index and flush both temporary files to disk; their names do not change yet."""
        with name_path_on_error(self.idx_path):
            self._builder.finalize(str(self._idx_temporary))
            for path in (self._bin_temporary, self._idx_temporary):
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())

    def publish(self) -> None:
        """Give both files their names.

        The old index goes first and the new one comes last: killed at any point, this leaves a
        whole pair or a .bin that no reader opens, never one run's .bin under another's .idx.
        """
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._bin_temporary, self.bin_path)
        os.replace(self._idx_temporary, self.idx_path)
        self._lock.close()

    def discard(self) -> None:
        """Remove the temporary files; nothing happens to files that were published."""
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
            self._builder.data_file.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)
        self._lock.close()


def _temporary_path(path: Path) -> Path:
    # One fixed name: what a killed run leaves is overwritten by the next, not piled up.
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def _claim(path: Path) -> IO[bytes]:
    """Open `path` for writing under an exclusive lock, which ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = path.open("ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise FileExistsError(f"{path} is being written by another process") from None
        except OSError:  # a file system without locks
            return handle
        # The holder before us may have renamed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            return handle
        handle.close()
