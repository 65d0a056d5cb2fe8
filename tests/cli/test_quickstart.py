"""examples/quickstart as a user runs it, in its SMOKE=1 form."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emo.training_curves import read_scalars

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def run_script(name: str, run_dir: Path, **settings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SMOKE": "1", "RUN_DIR": str(run_dir), "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(QUICKSTART / name)],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=600,
    )


def modified(run_dir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a whole run."""
    run_dir = tmp_path_factory.mktemp("quickstart")
    process = run_script("run_all.sh", run_dir)
    assert process.returncode == 0, process.stdout + process.stderr
    return run_dir, process.stdout


@pytest.mark.slow
def test_every_step_leaves_what_it_promises(finished):
    run_dir, printed = finished
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "EMO-1: the last validation 'lm loss' is" in printed
    for name, iteration in {"mle": "4", "emo": "4", "emo-resumed": "6"}.items():
        tracker = run_dir / name / "checkpoints" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == iteration
    scalars = {name: read_scalars(run_dir / name / "tensorboard") for name in ("mle", "emo")}
    # The same weights and the same batch before the first update.
    assert scalars["mle"]["lm loss"][1] == pytest.approx(scalars["emo"]["lm loss"][1], abs=1e-6)
    assert scalars["emo"]["objective weight"][1] != 1.0


@pytest.mark.slow
def test_the_resumed_run_continues_at_the_saved_iteration(finished):
    resumed = read_scalars(finished[0] / "emo-resumed" / "tensorboard")
    assert list(resumed["lm loss"]) == [5, 6]
    # The cosine has ended at the checkpoint; a schedule of its own would still be decaying.
    assert resumed["learning-rate"] == pytest.approx({5: 3e-4, 6: 3e-4})


@pytest.mark.slow
def test_the_exported_folder_is_a_model_of_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, printed = finished
    assert "weights: 21 tensors" in printed and "logits equal: max difference" in printed
    model = AutoModelForCausalLM.from_pretrained(run_dir / "emo-hf")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "emo-hf")
    assert model.config.vocab_size == len(tokenizer) == 512
    text = (run_dir / "generated.txt").read_text()
    assert text.startswith("Return True if the") and len(text) > len("Return True if the\n")
    assert text in printed


@pytest.mark.slow
def test_an_export_follows_its_checkpoint(finished, tmp_path):
    """A checkpoint that is newer than the folder is exported again, and the text drawn again."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    tracker = run_dir / "emo" / "checkpoints" / "latest_checkpointed_iteration.txt"
    shutil.copytree(run_dir / "emo-resumed", run_dir / "emo", dirs_exist_ok=True)
    tracker.touch()
    files = [run_dir / "emo-hf" / "model.safetensors", run_dir / "generated.txt"]
    weights, written = files[0].read_bytes(), [file.stat().st_mtime_ns for file in files]
    for name in ("07_export.sh", "08_generate.sh"):
        process = run_script(name, run_dir)
        assert process.returncode == 0, process.stderr
        assert "skipped:" not in process.stdout
    assert files[0].read_bytes() != weights
    later = [file.stat().st_mtime_ns for file in files]
    assert later[0] > written[0] and later[1] > later[0]


@pytest.mark.slow
def test_a_second_run_reuses_all_that_is_built(finished):
    run_dir, _ = finished
    before = modified(run_dir)
    process = run_script("run_all.sh", run_dir)
    assert process.returncode == 0
    assert modified(run_dir) == before
    assert process.stdout.count("skipped:") == 10  # three files of step 01, one of each other step


@pytest.mark.slow
def test_a_failing_export_shows_its_log_and_fails(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0] / "emo", run_dir / "emo")
    for piece in run_dir.rglob("*.distcp"):
        piece.unlink()
    process = run_script("07_export.sh", run_dir)
    assert process.returncode != 0
    assert "convert_checkpoint: " in process.stderr
    assert f"[07_export] failed; above are the last lines of {run_dir}/emo-hf.log" in process.stderr
    assert not (run_dir / "emo-hf").exists()


@pytest.mark.slow
def test_a_failing_run_shows_its_log_and_fails(finished):
    run_dir, _ = finished
    process = run_script("02_train_mle.sh", run_dir, TRAIN_ITERS="5", SEED="seven")
    assert process.returncode != 0
    assert "invalid int value: 'seven'" in process.stderr
    assert f"[02_train_mle] failed; above are the last lines of {run_dir}/mle.log" in process.stderr


def test_a_python_that_does_not_run_is_named(tmp_path):
    process = run_script("01_prepare_data.sh", tmp_path, PYTHON="/nowhere/python")
    assert process.returncode != 0
    assert "PYTHON=/nowhere/python: expected" in process.stderr
