"""What a throughput study wrote, as `pictures` reads it."""

import json
from pathlib import Path

from guard import Parser

from megatron_emo.scaling.pictures.throughput import draw_throughput, read_throughput

ROWS = [
    {
        **{"label": "tp", "gpus": gpus, "tokens_per_s_per_gpu": 90.0 / gpus},
        **{"efficiency": 1 / gpus, "tokens_per_s_per_gpu_low": 80.0, "device": "CPU"},
    }
    for gpus in (1, 2)
]


def parse(data: bytes, folder: Path) -> None:
    path = folder / "throughput.json"
    path.write_bytes(data)
    draw_throughput(read_throughput(path))


PARSER = Parser(
    parse,
    lambda: [json.dumps({"rows": ROWS, "failed": ["a"]}).encode(), json.dumps(ROWS).encode()],
    (
        b"NaN",
        b"1e999",
        b"9" * 400,
        b"null",
        b"true",
        b"{}",
        b"[[[[",
        b'"objective"',
        b'"tokens_per_s_per_gpu_high"',
        b'"device"',
    ),
)
