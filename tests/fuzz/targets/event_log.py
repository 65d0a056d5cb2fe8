"""The event log of a rank, whole and its tail, as a status is made of it."""

import json
from pathlib import Path

from guard import Parser

from megatron_emo.launch.events import read_events, read_last_events
from megatron_emo.launch.status import read_status


def parse(data: bytes, folder: Path) -> None:
    (folder / "events").mkdir(exist_ok=True)
    path = folder / "events" / "rank_00000.jsonl"
    path.write_bytes(data)
    list(read_events(path))
    read_last_events(path, 256)
    read_status(folder)


def seeds() -> list[bytes]:
    step = {"train_iters": 9, "losses": {"lm loss": 5.5}, "learning_rate": 1e-3, "grad_norm": None}
    step |= {"loss_scale": 1.0, "step_ms": 9.5, "work_ms": 8.0, "tokens_per_s": 9.0}
    step |= {"consumed_samples": 8, "skipped": 0, "nan": 0}
    start = {"world_size": 1, "train_iters": 9, "host": "h", "pid": 1, "restart": 0, "save": "s"}
    start |= {"objective": "mle", "cost_embedding": None, "command": ["x"], "environment": {}}
    records = {
        "start": start | {"versions": {}, "layout": {"tp": 1}},
        "step": step,
        "save_end": {"path": "p", "seconds": 0.1, "bytes": 10, "asynchronous": False},
        "fault": {"error": "ValueError", "message": "x", "traceback": "y", "exit_code": 70},
        "end": {"exit_code": 70},
    }
    common = {"time": "2026-01-01T00:00:00.000+00:00", "monotonic": 1.5, "rank": 0, "iteration": 3}
    lines = [json.dumps(common | {"kind": kind} | more) for kind, more in records.items()]
    return ["\n".join([*lines, ""]).encode()]


PARSER = Parser(
    parse,
    seeds,
    (
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"1e999",
        b"NaN",
        b"\n",
        b"-1",
        b"\xff",
        b"[" * 3000,
        b'"kind":"step"',
    ),
)
