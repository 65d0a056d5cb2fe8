"""The result that a finished run leaves for its study."""

import json
from pathlib import Path

from guard import Parser

from megatron_emo.launch.run_result import read_result

SOUND = {
    **{"name": "mle_s1_0123", "hash": "0123", "iteration": 8, "samples": 32, "tokens": 512},
    **{"seconds": 1.5, "gpu_hours": 0.0004, "starts": 2, "ranks": 1, "device": "CPU", "format": 1},
    **{"objective": "mle", "lm_loss": 2.5, "versions": {"torch": "2.13"}, "commit": ""},
}


def parse(data: bytes, folder: Path) -> None:
    path = folder / "result.json"
    path.write_bytes(data)
    read_result(path, hash="0123", iteration=8)


PARSER = Parser(
    parse,
    lambda: [json.dumps(SOUND).encode()],
    (b"NaN", b"-Infinity", b"1e999", b"9" * 40, b"null", b"true", b"[[[[", b'"ranks"'),
)
