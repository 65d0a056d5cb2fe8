"""What `tools/check_checkpoint.py` does: say of each checkpoint whether it is whole."""

from __future__ import annotations

from pathlib import Path

from megatron_emo.checkpoints.choice import RunFolder, describe
from megatron_emo.checkpoints.tracker import RELEASE, folder_of
from megatron_emo.checkpoints.whole import inspect
from megatron_emo.torch_dist import TRACKER


def verify(folder: str | Path, reads_all: bool = True) -> bool:
    """Print what is wrong with a checkpoint, or with those of a run's folder; True if nothing is.

    A run's folder is as good as the checkpoint that its tracker names; of the others is said what
    they are.
    """
    folder = Path(folder)
    if not folder.is_dir():
        print(f"{folder}: no such folder")
        return False
    run = RunFolder.read(folder)
    if run.tracker is None and run.tracker_problem is None and not run.iterations:
        if not any(folder.glob("*.distcp")) and not (folder / ".metadata").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            print(f"{folder}: expected a run's --save folder or one of its iter_*, found {found}")
            return False
        return _print_one(folder, reads_all, "")
    named = [run.tracker] if run.tracker == RELEASE else []
    listed = [*named, *run.iterations]
    whole = {
        latest: _print_one(
            folder_of(folder, latest), reads_all, " (latest)" if latest == run.tracker else ""
        )
        for latest in listed
    }
    if run.tracker is None:
        print(run.tracker_problem or f"{folder}: no {TRACKER}")
        return False
    if run.tracker not in whole:
        print(f"{folder_of(folder, run.tracker)} (latest): no such folder")
    return whole.get(run.tracker, False)


def _print_one(folder: Path, reads_all: bool, note: str) -> bool:
    found = inspect(folder, exchange=lambda value: [value], rank=0, reads_all=reads_all)
    print(f"{folder}{note}: {describe(found.problems) or 'whole'}", flush=True)
    return not found.problems
