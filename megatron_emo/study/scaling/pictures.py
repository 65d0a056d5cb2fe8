"""A study's pictures and its page.

python -m megatron_emo.study.scaling.pictures --study runs/scaling/wikitext/study

Writes STUDY/pictures and STUDY/report.html; where the runs suffice for no picture at all, both say
why instead.
"""

from __future__ import annotations

import argparse
import html
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_emo.study.scaling.laws import run_tool

_REPORT = Path(__file__).resolve().parents[3] / "tools" / "report.py"


def write_page(study: Path, draws: int) -> None:
    """Draw the pictures and make the page of them.

    Raises:
        RuntimeError: a tool failed in another way than by refusing.
    """
    folder, page = study / "pictures", study / "report.html"
    shutil.rmtree(folder, ignore_errors=True)
    flags = ("pictures", "--csv", str(study / "runs.csv"), "--output", str(folder))
    if refused := run_tool((*flags, "--bootstrap", str(draws))):
        print(refused)
        folder.mkdir()
        (folder / "refused.txt").write_text(refused + "\n", encoding="utf-8")
        page.write_text(f"<pre>{html.escape(refused)}</pre>\n", encoding="utf-8")
        return
    command = (sys.executable, str(_REPORT), "--study", str(study), "--html", str(page))
    done = subprocess.run(command, capture_output=True, text=True)  # nosec B603
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{_REPORT.name}: exit code {done.returncode}\n{done.stderr}")


def main(argv: list[str] | None = None) -> None:
    """Write pictures and page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, required=True, metavar="DIR", help="with runs.csv")
    parser.add_argument(
        "--bootstrap", type=int, default=200, metavar="N", help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        write_page(args.study, args.bootstrap)
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"pictures: {error}") from error


if __name__ == "__main__":
    main()
