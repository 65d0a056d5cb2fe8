"""The file of a torch_dist checkpoint's tensors, whose honest .metadata says where each lies."""

from pathlib import Path

from guard import Parser

from megatron_emo.torch_dist import TensorReader, read_arguments
from targets.torch_dist_index import checkpoint


def parse(data: bytes, folder: Path) -> None:
    (folder / ".metadata").write_bytes(checkpoint()[0])
    (folder / "__0_0.distcp").write_bytes(data)
    read_arguments(folder)
    reader = TensorReader(folder)
    for key, shape in reader.shapes.items():
        assert tuple(reader.read(key).shape) == shape


def seeds() -> list[bytes]:
    return [checkpoint()[1]]


PARSER = Parser(
    parse, seeds, (b"PK\x03\x04", b"PK\x01\x02", b"ctorch._utils\n", b"\xff\xff\xff\x7f")
)
