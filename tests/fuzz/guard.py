"""A parser at work within bounds: seconds, memory, and the errors that it says it raises."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SECONDS = 5.0
"""Of this process's own time; waiting may last ten times as long, on a machine that is busy."""
BYTES = 1 << 30
"""Address space beyond what the process has when the guard begins."""


class Hang(BaseException):
    """A parser took longer than SECONDS; no parser may catch it."""


def parse_any(attempts: Iterable[Callable[[], object]]) -> None:
    """Call all of them; raise the last ValueError if each raised one."""
    errors, num_accepted = [], 0
    for attempt in attempts:
        try:
            attempt()
            num_accepted += 1
        except ValueError as error:
            errors.append(error)
    if not num_accepted:
        raise errors[-1]


class Parser:
    """What a target gives: bytes of a file in, nothing or an expected error out.

    Args:
        parse: takes the file's bytes and a folder to put them in.
        expected: errors that the parser documents; MemoryError never is.
        seeds: returns small sound files.
        words: pieces that a mutated file may be made of, for grammars.
    """

    def __init__(
        self,
        parse: Callable[[bytes, Path], object],
        seeds: Callable[[], list[bytes]],
        words: tuple[bytes, ...] = (),
        expected: tuple[type[Exception], ...] = (ValueError, OSError),
    ) -> None:
        self.seeds, self.words, self.parse, self._expected = seeds, words, parse, expected

    def __call__(self, data: bytes, folder: Path) -> bool:
        """Return whether the file was accepted; raise what is no expected error."""
        with limited_seconds():
            try:
                self.parse(data, folder)
            except self._expected:
                return False
        return True


@contextlib.contextmanager
def limited_seconds(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Hang in the block after so many seconds; in the main thread alone."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    before_prof = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGPROF, before_prof)


@contextlib.contextmanager
def limited_memory(num_bytes: int = BYTES) -> Iterator[None]:
    """Let this process take so much more address space in the block, then as much as before."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
