"""The YAML of a few-shot task."""

from pathlib import Path

from guard import Parser

from megatron_emo.evaluation.icl_tasks import BUILT_IN, load_task


def parse(data: bytes, folder: Path) -> None:
    path = folder / "task.yaml"
    path.write_bytes(data)
    load_task(str(path))


def seeds() -> list[bytes]:
    return [(BUILT_IN / f"{name}.yaml").read_bytes() for name in ("sst2", "mmlu", "tweet_emotion")]


PARSER = Parser(
    parse,
    seeds,
    (
        *(
            b"!!python/object/apply:os.system [ls]",
            b"&a [*a]",
            b"<<: *a",
            b"2001-01-01",
            b"null",
            b"- ",
        ),
        *(b"{text.__class__}", b"{text:>99999999999}", b"../../x", b"? [", b"1e999", b"0x_"),
    ),
)
