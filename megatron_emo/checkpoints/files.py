"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: str | Path, data: bytes) -> None:
    """Write `data` beside `path`, to the disk, and rename it there.

    Whoever reads `path`, at whatever moment this process or its machine stops, finds the former
    content or all of the new one. A part left behind is overwritten by the next write.

    Raises:
        OSError: the former content is then still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems have no fsync of folders
        pass
    finally:
        os.close(descriptor)
