"""The runner of tasks: order, skipping, failures, ends, and what happens at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emo.study import stamps
from megatron_emo.study.processes import Clock, Runner
from megatron_emo.study.tasks import Task, TaskError, format_status, order_tasks, run_tasks

ROOT = Path(__file__).resolve().parents[2]


def sh(name: str, script: str, outputs=(), inputs=(), **more) -> Task:
    return Task(name, ("sh", "-ec", script), tuple(outputs), tuple(inputs), **more)


@pytest.fixture
def chain(tmp_path) -> list[Task]:
    """c from b from a, given the wrong way round; each adds its name to `order`."""
    a, b, c = (tmp_path / name for name in "abc")
    order = tmp_path / "order"
    (tmp_path / "source").write_text("1")
    return [
        sh("c", f"cat {b} > {c}; echo c >> {order}", [c], [b], title="the last"),
        sh("b", f"cat {a} > {b}; echo b >> {order}", [b], [a]),
        sh("a", f"cat {tmp_path}/source > {a}; echo a >> {order}", [a], [tmp_path / "source"]),
    ]


def ran(tmp_path: Path) -> str:
    """The tasks that ran since the last call."""
    order = tmp_path / "order"
    text = order.read_text() if order.exists() else ""
    order.unlink(missing_ok=True)
    return "".join(text.split())


def test_tasks_follow_their_inputs_and_run_once(tmp_path, chain, capsys):
    run_tasks(chain, tmp_path / "log")
    assert ran(tmp_path) == "abc" and (tmp_path / "c").read_text() == "1"
    printed = capsys.readouterr().out
    assert "3 tasks, 1 at a time" in printed and "[3/3] the last done in 0 s" in printed
    run_tasks(chain, tmp_path / "log")
    assert ran(tmp_path) == ""
    assert "[3/3] the last skipped" in capsys.readouterr().out


def test_a_change_reruns_what_builds_on_it(tmp_path, chain):
    log = tmp_path / "log"
    run_tasks(chain, log)
    ran(tmp_path)
    (tmp_path / "source").write_text("22")
    run_tasks(chain, log)
    assert ran(tmp_path) == "abc" and (tmp_path / "c").read_text() == "22"
    (tmp_path / "b").unlink()
    run_tasks(chain, log)
    assert ran(tmp_path) == "b", "what is made again as it was changes nothing"
    c, b, a = chain
    run_tasks([Task(c.name, (*c.command, "more"), c.outputs, c.inputs), b, a], log)
    assert ran(tmp_path) == "c"
    run_tasks([Task(c.name, (*c.command, "more"), c.outputs, c.inputs, {"X": "1"}), b, a], log)
    assert ran(tmp_path) == "c"


def test_a_file_copied_again_is_the_same_up_to_a_size(tmp_path, chain, monkeypatch):
    log, source = tmp_path / "log", tmp_path / "source"
    run_tasks(chain, log)
    ran(tmp_path)
    os.utime(source, (1, 1))
    run_tasks(chain, log)
    assert ran(tmp_path) == ""
    source.write_text("2")  # of the same size
    run_tasks(chain, log)
    assert ran(tmp_path) == "abc"
    monkeypatch.setattr(stamps, "HASHED_BYTES", 0)
    before = stamps.fingerprint(source)
    assert stamps.fingerprint(source) == before
    os.utime(source, (1, 1))
    assert stamps.fingerprint(source) != before


def test_a_folder_counts_with_all_that_lies_in_it(tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "out"
    tasks = [
        sh("use", f"cat {folder}/sub/x > {out}", [out], [folder / "sub" / "x"]),
        sh("make", f"mkdir -p {folder}/sub; echo 1 > {folder}/sub/x", [folder]),
        sh("list", f"ls {folder}/sub > {tmp_path}/names", [tmp_path / "names"], [folder]),
    ]
    assert [task.name for task in order_tasks(tasks)] == ["make", "use", "list"]
    run_tasks(tasks, tmp_path / "log")
    (folder / "sub" / "y").write_text("")
    assert "to run: folder changed" in format_status(tasks, tmp_path / "log")
    run_tasks(tasks, tmp_path / "log")
    assert (tmp_path / "names").read_text().split() == ["x", "y"]


def test_what_cannot_be_ordered_is_refused_by_name(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(ValueError, match="in a circle: one <- two <- one"):
        order_tasks([sh("one", "", [a], [b]), sh("two", "", [b], [a])])
    with pytest.raises(ValueError, match="made by two tasks, one and two"):
        order_tasks([sh("one", "", [a]), sh("two", "", [a])])
    with pytest.raises(ValueError, match="task one: input .*b: no task makes it"):
        order_tasks([sh("one", "", [a], [b])])
    with pytest.raises(ValueError, match="task one: expected different names"):
        order_tasks([sh("one", "", [a]), sh("one", "", [b])])
    with pytest.raises(ValueError, match=r"'\.\./x': expected a relative name"):
        sh("../x", "", [a])
    with pytest.raises(ValueError, match="--jobs: expected at least 1, got 0"):
        run_tasks([], tmp_path / "log", jobs=0)


def test_a_failure_shows_its_log_and_stops(tmp_path, capfd):
    script = "for i in $(seq 30); do echo line $i; done; exit 3"
    tasks = [
        sh("bad", script, [tmp_path / "bad"]),
        sh("after", f"touch {tmp_path}/after", [tmp_path / "after"], [tmp_path / "bad"]),
        sh("other", f"touch {tmp_path}/other", [tmp_path / "other"]),
    ]
    with pytest.raises(TaskError, match="failed: bad: ended with exit code 3; log .*bad.log$"):
        run_tasks(tasks, tmp_path / "log")
    printed = capfd.readouterr().err
    assert "bad: ended with exit code 3; log " in printed and "line 11\n" in printed
    assert "line 10\n" not in printed
    assert not (tmp_path / "other").exists()
    with pytest.raises(TaskError, match="failed: bad: .*; not run: after"):
        run_tasks(tasks, tmp_path / "log", keep_going=True)
    assert (tmp_path / "other").exists() and not (tmp_path / "after").exists()


def test_a_task_that_makes_nothing_failed(tmp_path):
    with pytest.raises(TaskError, match="ended with 0 without making .*gone"):
        run_tasks([sh("lazy", "true", [tmp_path / "gone"])], tmp_path / "log")
    assert not (tmp_path / "log" / "lazy.json").exists()


def meet(tmp_path: Path, mine: str, other: str) -> Task:
    """Ends well only if both tasks are alive at once: each waits for the other at a named pipe."""
    here, there = tmp_path / f"to_{mine}", tmp_path / f"to_{other}"
    script = f"echo > {there} & timeout --foreground 20 cat {here}; wait; touch {tmp_path}/{mine}"
    return sh(mine, script, [tmp_path / mine])


def test_two_jobs_run_at_the_same_time(tmp_path):
    for name in ("one", "two"):
        os.mkfifo(tmp_path / f"to_{name}")
    run_tasks([meet(tmp_path, "one", "two"), meet(tmp_path, "two", "one")], tmp_path / "log", 2)
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()


def test_a_failure_ends_the_others(tmp_path):
    os.mkfifo(tmp_path / "up")
    tasks = [
        # The failing one waits until the other runs, which then would wait for ever.
        sh("bad", f"cat {tmp_path}/up; exit 1", [tmp_path / "bad"]),
        sh("endless", f"echo > {tmp_path}/up; cat {tmp_path}/up", [tmp_path / "endless"]),
    ]
    with pytest.raises(TaskError, match="bad: ended with exit code 1"):
        run_tasks(tasks, tmp_path / "log", jobs=2)
    assert not (tmp_path / "log" / "endless.json").exists()


def test_a_task_that_will_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "grace", 0.1)
    os.mkfifo(tmp_path / "up")
    # Ends by SIGALRM alone, should nothing end it before; SIGTERM it ignores as its shell does.
    wait = f"{sys.executable} -c 'import signal; signal.alarm(20); signal.pause()'"
    deaf = f"trap '' TERM; echo $$ > {tmp_path}/up; {wait} || touch {tmp_path}/lived"
    tasks = [
        sh("bad", f"cat {tmp_path}/up > {tmp_path}/pid; exit 1", [tmp_path / "bad"]),
        sh("deaf", deaf, [tmp_path / "deaf"]),
    ]
    with pytest.raises(TaskError, match="bad: ended with exit code 1"):
        run_tasks(tasks, tmp_path / "log", jobs=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "lived").exists()


KILLED = """
import sys
from pathlib import Path
from megatron_emo.study.tasks import Task, run_tasks
here = Path(sys.argv[1])
script = f"echo $$ > {here}/up; test -e {here}/go || cat {here}/never; touch {here}/out"
run_tasks([Task("long", ("sh", "-ec", script), (here / "out",))], here / "log")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_ends_its_tasks_and_goes_on_later(tmp_path, number):
    os.mkfifo(tmp_path / "up")
    os.mkfifo(tmp_path / "never")
    argv = [sys.executable, "-c", KILLED, str(tmp_path)]
    runner = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL)
    child = int((tmp_path / "up").read_text())
    with pytest.raises(ValueError, match="another run, or a task of one, is at work here"):
        run_tasks([sh("long", "", [tmp_path / "out"])], tmp_path / "log")
    runner.send_signal(number)
    assert runner.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "log" / "long.json").exists()
    (tmp_path / "up").unlink()
    (tmp_path / "go").touch()
    assert subprocess.run(argv, cwd=ROOT).returncode == 0
    assert (tmp_path / "log" / "long.json").exists()


def test_half_made_work_is_kept_for_the_same_command_alone(tmp_path):
    half, out = tmp_path / "half", tmp_path / "out"
    (tmp_path / "source").write_text("1")

    def task(script: str) -> Task:
        whole = f"mkdir -p {half}; echo x >> {half}/n; {script}"
        return sh("t", whole, [out], [tmp_path / "source"], resumes=(half,))

    def steps() -> int:
        return (half / "n").read_text().count("x")

    with pytest.raises(TaskError):
        run_tasks([task(f"test -e {tmp_path}/go; touch {out}")], tmp_path / "log")
    (tmp_path / "go").touch()
    run_tasks([task(f"test -e {tmp_path}/go; touch {out}")], tmp_path / "log")
    assert steps() == 2
    run_tasks([task(f"touch {out}")], tmp_path / "log")
    assert steps() == 1
    (tmp_path / "source").write_text("22")
    run_tasks([task(f"touch {out}")], tmp_path / "log")
    assert steps() == 1


def test_a_dry_run_lists_and_runs_nothing(tmp_path, chain, capsys):
    run_tasks(chain, tmp_path / "log", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "c", "0"]
    assert "to run: not run yet" in lines[0] and "to run: after a" in lines[1]
    assert "the last" in lines[2] and lines[3] == "0 of 3 tasks are done"
    assert ran(tmp_path) == ""
    run_tasks(chain, tmp_path / "log")
    assert format_status(chain, tmp_path / "log").endswith("3 of 3 tasks are done")


def test_time_left_scales_what_was_expected(tmp_path):
    clock = Clock(jobs=2)
    tasks = [sh(name, "", [tmp_path / name], seconds=10.0) for name in "xy"]
    unknown = sh("z", "", [tmp_path / "z"])
    assert clock.time_left(tasks, tmp_path) == 10.0
    assert clock.time_left([unknown], tmp_path) is None
    clock.add(sh("w", "", [tmp_path / "w"], seconds=5.0), 15.0)
    # Three times what was expected; the task without an expectation as the mean of those done.
    assert clock.time_left([*tasks, unknown], tmp_path) == (30 + 30 + 15) / 2


def test_environment_reaches_the_command(tmp_path):
    out = tmp_path / "out"
    run_tasks([sh("env", f"echo $COLOUR > {out}", [out], env={"COLOUR": "red"})], tmp_path / "log")
    assert out.read_text() == "red\n"
