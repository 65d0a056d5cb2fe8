"""An output folder that appears whole or not at all, and can be taken up again when cut off.

Everything is written into a folder beside the target, which is renamed at the end. A journal in it
says which files are finished, with their sizes and hashes, and of what.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_emo.conversion.errors import ConversionError

_JOURNAL = "conversion_journal.json"


class Staging:
    """The folder that becomes `target`.

    Args:
        recipe: what makes the output, in JSON; a staged folder of another recipe is not resumed.

    Raises:
        FileExistsError: a target that is not empty without `overwrite`.
        ConversionError: something to resume that is none, or of another recipe.
    """

    def __init__(
        self, target: Path, recipe: dict[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.target = target.absolute()
        if _is_taken(self.target) and not overwrite:
            raise FileExistsError(
                f"--output {target}: it exists and is not empty; give --overwrite to replace it"
            )
        self.folder = self.target.parent / f"{self.target.name}.partial"
        self._journal: dict[str, Any] = {"recipe": recipe, "files": {}}
        if self.folder.exists():
            self._take_up(recipe, resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_journal()

    def is_finished(self, name: str) -> bool:
        """Return whether a file is there with the size and hash that `write` noted."""
        entry = self._journal["files"].get(name)
        file = self.folder / name
        if entry is None or not file.is_file() or file.stat().st_size != entry["bytes"]:
            return False
        return _sha256(file) == entry["sha256"]

    def notes(self, name: str) -> Any:
        """Return what the function given to `write` returned for a finished file."""
        return self._journal["files"][name]["notes"]

    def write(self, name: str, produce: Callable[[BinaryIO], Any]) -> Any:
        """Let `produce` write a file, note its hash and what it returned (JSON), and return that.

        Raises:
            OSError: as writing does; a full disk names the file.
        """
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as stream:
            hashed = _Hashed(stream)
            try:
                notes = produce(hashed)
            except RuntimeError as error:
                # torch.save hides what the stream raised.
                raise (hashed.error or error) from None
            stream.flush()
            os.fsync(stream.fileno())
        entry = {"bytes": hashed.count, "sha256": hashed.digest.hexdigest(), "notes": notes}
        self._journal["files"][name] = entry
        self._write_journal()
        return notes

    def publish(self) -> None:
        """Make the folder the target; what was there before is gone afterwards."""
        for path in [*self.folder.rglob("*"), self.folder]:
            _sync(path)
        old = self.target.parent / f"{self.target.name}.replaced"
        if self.target.exists():
            if old.exists():  # of a publication that was cut off
                shutil.rmtree(old)
            os.replace(self.target, old)
        os.replace(self.folder, self.target)
        (self.target / _JOURNAL).unlink()
        _sync(self.target.parent)
        if old.exists():
            shutil.rmtree(old)

    def _take_up(self, recipe: dict[str, Any], resume: bool) -> None:
        journal = self.folder / _JOURNAL
        if not journal.is_file():
            raise ConversionError(f"{self.folder}: expected {_JOURNAL} in it; remove the folder")
        if not resume:
            shutil.rmtree(self.folder)
            return
        found = json.loads(journal.read_text())
        if found["recipe"] != json.loads(json.dumps(recipe)):
            changed = [name for name in recipe if found["recipe"].get(name) != recipe[name]]
            raise ConversionError(
                f"--resume: {self.folder} was begun with another {', '.join(changed)}; remove it "
                "or leave --resume away"
            )
        self._journal = found

    def _write_journal(self) -> None:
        new = self.folder / f"{_JOURNAL}.new"
        with open(new, "w") as stream:
            json.dump(self._journal, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, self.folder / _JOURNAL)


class _Hashed:
    """A stream for writing alone that hashes what passes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.count = stream, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.count += size
        return size

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        self._stream.flush()


def _is_taken(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)
