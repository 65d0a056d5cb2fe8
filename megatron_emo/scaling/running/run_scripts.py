"""The scripts of a study: what starts one run, here or under Slurm, and an array over all."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_emo.scaling.plans.plan import Run
from megatron_emo.scaling.plans.plan_file import PlanSpec
from megatron_emo.scaling.plans.run_arguments import (
    model_arguments,
    parallel_arguments,
    training_arguments,
    vocabulary_flags,
)

REPOSITORY = Path(__file__).resolve().parents[3]
COST_DTYPES = {4: "fp32", 2: "bf16", 1: "fp8"}
MARGIN_S = 60
"""Seconds that Slurm's signal comes before the kill, beyond what a run is given to end."""


def save_interval(spec: PlanSpec, run: Run) -> int:
    """Return the steps between two checkpoints of a run."""
    return spec.launch.save_interval or math.ceil(run.steps / 10)


def training_settings(spec: PlanSpec) -> dict[str, str]:
    """Return what decides the numbers of every run beside its own config and data."""
    launch = spec.launch.resolved(spec.layout)
    return {
        "precision": launch.precision,
        "cost_dtype": COST_DTYPES[spec.loss.cost_bytes],
        "equal": spec.equal,
    }


def format_recipe(spec: PlanSpec, run: Run) -> str:
    """Return recipe.sh, as examples/multinode/recipes has them."""
    precision = spec.launch.resolved(spec.layout).precision
    training = training_arguments(run) + (["--bf16"] if precision == "bf16" else [])
    return "\n".join(
        [
            "# shellcheck shell=bash disable=SC2034  # train.sh reads these",
            f"# {run.name}",
            *_format_array("MODEL_ARGS", model_arguments(run)),
            *_format_array("TRAINING_ARGS", training),
            *_format_array("MODEL_PARALLEL_ARGS", parallel_arguments(spec.layout)),
            f"VOCAB_SIZE={run.vocab_size}",
            "",
        ]
    )


def _format_array(name: str, words: Sequence[str]) -> list[str]:
    """A line for each flag with its values."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return [f"{name}=(", *(f"    {' '.join(line)}" for line in lines), ")"]


def format_run(spec: PlanSpec, run: Run) -> str:
    """Return run.sh, which becomes train.sh of this repository, or LAUNCHER beside it."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in _variables(spec, run)]
    extra = [
        *(word for flag, value in vocabulary_flags(run).items() for word in (flag, str(value))),
        *("--save-retain-interval", str(save_interval(spec, run) * 10**6)),
        *("--emo-result-run", run.name, run.hash),
        *("--emo-result-vocab-size", str(run.shape.padded_vocab_size)),
        *run.arguments,
    ]
    return f"""#!/usr/bin/env bash
# Trains {run.name}, from its last checkpoint where there is one;
# further flags of pretrain_gpt_emo.py come last. Meant to be started by `scaling_study.py run`.
set -euo pipefail
HERE=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
LAUNCHER=${{LAUNCHER:-train.sh}}
cd "${{REPOSITORY:-{REPOSITORY}}}"
{chr(10).join(exports)}
export RUN_DIR=$HERE/train
if [[ $LAUNCHER == train.sh ]]; then
    # It becomes torchrun in this process; ranks do not outlive it.
    export EMO_LAUNCHER_PID=$$
fi
{chr(10).join(_format_array("FLAGS", extra))}
exec bash "examples/multinode/$LAUNCHER" "$HERE/recipe.sh" \\
    --emo-result-file "$HERE/result.json" "${{FLAGS[@]}}" "$@"
"""


def _variables(spec: PlanSpec, run: Run) -> list[tuple[str, str]]:
    """Return train.sh's variables."""
    data, launch = spec.data, spec.launch.resolved(spec.layout)
    values: dict[str, object] = {
        "NNODES": launch.nodes,
        "GPUS_PER_NODE": launch.ranks_per_node if launch.gpus_per_node else 0,
        "RANKS_PER_NODE": launch.ranks_per_node,
        "OMP_NUM_THREADS": launch.threads,
        "DATA_PATH": " ".join(data.path),
        "TOKENIZER_TYPE": data.tokenizer_type,
        "TOKENIZER_MODEL": data.tokenizer_model,
        "SPLIT": data.split,
        "NUM_WORKERS": launch.num_workers,
        "OBJECTIVE": run.objective.objective,
        # What the shell may have set for other runs; a plan's arguments come later and win.
        **{"EMO_START_ITER": 0, "EMO_RAMP_ITERS": 0, "SMOKE": 0, "CHECKPOINTS": 1},
        "COST_EMBEDDING": data.cost_embedding,
        "EMO_COST_DTYPE": COST_DTYPES[spec.loss.cost_bytes],
        "EMO_LOSS_PATH": run.loss_path,
        "EMO_WORKSPACE_MB": spec.loss.workspace_mb,
        "SAVE_INTERVAL": save_interval(spec, run),
        "EVAL_INTERVAL": launch.eval_interval,
        "EVAL_ITERS": launch.eval_iters,
        "LOG_INTERVAL": 1,
        "SHUTDOWN_TIMEOUT_S": launch.shutdown_s,
    }
    return [(name, str(value)) for name, value in values.items()]


def _format_header(name: str, spec: PlanSpec, output: str, more: Sequence[str] = ()) -> str:
    launch = spec.launch.resolved(spec.layout)
    flags = [
        f"job-name={name}",
        f"nodes={launch.nodes}",
        "ntasks-per-node=1",
        *([f"gpus-per-node={launch.ranks_per_node}"] if launch.gpus_per_node else []),
        f"signal=TERM@{launch.shutdown_s + MARGIN_S}",
        "requeue",
        "open-mode=append",
        f"output={output}",
        *more,
    ]
    return "\n".join(["#!/usr/bin/env bash", *(f"#SBATCH --{flag}" for flag in flags)])


def format_job(spec: PlanSpec, run: Run, folder: Path) -> str:
    """Return job.sbatch: run.sh on all nodes of a Slurm job, requeued where it was preempted."""
    return f"""{_format_header(run.name, spec, f"{folder}/slurm-%j.out")}
# Trains this run alone through examples/multinode/train.sbatch. Time and partition are sbatch's own
# flags:
#
#     sbatch --time 24:00:00 {folder}/job.sbatch
set -euo pipefail
export SLURM_SUBMIT_DIR=${{REPOSITORY:-{REPOSITORY}}} LAUNCHER=train.sbatch
exec bash {shlex.quote(str(folder))}/run.sh "$@"
"""


def format_array(spec: PlanSpec, names: Sequence[str], plan: Path, output: Path) -> str:
    """Return array.sbatch: task i of n takes the shard i/n."""
    header = _format_header(
        f"scaling-{spec.name}", spec, f"{output}/slurm-%A_%a.out", [f"array=0-{len(names) - 1}"]
    )
    body = _SEVERAL_NODES if spec.launch.nodes > 1 else _ONE_NODE
    return f"""{header}
# All runs of the study that are not done. Fewer tasks take more runs each; time and partition are
# sbatch's own flags:
#
#     sbatch --array 0-7 --time 24:00:00 {output}/array.sbatch
#
# A task that was preempted goes back into the queue, at most MAX_REQUEUES=100 times.
set -euo pipefail
REPOSITORY=${{REPOSITORY:-{REPOSITORY}}}
PLAN=${{PLAN:-{shlex.quote(str(plan))}}}
OUTPUT={shlex.quote(str(output))}
SHARD=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
{body.format(names=" ".join(map(shlex.quote, names)))}"""


_ONE_NODE = """cd "$REPOSITORY"
PYTHON=${{PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}}
code=0
srun --ntasks=1 --cpu-bind=none "$PYTHON" tools/scaling_study.py run --plan "$PLAN" \\
    --output "$OUTPUT" --resume --keep-going --shard "$SHARD/$SLURM_ARRAY_TASK_COUNT" || code=$?
# 75: runs stopped by a signal, saved; 130 and 143: the runner was, and stopped its runs.
if ((code == 75 || code == 130 || code == 143)); then
    if ((${{SLURM_RESTART_COUNT:-0}} < ${{MAX_REQUEUES:-100}})); then
        # Not SLURM_JOB_ID, which of one task is the number of the whole array.
        scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
        sleep 60 # Slurm ends this script
    fi
fi
exit "$code"
"""

_SEVERAL_NODES = """RUNS=({names})
failed=0
for ((i = SHARD; i < ${{#RUNS[@]}}; i += SLURM_ARRAY_TASK_COUNT)); do
    [[ ! -e $OUTPUT/runs/${{RUNS[i]}}/result.json ]] || continue
    code=0
    bash "$OUTPUT/runs/${{RUNS[i]}}/job.sbatch" || code=$?
    ((code != 75)) || exit 75
    ((code == 0)) || failed=$code
done
exit "$failed"
"""
