"""Fuzz the parsers with atheris, guided by the coverage of megatron_emo.

python tests/fuzz/run.py --seconds 600                      # every parser, one after the other
python tests/fuzz/run.py --seconds 30 --target cost_table indexed_dataset

Each runs in a process of its own: 1 GiB of address space beyond what its imports take, 5 seconds of
its own time for a file. What breaks a parser is kept as runs/fuzz/TARGET/crash-*; copy it to
tests/corpus/TARGET/ under a name that says what it is, and the suite reads it from then on.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGETS = sorted(path.stem for path in (HERE / "targets").glob("*.py") if path.stem != "__init__")
START_SECONDS = 300
"""That imports may take, beside --seconds."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="for each parser (default: 600)")
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=TARGETS, metavar="NAME", help="default: all"
    )
    parser.add_argument("--output", default=ROOT / "runs" / "fuzz", type=Path, metavar="DIR")
    parser.add_argument("--worker", metavar="DIR", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.worker:
        fuzz(args.target[0], args.seconds, args.output / args.target[0], Path(args.worker))
    broken = []
    for number, target in enumerate(args.target, 1):
        print(f"[{number}/{len(args.target)}] {target}: {args.seconds} s", flush=True)
        if not run_worker(target, args.seconds, args.output):
            broken.append(target)
    print(f"{len(args.target) - len(broken)} of {len(args.target)} parsers unbroken {broken or ''}")
    return 1 if broken else 0


def run_worker(target: str, seconds: int, output: Path) -> bool:
    """Fuzz one parser in a process; return whether it came to its end."""
    folder = output / target
    (folder / "found").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--target", target, "--seconds", str(seconds)]
    start, work = time.monotonic(), _processor_seconds()
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        open(folder / "log.txt", "wb") as log,
        tempfile.TemporaryDirectory(prefix=f"fuzz_{target}_", dir=in_memory) as place,
    ):
        command += ["--worker", place]
        process = subprocess.Popen([*command, "--output", str(output)], stdout=log, stderr=log)
        try:
            code = process.wait(seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    counts = [line for line in lines if line.startswith(("stat::number_of_executed_units", "Done"))]
    took, work = time.monotonic() - start, _processor_seconds() - work
    print(f"    exit {code}, {took:.0f} s, {work:.0f} s of a core, {counts[-1:]}", flush=True)
    if code:
        print("    " + "\n    ".join(lines[-15:]), flush=True)
    return code == 0


def _processor_seconds() -> float:
    """Of the processes that have ended: on a busy machine less than the time that went by."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fuzz(target: str, seconds: int, folder: Path, place: Path) -> None:
    """Fuzz one parser in this process, which libFuzzer ends."""
    import atheris

    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["megatron_emo"]):
        parser = importlib.import_module(f"targets.{target}").PARSER
    from guard import limited_memory

    corpus, words = folder / "found", folder / "words.txt"
    for number, seed in enumerate(parser.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words.write_text("".join(_as_dictionary(word) for word in parser.words if len(word) < 64))
    parser.parse(parser.seeds()[0], place)
    flags = [f"-max_total_time={seconds}", f"-dict={words}", f"-artifact_prefix={folder}/"]
    # The guard's own limits; libFuzzer's are for what hangs or grows beneath Python.
    flags += ["-timeout=60", "-rss_limit_mb=6000", "-print_final_stats=1", "-max_len=65536"]
    known = ROOT / "tests" / "corpus" / target
    folders = [str(path) for path in (corpus, known) if path.is_dir()]
    atheris.Setup([sys.argv[0], *flags, *folders], lambda data: parser(data, place))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with limited_memory():
        atheris.Fuzz()


def _as_dictionary(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'


if __name__ == "__main__":
    sys.exit(main())
