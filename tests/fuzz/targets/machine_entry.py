"""A machine's entry that `estimate --measure --save-device` wrote."""

import json
from pathlib import Path

from guard import Parser

from megatron_emo.foreign_files import read_json_object
from megatron_emo.scaling.speed.cluster_measure import SCHEMA, cluster_from_entry

RATES = {"flops": 5e10, "bandwidth": 1e10, "start_s": 1e-5}
LINK = {"latency": 1e-4, "bandwidth": 1e9, "shares": {"send": 0.5}}
ENTRY = {
    **{"schema": SCHEMA, "kind": "cpu", "name": "CPU", "backend": "gloo", "date": "2026-01-01"},
    **{"threads": 1, "cores": 2, "memory": None, "alone": RATES, "together": RATES, "link": LINK},
    "ranks_per_node": 2,
}


def parse(data: bytes, folder: Path) -> None:
    path = folder / "device.json"
    path.write_bytes(data)
    cluster_from_entry(read_json_object(path)).of_ranks(2).product(64, 64, 64)


PARSER = Parser(
    parse,
    lambda: [json.dumps(ENTRY).encode(), json.dumps({**ENTRY, "kind": "cuda"}).encode()],
    (b"NaN", b"1e999", b"9" * 400, b"null", b"true", b"-1", b"0", b"{}", b"[[[[", b'"cuda"'),
)
