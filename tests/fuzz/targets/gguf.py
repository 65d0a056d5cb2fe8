"""What is read of a GGUF file before transformers reads it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from guard import Parser

from megatron_emo.conversion.gguf import _read_pre_tokenizer


def parse(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    _read_pre_tokenizer(path)


def seeds() -> list[bytes]:
    from gguf import GGUFWriter

    with TemporaryDirectory() as folder:
        writer = GGUFWriter(path := Path(folder, "a.gguf"), "llama")
        writer.add_tokenizer_pre("smollm")
        writer.add_context_length(8)
        writer.add_token_list(["a", "bc", "d"])
        writer.add_tensor("output.weight", np.ones((2, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


PARSER = Parser(
    parse,
    seeds,
    (
        b"\xff" * 8,
        b"\x09\0\0\0",
        b"\x08\0\0\0",
        b"\0" * 8,
        b"\xff\xff\xff\x7f\0\0\0\0",
        b"general.alignment",
    ),
)
