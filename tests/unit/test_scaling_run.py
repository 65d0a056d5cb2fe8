"""`scaling_study.py run` with a stand-in for training: folders, states, shards, kills, locks."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scaling_studies import ROOT, Study

from megatron_emo.launch.exit_codes import ExitCode
from megatron_emo.scaling.plans.plan import make_plan
from megatron_emo.scaling.plans.plan_file import PlanError, read_plan_file
from megatron_emo.scaling.running import run_command
from megatron_emo.scaling.running.run_states import RunState, observe, read_state, write_state
from megatron_emo.scaling.running.study_folder import read_manifest, write_study


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    study = Study(tmp_path)
    for name, value in study.env.items():
        monkeypatch.setenv(name, value)
    return study


def wait_for(condition, what: str, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return value


def test_a_study_is_written_trained_and_taken_up_without_a_second_start(study, capsys):
    standing = study.run("--jobs", 2)
    assert [one.state for one in standing] == ["done"] * 4
    study.assert_all_done_once()
    shown = capsys.readouterr().out
    assert "0 of 4 runs are done, 4 to train, 2 at a time" in shown
    assert shown.count("done in") == 4 and "[4/4]" in shown and "left" in shown
    plan = make_plan(read_plan_file(study.plan))
    assert [e["name"] for e in study.entries] == [run.name for run in plan.runs]
    first = study.entries[0]
    assert first["flops"] == plan.runs[0].flops and first["params"] == plan.runs[0].params.total
    folder = study.output / "runs" / first["name"]
    assert json.loads((folder / "config.json").read_text())["config"] == plan.runs[0].config()
    assert (study.output / "plan.yaml").read_text() == study.plan.read_text()

    with pytest.raises(ValueError, match=r"training was begun here .* --resume goes on"):
        study.run()
    before = {path: path.stat().st_mtime_ns for path in study.output.rglob("*") if path.is_file()}
    study.run("--resume")
    after = {path: path.stat().st_mtime_ns for path in study.output.rglob("*") if path.is_file()}
    assert before == after and "4 of 4 runs are done, 0 to train" in capsys.readouterr().out


def test_shards_cover_all_runs_once(study):
    for i in range(3):
        study.run("--shard", f"{i}/3")
        assert len(study.starts()) == (2, 3, 4)[i]
    study.assert_all_done_once()
    assert set(map(len, study.starts().values())) == {1}


def test_only_dry_run_write_only_and_status(study, capsys):
    study.run("--dry-run")
    assert not study.output.exists() and "4 planned" in capsys.readouterr().out
    study.run("--write-only")
    study.run("--only", "mle_*")
    states = [one.state for one in study.run("--status")]
    assert states == ["done", "planned", "done", "planned"]
    assert "2 done, 2 planned" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--only x: expected a run's name"):
        study.run("--resume", "--only", "x")
    for script in (study.output / "array.sbatch", *study.output.glob("runs/*/*.s*")):
        if script.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)


def test_scripts_carry_the_plan_to_the_trainer(study):
    study.change(launch={"threads": 3}, loss={"cost_bytes": 1}, arguments=["--log-memory"])
    study.run("--write-only")
    run = make_plan(read_plan_file(study.plan)).runs[1]
    script = study.output / "runs" / run.name / "run.sh"
    env = {**os.environ, "DRY_RUN": "1"}
    shown = subprocess.run(
        ["bash", str(script), "--last"], env=env, capture_output=True, text=True, timeout=60
    )
    words = shlex.split(shown.stdout)
    value = {word: following for word, following in zip(words, words[1:], strict=False)}
    assert value["--train-iters"] == str(run.steps) and value["--hidden-size"] == "8"
    assert value["--objective"] == "emo1" and value["--emo-cost-dtype"] == "fp8"
    assert value["--make-vocab-size-divisible-by"] == str(run.make_vocab_size_divisible_by)
    assert value["--data-path"] == str(study.folder / "text_document")
    assert value["--save"] == str(script.parent / "train" / "checkpoints") == value["--load"]
    assert value["--emo-result-file"] == str(script.parent / "result.json")
    assert value["--emo-result-vocab-size"] == str(run.shape.padded_vocab_size)
    assert value["--eval-iters"] == "0" and value["--split"] == "1,0,0"
    assert words[-2:] == ["--log-memory", "--last"] and "--bf16" not in words
    assert "export OMP_NUM_THREADS=3" in script.read_text()


def test_runs_at_a_time_have_gpus_of_their_own(study, monkeypatch):
    study.change(launch={"gpus_per_node": 4}, layout={"gpus": 2}, recipe={"batch": 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    study.run("--jobs", 2)
    files = [study.output / "runs" / e["name"] / "starts" for e in study.entries]
    devices = [file.read_text().split()[1] for file in files]
    assert devices[:2] == ["3,5", "6,7"] and set(devices) == {"3,5", "6,7"}
    assert "--bf16" in (study.run_folder("mle_a") / "recipe.sh").read_text()


def test_what_the_plan_must_have(study):
    study.change(launch={"nodes": 2}, layout={"gpus": 2})
    with pytest.raises(ValueError, match=r"launch.nodes 2: expected 1 here; submit"):
        study.run()
    assert "RUNS=(mle_a" in (study.output / "array.sbatch").read_text()
    study.change(launch={"nodes": 3})
    with pytest.raises(ValueError, match="nodes 3 x ranks_per_node 1: expected layout.gpus = 2"):
        study.run()
    study.change(launch={"nodes": 1, "gpus_per_node": 2})
    with pytest.raises(ValueError, match="--jobs 2: expected at most launch.gpus_per_node 2 over"):
        study.run("--jobs", 2)
    study.change(launch={"gpus_per_node": 0}, layout={"gpus": 1})
    (study.folder / "text_document.idx").unlink()
    with pytest.raises(PlanError, match=r"data.path\[0\].idx: expected a file, found none"):
        study.run()
    study.change(data=None)
    with pytest.raises(PlanError, match="data: missing"):
        study.run("--resume")
    with pytest.raises(ValueError, match="--plan: expected a file"):
        run_command.run(argparse.Namespace(jobs=1, retries=1, status=False, plan=None))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"split": "1,0"}}, "data.split: expected three numbers"),
        ({"data": {"path": "a b"}}, "data.path: expected paths without spaces"),
        ({"data": {"pth": "a"}}, "data.pth: unknown; nearest: path"),
        ({"launch": {"threads": 0}}, "launch.threads: expected 1 to"),
        ({"launch": {"precision": "fp8"}}, "launch.precision: expected one of"),
    ],
)
def test_sections_are_checked(study, section, message):
    study.change(**section)
    with pytest.raises(PlanError, match=message):
        read_plan_file(study.plan)


def test_another_plan_or_other_data_is_refused_and_says_what_differs(study):
    study.run("--only", "mle_a*")
    kept = study.results()
    manifest = (study.output / "manifest.json").read_bytes()
    changes = [
        ({"recipe": {"lr_max": 1, "weight_decay": 0.2}}, "config.optimizer.weight_decay: 0.1, now"),
        ({"objectives": ["mle"]}, "2 runs are not in the plan any more, emo1_a"),
        ({"data": {"split": "9,1,0"}}, "data.split: '1,0,0', now '9,1,0'"),
        ({"launch": {"precision": "bf16"}}, "training.precision: 'fp32', now 'bf16'"),
        ({"loss": {"cost_bytes": 2}}, "training.cost_dtype: 'fp32', now 'bf16'"),
    ]
    original = study.plan.read_text()
    for change, message in changes:
        study.change(**change)
        with pytest.raises(PlanError, match=message):
            study.run("--resume")
        study.plan.write_text(original)
    (study.folder / "text_document.idx").write_bytes(b"others")
    with pytest.raises(PlanError, match=r"data.path\[0\].idx: 6 bytes, sha256 .*, now 6 bytes"):
        study.run("--resume")
    assert (study.output / "manifest.json").read_bytes() == manifest and study.results() == kept


def test_runs_added_later_come_behind_and_settings_of_the_launch_may_change(study):
    study.run()
    names = [entry["name"] for entry in study.entries]
    study.change(tokens_per_param=[0.5, 1], launch={"save_interval": 7})
    study.run("--resume")
    assert [entry["name"] for entry in study.entries][:4] == names and len(study.entries) == 8
    assert [entry["index"] for entry in study.entries] == list(range(8))
    study.assert_all_done_once()
    assert set(map(len, study.starts().values())) == {1}


def test_a_folder_in_which_nothing_began_takes_another_plan(study):
    study.run("--write-only")
    study.change(recipe={"weight_decay": 0.2})
    study.run()
    study.assert_all_done_once()


def test_a_failed_run_is_tried_again_then_named_with_its_last_words(study, capsys):
    study.rule("emo1", "fails", "20 70")
    with pytest.raises(SystemExit, match="(?s)emo1_a.*exit code 70.*the paper jammed"):
        study.run("--keep-going", "--retries", 2)
    tries = {name: len(starts) for name, starts in study.starts().items()}
    assert sorted(tries.values()) == [1, 1, 3, 3]
    assert len(study.results()) == 2 and "try 3 of 3" in capsys.readouterr().err
    state = read_state(study.run_folder("emo1_a"))
    assert (state.state, state.attempts, state.exit_code) == ("failed", 3, 70)
    assert observe(study.output, study.entries[1]).state == "failed"
    (study.rules / "emo1_fails").unlink()
    study.run("--resume")
    study.assert_all_done_once()


def test_without_keep_going_the_first_failure_ends_the_others(study):
    study.rule("mle", "fails", "3 78")
    study.rule("emo1", "holds", "5")
    study.rule("mle", "after", f"{study.output}/runs/emo1_a*/train/checkpoints/held")
    with pytest.raises(SystemExit, match="mle_a"):
        study.run("--jobs", 2)
    assert len(study.starts()[study.name("mle_a")]) == 1  # 78 is not tried again
    assert read_state(study.run_folder("emo1_a")).state == "interrupted"
    assert (study.run_folder("emo1_a") / "train" / "checkpoints" / "saved").read_text() == "6"


def test_a_code_of_0_without_a_result_is_a_failure_and_a_result_counts_whatever_the_code(study):
    study.rule("mle", "forgets")
    study.rule("emo1", "ends", "70")
    with pytest.raises(SystemExit, match="ended with exit code 0 without its result"):
        study.run("--keep-going", "--retries", 0)
    assert len(study.results()) == 2
    (study.rules / "mle_forgets").unlink()
    study.run("--resume")
    study.assert_all_done_once()
    starts = study.starts()
    steps = {entry["name"]: entry["steps"] for entry in study.entries}
    assert all(starts[name][1:] == [steps[name]] for name in starts if name.startswith("mle"))


def test_a_preempted_run_goes_on_with_resume(study, capsys):
    study.rule("mle", "holds", "7")
    runner = study.start("--only", "mle_a*")
    folder = study.output / "runs"
    wait_for(lambda: list(folder.glob("mle_a*/train/checkpoints/held")), "no start")
    state = wait_for(lambda: (s := read_state(study.run_folder("mle_a"))).pid and s, "no pid")
    os.kill(state.pid, signal.SIGTERM)
    assert runner.wait(60) == ExitCode.PREEMPTED
    assert read_state(study.run_folder("mle_a")).state == "interrupted"
    study.run("--resume", "--only", "mle_a*")
    assert study.starts()[study.name("mle_a")] == [0, 8]


def test_a_result_of_another_run_or_a_torn_one_does_not_count(study):
    study.run()
    one, two = study.run_folder("mle_a"), study.run_folder("mle_b")
    (one / "result.json").write_bytes((two / "result.json").read_bytes())
    (two / "result.json").write_text('{"name": "mle')
    assert [one.state for one in study.run("--status")].count("done") == 2
    study.run("--resume")
    study.assert_all_done_once()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../other"}, "expected the name of a file beside it"),
        ({"name": "/tmp"}, "expected the name of a file beside it"),
        ({"name": None}, "expected the name of a file beside it"),
        ({"hash": 7}, "hash: expected str"),
        ({"tokens": "512"}, "tokens: expected int"),
        ({"config": []}, "config: expected dict"),
        ({"config": {"steps": None}}, "config.steps: expected int"),
    ],
)
def test_a_manifest_names_folders_of_its_own_and_holds_what_is_read(study, change, message):
    study.run("--write-only")
    path = study.output / "manifest.json"
    content = json.loads(path.read_text())
    content["runs"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=f"manifest.json: expected the manifest.*{message}"):
        read_manifest(study.output)
    with pytest.raises(PlanError, match=message):
        study.run("--status")


def test_a_second_runner_is_refused_and_another_shard_is_not(study):
    study.rule("mle", "holds", "7")
    runner = study.start("--shard", "0/2")
    wait_for(
        lambda: list((study.output / "runs").glob("mle_a*/train/checkpoints/held")), "no start"
    )
    with pytest.raises(ValueError, match=r"another run.* is at work here \(.shard_0_of_2.lock"):
        study.run("--resume", "--shard", "0/2")
    study.run("--shard", "1/2")
    with pytest.raises(SystemExit, match="mle_a.*another runner, process .* is at work on it"):
        study.run("--resume", "--only", "mle_a*")
    assert observe(study.output, study.entries[0]).state == "running"
    (study.rules / "mle_holds").unlink()
    assert runner.wait(60) == 0
    study.assert_all_done_once()
    assert set(map(len, study.starts().values())) == {1}


def test_a_killed_runner_takes_its_runs_with_it_and_they_save(study):
    study.rule("mle", "holds", "7")
    runner = study.start()
    wait_for(
        lambda: list((study.output / "runs").glob("mle_a*/train/checkpoints/held")), "no start"
    )
    runner.kill()
    runner.wait()
    saved = study.run_folder("mle_a") / "train" / "checkpoints" / "saved"
    wait_for(saved.exists, "nothing saved")
    (study.rules / "mle_holds").unlink()
    study.run("--resume")
    study.assert_all_done_once()
    assert study.starts()[study.name("mle_a")] == [0, 8]
    assert read_state(study.run_folder("mle_a")).attempts == 2


@pytest.mark.parametrize("lock", [".run.lock", ".ranks.lock"])
def test_what_is_left_of_a_killed_runner_is_waited_for(study, lock, capsys, monkeypatch):
    study.run("--write-only")
    folder = study.run_folder("mle_a")
    write_state(folder, RunState("running", 1, host="elsewhere", pid=7, runner_pid=6))
    held = os.open(folder / lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_SH)
    # With what a run is given to end, 1 s in all.
    monkeypatch.setattr("megatron_emo.scaling.running.run_processes.LOCK_WAIT_S", -19.0)
    with pytest.raises(SystemExit, match="mle_a.*process 7 on elsewhere is at work on it"):
        study.run("--resume")
    assert len(study.starts()) == 3  # the others had their turn
    os.close(held)
    study.run("--resume")
    study.assert_all_done_once()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from scaling_studies import Study

def die_at(count, moment):
    calls = 0
    replace = os.replace
    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == count and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if calls == count and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = counted
    return lambda: calls

def child(study, code):
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            code()
        except BaseException:
            import traceback
            Path(study.folder, "trace").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

top = Path({folder!r})
count, killed, stride = 1, 0, {stride}
while True:
    Path(top, str(count)).mkdir()
    study = Study(Path(top, str(count)))
    os.environ.update(study.env)
    moment = "before" if count % 2 else "after"
    def first():
        die_at(count, moment)
        study.run("--jobs", "2")
    code = child(study, first)
    if code == 0:
        break
    assert code == -9, (count, code, Path(study.folder, "trace").read_text())
    killed += 1
    code = child(study, lambda: study.run("--resume", "--jobs", "2"))
    assert code == 0, (count, Path(study.folder, "trace").read_text())
    study.assert_all_done_once()
    for name, starts in study.starts().items():
        steps = next(e["steps"] for e in study.entries if e["name"] == name)
        assert starts[0] == 0 and len(starts) <= 2 and starts == sorted(starts), (count, starts)
    count += stride
print(killed, count)
"""


def check_kills(tmp_path: Path, stride: int) -> tuple[int, int]:
    """Kill the runner at every stride-th rename; return (kills, renames of a whole study)."""
    script = tmp_path / "killed.py"
    tests = str(ROOT / "tests")
    script.write_text(
        KILLED.format(root=str(ROOT), tests=tests, folder=str(tmp_path), stride=stride)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    killed, renames = map(int, done.stdout.split()[-2:])
    return killed, renames


def test_a_runner_killed_in_the_middle_of_a_write_loses_and_repeats_nothing(tmp_path):
    killed, renames = check_kills(tmp_path, stride=9)
    assert killed >= 3 and renames > 30


@pytest.mark.slow
def test_a_runner_killed_at_every_write(tmp_path):
    killed, renames = check_kills(tmp_path, stride=1)
    assert killed == renames - 1


def test_a_write_that_fails_leaves_the_former_manifest(study, monkeypatch):
    study.run("--write-only")
    before = (study.output / "manifest.json").read_bytes()
    study.change(tokens_per_param=[0.5, 1])
    plan = make_plan(read_plan_file(study.plan))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_study(plan, study.plan, study.output)
    assert (study.output / "manifest.json").read_bytes() == before
