"""The CSV of runs that laws are fitted to."""

from pathlib import Path

from guard import Parser

from megatron_emo.scaling.laws.table import read_run_table

COLUMNS = {"params": "N", "tokens": "D", "loss": "loss"}


def parse(data: bytes, folder: Path) -> None:
    path = folder / "runs.csv"
    path.write_bytes(data)
    read_run_table(path, COLUMNS)


def seeds() -> list[bytes]:
    return [b"N,D,loss\n1e6,1e8,3.5\n2e6,2e8,3.25\n4e6,4e8,3.0\n"]


PARSER = Parser(
    parse,
    seeds,
    (
        b'"',
        b"nan",
        b"inf",
        b"-1",
        b"1e-999",
        b"1e308",
        b"\0",
        b"x" * 140_000,
        b"\xff",
        b",",
        b"1_0",
        b"\r",
    ),
)
