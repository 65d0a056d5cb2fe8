"""The manifest of a scaling study's folder."""

import json
from pathlib import Path

from guard import Parser

from megatron_emo.scaling.running.run_states import observe
from megatron_emo.scaling.running.study_folder import read_manifest

ENTRY = {
    **{"name": "mle_s1_0123", "hash": "0123", "index": 0, "tokens": 512, "steps": 8},
    **{"flops": 1000, "loss_flops": 10, "config": {"steps": 8, "batch": 4}},
}


def parse(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    for entry in read_manifest(folder)["runs"]:
        observe(folder, entry)


PARSER = Parser(
    parse,
    lambda: [json.dumps({"format": 1, "plan_sha256": "", "data": {}, "runs": [ENTRY]}).encode()],
    (b'"../../x"', b'"/x"', b"null", b"1e999", b"[]", b"{}", b"[[[[", b'"\\u0000"', b'"config"'),
)
