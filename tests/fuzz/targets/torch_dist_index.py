"""A torch_dist checkpoint's .metadata, with an honest file of tensors beside it."""

import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from guard import Parser

from megatron_emo.torch_dist import TensorReader, read_arguments


@cache
def checkpoint() -> tuple[bytes, bytes]:
    """Return the bytes of .metadata and of the one file of tensors."""
    state = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4),
        "c/shard_0_1": [{"x": 1}],
    }
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)
        (shard,) = Path(folder).glob("*.distcp")
        return Path(folder, ".metadata").read_bytes(), shard.read_bytes()


def parse(data: bytes, folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(checkpoint()[1])
    (folder / ".metadata").write_bytes(data)
    read_arguments(folder)
    reader = TensorReader(folder)
    for key, shape in reader.shapes.items():
        assert tuple(reader.read(key).shape) == shape


def seeds() -> list[bytes]:
    return [checkpoint()[0]]


PARSER = Parser(
    parse,
    seeds,
    (
        *(
            b"ctorch\nSize\n",
            b"cos\nsystem\n",
            b"\x8f",
            b"\x85\x85\x85",
            b"\x8d\xff\xff\xff\x7f\0\0\0\0",
        ),
        *(b"K\x00", b"J\xff\xff\xff\xff", b"../x.distcp", b"(dq\0tR", b"\x93", b"b", b"\x81"),
    ),
)
