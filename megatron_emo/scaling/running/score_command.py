"""Score every finished run of a study on the same held-out documents, and tabulate them.

python tools/scaling_study.py score --output runs/study --held-out held_out.jsonl

Each run's last checkpoint is exported to a Hugging Face folder (removed afterwards) and scored by
the code of `evaluate.py perplexity`: nats per token of every document, whatever the objective was.
Writes runs/NAME/score.json and documents.jsonl, and OUTPUT/runs.csv, a row a run, which `fit`,
`compare` and `pictures` take as it is. What is scored with the same text, checkpoint and settings
is not scored again.

That the held-out text is not in the training data is yours to see to: refused is the file that
the training's prefix was made from, where their names tell.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from megatron_emo.evaluation.commands.perplexity import (
    add_model_arguments,
    add_seed_arguments,
    add_window_arguments,
)
from megatron_emo.evaluation.records import Record
from megatron_emo.scaling.plans.study_settings import DataSettings
from megatron_emo.scaling.running.finished_runs import FinishedRun, Unfinished, read_finished
from megatron_emo.scaling.running.score import (
    BITS,
    LOSS,
    ScoreSettings,
    hash_held_out,
    read_held_out,
    read_score,
    score_run,
)
from megatron_emo.scaling.running.score_table import make_row, write_table
from megatron_emo.scaling.running.study_files import take_lock
from megatron_emo.scaling.running.study_folder import read_manifest
from megatron_emo.study.scaling.columns import compare_columns, fit_columns

MAX_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="the folder that `run` filled")
    add(
        "--held-out",
        type=Path,
        metavar="FILE",
        help=".jsonl, .json, or a document a line (default: the plan's data.held_out)",
    )
    add("--field", default="text", help="the text in a JSON object (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="take the first N documents (default: all)")
    add_window_arguments(parser)
    add_seed_arguments(parser)
    add_model_arguments(parser)
    # Training saw no beginning token: a document's first token has nothing before it.
    parser.set_defaults(prefix="none")
    add("--keep", action="store_true", help="leave the exported folders runs/NAME/hf")
    add(
        "--partial",
        action="store_true",
        help="score and tabulate what is finished, and say what is missing (default: every "
        "planned run must be there)",
    )
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: %(default)s)")


def run(args: argparse.Namespace) -> list[dict]:
    """Score what is not scored, write runs.csv, and return its rows.

    Raises:
        ValueError: flags out of range, another scoring at work in the folder, planned runs without
            a result or a score (with --partial: all of them).
        FileNotFoundError: no such held-out file.
    """
    if args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
    manifest = read_manifest(args.output)
    if manifest is None:
        raise ValueError(f"--output {args.output}: expected the folder of `run`, got no manifest")
    settings = _read_settings(args, manifest)
    runs, missing = _find_runs(args.output, manifest["runs"])
    if missing and not (args.partial and runs):
        raise ValueError(_format_missing(missing, len(manifest["runs"])))
    with _lock(args.output / ".score.lock"):
        scores, failed = _score_all(runs, settings, args.jobs)
        if failed and not (args.partial and scores):
            raise ValueError(_format_missing([*missing, *failed], len(manifest["runs"])))
        rows = [make_row(one, scores[one.name], args.output) for one in runs if one.name in scores]
        write_table(args.output / "runs.csv", rows)
    if missing or failed:
        print(_format_missing([*missing, *failed], len(manifest["runs"])), file=sys.stderr)
    print(_format_end(args.output / "runs.csv", rows))
    return rows


def _read_settings(args: argparse.Namespace, manifest: Mapping[str, Any]) -> ScoreSettings:
    data = manifest["data"]
    held_out = args.held_out or (data["held_out"] and Path(data["held_out"]))
    if not held_out:
        raise ValueError("--held-out: expected a file, or data.held_out in the plan, got neither")
    check_not_trained_on(held_out, DataSettings(path=tuple(data["path"])).prefixes)
    model = data["tokenizer_model"]
    names = ("field", "limit", "window", "stride", "prefix", "dtype", "device", "batch_tokens")
    settings = ScoreSettings(
        held_out.resolve(),
        **{name: getattr(args, name) for name in names},
        # Where the study's folder was moved to, the paths that its checkpoints note may be gone.
        tokenizer=model if model and Path(model).exists() else None,
        draws=args.bootstrap,
        seed=args.seed,
        keep=args.keep,
    )
    read_held_out(settings)
    return settings


def check_not_trained_on(held_out: Path, prefixes: Sequence[str]) -> None:
    """Raise ValueError where a training prefix is FILE_text_document of held-out FILE.jsonl."""
    for prefix in map(Path, prefixes):
        source = prefix.name.removesuffix("_document").rpartition("_")[0] or prefix.name
        if source == held_out.stem and prefix.resolve().parent == held_out.resolve().parent:
            raise ValueError(
                f"--held-out {held_out}: expected a text that training does not see, got the one "
                f"of data.path {prefix}"
            )


def _find_runs(
    output: Path, entries: Sequence[Mapping[str, Any]]
) -> tuple[list[FinishedRun], list[str]]:
    """Return the finished runs, and why the others are none."""
    runs, missing = [], []
    for entry in entries:
        try:
            runs.append(read_finished(output, entry))
        except Unfinished as reason:
            missing.append(str(reason))
    return runs, missing


def _format_missing(reasons: Sequence[str], planned: int) -> str:
    lines = [f"{len(reasons)} of {planned} planned runs are missing (--partial goes without them)"]
    lines += [f"  {reason}" for reason in reasons[:MAX_SHOWN]]
    if len(reasons) > MAX_SHOWN:
        lines.append(f"  and {len(reasons) - MAX_SHOWN} more")
    return "\n".join(lines)


def _format_end(path: Path, rows: Sequence[dict]) -> str:
    tool = f"python tools/scaling_study.py {{}} --csv {path} --columns {{}}"
    return "\n".join(
        [
            f"{path}: {len(rows)} runs",
            tool.format("fit", fit_columns(rows))
            + f" --where label={rows[0]['label']} --approach 3",
            tool.format("compare", compare_columns(rows)),
        ]
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = take_lock(path)
    if descriptor is None:
        raise ValueError(f"--output {path.parent}: another scoring is at work here")
    try:
        yield
    finally:
        os.close(descriptor)


def _score_all(
    runs: Sequence[FinishedRun], settings: ScoreSettings, jobs: int
) -> tuple[dict[str, list[Record]], list[str]]:
    """Return the records of each run that is scored, and why others are not."""
    scores, failed, waiting = {}, [], []
    for one in runs:
        records = read_score(one, settings.recipe(one, hash_held_out(settings.held_out)))
        if records is None:
            waiting.append(one)
        else:
            scores[one.name] = records
    print(f"{len(waiting)} runs to score, {len(scores)} are scored", flush=True)
    begun = time.monotonic()
    for count, (name, records, error) in enumerate(_score_each(waiting, settings, jobs), 1):
        left = (time.monotonic() - begun) * (len(waiting) - count) / count
        if error:
            failed.append(error)
            text = error
        else:
            scores[name] = records
            text = _format_score(name, records)
        print(f"[{count}/{len(waiting)}] {text}, about {left:.0f} s left", flush=True)
    return scores, failed


def _format_score(name: str, records: Sequence[Record]) -> str:
    by_metric = {record.metric: record for record in records}
    loss, bits = by_metric[LOSS], by_metric[BITS]
    return (
        f"{name}: {loss.value:.4f} nats/token, {bits.value:.4f} bits/byte of {loss.n:,} tokens "
        f"in {loss.seconds:.1f} s"
    )


def _score_each(
    runs: Sequence[FinishedRun], settings: ScoreSettings, jobs: int
) -> Iterator[tuple[str, list[Record], str]]:
    """Yield (name, records, error) as they come."""
    if jobs == 1 or len(runs) < 2:
        _hide_bars()
        yield from (_try_score(one, settings) for one in runs)
        return
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, len(runs))
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin_worker, initargs=(threads,)
    ) as pool:
        futures = [pool.submit(_try_score, one, settings) for one in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _hide_bars()
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # Else a worker of a killed command would write beside the next one's.
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _hide_bars() -> None:
    """A model of these is loaded in no time, and a bar for each would hide the lines about runs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _try_score(run: FinishedRun, settings: ScoreSettings) -> tuple[str, list[Record], str]:
    try:
        return run.name, score_run(run, settings), ""
    except ValueError as error:
        return run.name, [], str(error)
