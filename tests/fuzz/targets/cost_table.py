"""The cost embedding file: header, hash and a shard of the rows."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from guard import Parser

from megatron_emo.cost_embedding import CostEmbeddingWarning, load_cost_embedding_shard
from megatron_emo.cost_embedding.file import verify_cost_embedding, write_cost_embedding


def parse(data: bytes, folder: Path) -> None:
    path = folder / "table.safetensors"
    path.write_bytes(data)
    info = verify_cost_embedding(path)
    end = min(info.vocab_size, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostEmbeddingWarning)
        load_cost_embedding_shard(
            path, vocab_start_index=0, vocab_end_index=end, vocab_size=info.vocab_size
        )


def seeds() -> list[bytes]:
    found = []
    with TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.bfloat16):
            path = Path(folder, "table.safetensors")
            table = torch.arange(12.0).reshape(4, 3)
            write_cost_embedding(path, table, source="x", tokenizer_fingerprint="", dtype=dtype)
            found.append(path.read_bytes())
    return found


PARSER = Parser(
    parse,
    seeds,
    (b'"vocab_size":"', b'"99999999999"', b'"nan"', b'"dim":"-1"', b"F64", b"[0,48]", b'"True"'),
)
