"""The YAML of a throughput study, to its cells."""

from pathlib import Path

from guard import Parser

from megatron_emo.scaling.speed.throughput_cells import make_cells
from megatron_emo.scaling.speed.throughput_file import read_study_file

STUDIES = Path(__file__).resolve().parents[3] / "examples" / "scaling"


def parse(data: bytes, folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_bytes(data)
    make_cells(read_study_file(path), skip_impossible=True)


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(STUDIES.glob("throughput_*.yaml"))]


PARSER = Parser(
    parse,
    seeds,
    (
        *(b"&a [*a]", b"<<: *a", b"null", b"- ", b"1e999", b"-1", b"0", b".nan", b".inf", b"true"),
        *(b"99999999999999999999", b"[]", b"{}", b"[1, 1000000000]"),
    ),
)
