"""common.pt, in which older versions of Megatron kept the arguments."""

import argparse
import io
from pathlib import Path

import torch
from guard import Parser

from megatron_emo.torch_dist import read_arguments


def parse(data: bytes, folder: Path) -> None:
    (folder / "common.pt").write_bytes(data)
    found = read_arguments(folder)
    assert found is None or isinstance(found, argparse.Namespace)


def seeds() -> list[bytes]:
    buffers = []
    for is_zip in (True, False):
        args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, paths=["a", Path("b")])
        torch.save({"args": args}, buffer := io.BytesIO(), _use_new_zipfile_serialization=is_zip)
        buffers.append(buffer.getvalue())
    return buffers


PARSER = Parser(parse, seeds, (b"cos\nsystem\n", b"(Vid\ntR", b"\x8d\xff\xff\xff\x7f\0\0\0\0"))
