"""Processes that end with the one that started them, even where that is killed (Linux).

    python -m megatron_emo.launch.lifetime PARENT COMMAND [WORD ...]

becomes COMMAND, which gets SIGTERM once the process PARENT, its own parent, has ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

PARENT_GONE_CODE = 75
"""As of a run that was stopped and is to be started again."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: signal.Signals, parent: int) -> bool:
    """Have the kernel send this process a signal when the thread that started it ends.

    The setting outlives exec, but is not inherited by children.

    Args:
        parent: id of the process without which this one must not be.

    Returns:
        False where that process has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() == parent:
        return True
    try:
        os.kill(parent, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main(argv: list[str]) -> NoReturn:
    """Become the command; does not return."""
    parent, *command = argv
    if not end_with_parent(signal.SIGTERM, int(parent)) or os.getppid() != int(parent):
        sys.exit(PARENT_GONE_CODE)
    os.execvp(command[0], command)  # nosec B606 # words that its own parent gave, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
