"""A checkpoint folder's manifest and tracker, at a glance."""

import json
from pathlib import Path

from guard import Parser, parse_any

from megatron_emo.checkpoints.tracker import read_tracker
from megatron_emo.checkpoints.whole import glance
from targets.torch_dist_index import checkpoint

SHARD = "__0_0.distcp"


def parse(data: bytes, folder: Path) -> None:
    index, shard = checkpoint()
    inner = folder / "iter_0000003"
    inner.mkdir(exist_ok=True)
    (inner / ".metadata").write_bytes(index)
    (inner / SHARD).write_bytes(shard)
    (inner / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (inner / "integrity.json").write_bytes(data)
    (folder / "latest_checkpointed_iteration.txt").write_bytes(data[:64])
    parse_any((lambda: glance(inner), lambda: read_tracker(folder)))


def seeds() -> list[bytes]:
    names = (SHARD, ".metadata", "metadata.json")
    content = {"algorithm": "sha256", "files": dict.fromkeys(names, "0" * 64)}
    whole = content | {"bytes": dict.fromkeys(names, 1)}
    return [json.dumps(content).encode(), json.dumps(whole).encode(), b"3", b"release"]


PARSER = Parser(
    parse,
    seeds,
    (
        b"null",
        b"[]",
        b'"../x"',
        b"{}",
        b"-1",
        b"[" * 3000,
        b"\xff",
        b"\xd9\xa3",
        b"9" * 5000,
        b'"files":',
    ),
)
