"""A study's Slurm array on a real two-node Slurm, with a stand-in for training."""

from __future__ import annotations

import pytest
from clusters import text_of, wait_for
from scaling_studies import Study

from megatron_emo.scaling.running.run_states import read_state


@pytest.mark.slow
def test_an_array_trains_its_shards_and_goes_on_after_a_preemption(slurm, tmp_path, monkeypatch):
    study = Study(tmp_path)
    for name, value in study.env.items():
        monkeypatch.setenv(name, value)
    study.run("--write-only")
    study.rule("mle", "holds", "7")
    study.rule("emo1", "holds", "7")
    words = ("sbatch", "--parsable", "--array", "0-1", "--nodes", "1", "--time", "20")
    job = slurm.run(*words, str(study.output / "array.sbatch"), **study.env).strip()
    outputs = [study.output / f"slurm-{job}_{i}.out" for i in (0, 1)]

    def both_train():
        return len(study.starts()) == 2

    wait_for(both_train, 90, "both tasks")
    slurm.run("scancel", "--signal=TERM", job)
    saved = [
        study.run_folder(f"{label}_a") / "train/checkpoints/saved" for label in ("mle", "emo1")
    ]
    wait_for(lambda: all(file.exists() for file in saved), 60, "checkpoints")
    for label in ("mle", "emo1"):
        (study.rules / f"{label}_holds").unlink()

    def all_are_done():
        return all(read_state(study.run_folder(e["name"])).state == "done" for e in study.entries)

    try:
        wait_for(all_are_done, 240, "all runs")
    finally:
        print("".join(map(text_of, outputs)))
    study.assert_all_done_once()
    starts = list(study.starts().values())
    assert sorted(map(len, starts)) == [1, 1, 2, 2]
    assert [found for found in starts if len(found) == 2] == [[0, 8], [0, 8]]
