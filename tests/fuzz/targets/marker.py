"""The marker that requeue logic reads."""

from pathlib import Path

from guard import Parser

from megatron_emo.launch.markers import State, read_marker


def parse(data: bytes, folder: Path) -> None:
    for state in State:
        (folder / state.value).write_bytes(data)
    read_marker(folder)


def seeds() -> list[bytes]:
    return [
        b'{"iteration": 3, "time": "2026-01-01T00:00:00Z", "signal": "SIGTERM", "exit_code": 75}'
    ]


PARSER = Parser(
    parse, seeds, (b"null", b"[]", b'"x"', b"1e999", b"[" * 3000, b"\xff", b"-1", b"{}")
)
