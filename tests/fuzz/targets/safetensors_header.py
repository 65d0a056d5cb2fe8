"""The header of a model's safetensors file, and its tensors."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from guard import Parser
from safetensors.torch import save_file

from megatron_emo.conversion.safetensors_io import DTYPES, read_header, read_tensor
from megatron_emo.cost_embedding.sources import table_from_safetensors


def parse(data: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    total = 0
    for stored in read_header(path).values():
        if stored.dtype in DTYPES:
            total += read_tensor(stored).nbytes
    assert total <= len(data)
    table_from_safetensors(f"{path}:a")


def seeds() -> list[bytes]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a")
        save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
        both = path.read_bytes()
        save_file({"a": torch.ones(2, 3)}, path, {"format": "pt"})
        return [both, path.read_bytes()]


PARSER = Parser(
    parse,
    seeds,
    (
        b'"shape":[',
        b'"data_offsets":[0,',
        b"-1",
        b"9999999999999",
        b"[[[[[[",
        b'"F64"',
        b"1e3",
        b"true",
    ),
)
