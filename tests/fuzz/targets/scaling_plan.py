"""The YAML of a scaling study."""

from pathlib import Path

from guard import Parser

from megatron_emo.scaling.plans.plan_file import read_plan_file

PLANS = Path(__file__).resolve().parents[3] / "examples" / "scaling"


def parse(data: bytes, folder: Path) -> None:
    path = folder / "plan.yaml"
    path.write_bytes(data)
    read_plan_file(path)


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(PLANS.glob("*.yaml"))[:3]] or [b"name: x\n"]


PARSER = Parser(
    parse,
    seeds,
    (
        *(b"!!python/object/apply:os.system [ls]", b"&a [*a]", b"<<: *a", b"null", b"- ", b"1e999"),
        *(b"-1", b"0", b".nan", b".inf", b"true", b"99999999999999999999", b"[]", b"{}"),
    ),
)
