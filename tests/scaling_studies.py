"""Studies of `scaling_study.py run` with a stand-in for training.

Runs start through the real run.sh and train.sh; the Python these call is a shell script that puts
STAND_IN in the place of torchrun. It trains by counting, and leaves the steps it began with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_emo.scaling.running import run_command
from megatron_emo.scaling.running.run_states import observe, read_state
from megatron_emo.scaling.running.study_folder import read_manifest

ROOT = Path(__file__).parents[1]
PLAN = """
name: toy
tokens_per_param: [1]
sizes: [a, b]
objectives: [mle, emo1]
model: {vocab_size: 512, seq_length: 16}
recipe:
  bundle: cosine
  batch: 4
  lr_max: 1
  table:
    a: {layers: 1, hidden: 8, heads: 1, ffn: 8}
    b: {layers: 1, hidden: 16, heads: 1, ffn: 16}
data: {path: text_document, tokenizer_type: NullTokenizer, tokenizer_model: "512"}
launch: {gpus_per_node: 0, save_interval: 50, shutdown_s: 5}
allow: [too-few-points, one-line, few-steps, learning-rate]
"""

STAND_IN = """
import fcntl, glob, json, os, signal, sys, time

def value(flag, count=1):
    last = len(sys.argv) - 1 - sys.argv[::-1].index(flag)
    return sys.argv[last + 1 : last + 1 + count]

save, = value("--save")
steps, batch, length, every = (
    int(value(flag)[0])
    for flag in ("--train-iters", "--global-batch-size", "--seq-length", "--save-interval")
)
result, = value("--emo-result-file")
name, digest = value("--emo-result-run", 2)
folder = os.path.dirname(result)
os.makedirs(save, exist_ok=True)
lock = os.open(os.path.join(folder, ".ranks.lock"), os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two at once would both end here
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
tracker = os.path.join(save, "saved")
done = int(open(tracker).read()) if os.path.exists(tracker) else 0

def put(path, text):
    with open(path + ".part", "w") as file:
        file.write(text)
    os.replace(path + ".part", path)

def behaviour(word):
    path = os.path.join(os.environ["STAND_IN_RULES"], name.split("_")[0] + "_" + word)
    return open(path).read() if os.path.exists(path) else ""

with open(os.path.join(folder, "starts"), "a") as file:
    file.write(f"{done} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
while done < steps:
    while behaviour("holds") == str(done) and not stopped:
        put(os.path.join(save, "held"), "")
        time.sleep(0.01)
    if behaviour("fails").startswith(f"{done} "):
        while behaviour("after") and not glob.glob(behaviour("after")):
            time.sleep(0.01)
        print("the paper jammed", flush=True)
        sys.exit(int(behaviour("fails").split()[1]))
    done += 1
    if done % every == 0 or done == steps or stopped:
        put(tracker, str(done))
    if stopped:
        sys.exit(75)
fields = dict(name=name, hash=digest, iteration=done, samples=done * batch)
fields |= dict(tokens=done * batch * length, seconds=done / 100, gpu_hours=done / 360000, starts=1)
fields |= dict(ranks=1, device="paper", objective="x", lm_loss=2.0, versions={}, commit="")
if behaviour("forgets"):
    sys.exit(0)
put(result, json.dumps(fields | {"format": 1}))
sys.exit(int(behaviour("ends") or 0))
"""

SHELL = """#!/bin/sh
if [ "$3" = megatron_emo.launch.torchrun ]; then
    shift 3
    exec {python} -S -E {stand_in} "$@"
fi
exec {python} "$@"
"""

# As the tool, without the imports of its other subcommands.
RUNNER = f"""
import argparse, sys
sys.path.insert(0, {str(ROOT)!r})
from megatron_emo.scaling.running import run_command
parser = argparse.ArgumentParser()
run_command.add_arguments(parser)
run_command.run(parser.parse_args(sys.argv[1:]))
"""


class Study:
    """A plan, its data, a stand-in for training, and the folder that `run` fills."""

    def __init__(self, folder: Path, plan: str = PLAN) -> None:
        self.folder, self.output = folder, folder / "study"
        self.plan, self.rules = folder / "plan.yaml", folder / "rules"
        self.rules.mkdir()
        self.plan.write_text(plan)
        for suffix in (".bin", ".idx"):
            Path(folder, f"text_document{suffix}").write_bytes(b"tokens")
        stand_in, python = folder / "stand_in.py", folder / "python"
        stand_in.write_text(STAND_IN)
        python.write_text(SHELL.format(python=sys.executable, stand_in=stand_in))
        python.chmod(0o755)
        self.env = {"PYTHON": str(python), "STAND_IN_RULES": str(self.rules)}

    def change(self, **sections) -> None:
        content = yaml.safe_load(self.plan.read_text())
        for key, value in sections.items():
            is_section = isinstance(value, dict) and key in content
            content[key] = content[key] | value if is_section else value
        self.plan.write_text(yaml.safe_dump(content))

    def rule(self, label: str, word: str, text: str = "1") -> None:
        Path(self.rules, f"{label}_{word}").write_text(text)

    def argv(self, *flags) -> list[str]:
        return ["--plan", str(self.plan), "--output", str(self.output), *map(str, flags)]

    def run(self, *flags):
        parser = argparse.ArgumentParser()
        run_command.add_arguments(parser)
        return run_command.run(parser.parse_args(self.argv(*flags)))

    def start(self, *flags) -> subprocess.Popen:
        tool = [sys.executable, "-c", RUNNER, *self.argv(*flags)]
        with open(self.folder / "runner.log", "ab") as log:
            return subprocess.Popen(tool, env={**os.environ, **self.env}, stdout=log, stderr=log)

    @property
    def entries(self) -> list[dict]:
        return read_manifest(self.output)["runs"]

    def name(self, start: str) -> str:
        return next(e["name"] for e in self.entries if e["name"].startswith(start))

    def run_folder(self, start: str) -> Path:
        return self.output / "runs" / self.name(start)

    def starts(self) -> dict[str, list[int]]:
        """The steps each start of each run began with."""
        files = {e["name"]: self.output / "runs" / e["name"] / "starts" for e in self.entries}
        return {
            name: [int(line.split()[0]) for line in file.read_text().splitlines()]
            for name, file in files.items()
            if file.exists()
        }

    def results(self) -> dict[str, dict]:
        files = {e["name"]: self.output / "runs" / e["name"] / "result.json" for e in self.entries}
        return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}

    def assert_all_done_once(self) -> None:
        results = self.results()
        for entry in self.entries:
            found = results[entry["name"]]
            assert (found["iteration"], found["tokens"]) == (entry["steps"], entry["tokens"])
            assert observe(self.output, entry).state == "done"
            assert read_state(self.output / "runs" / entry["name"]).state == "done"
