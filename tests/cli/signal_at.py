"""pretrain_gpt_emo.py with a signal at a definite moment, for tests/cli/test_signals.py.

    signal_at.py POINT:CALL:RANKS:SIGNAL:TARGET [flags of pretrain_gpt_emo.py]

POINT and CALL as in recorded_runs.Trip; RANKS like 0+1; TARGET is self, or agent for the parent
process, or step for both, as Slurm signals all processes of a step; stuck for self, after another
rank has failed, while this one waits for it for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]


def main() -> None:
    from recorded_runs import Trip, trips_set

    from megatron_emo.launch.exit_codes import run_and_exit
    from megatron_emo.launch.markers import Marker, State, write_marker
    from megatron_emo.training import cpu, recording, run

    class RealTrip(Trip):
        """Sends to whom the command line says."""

        def happen(self) -> None:
            number, target = self.what.split(">")
            if target == "stuck":
                marker = Marker(State.FAILED, 70, time.time(), 1, 2, "RuntimeError: out of paper")
                write_marker(sys.argv[sys.argv.index("--save") + 1], marker)
                os.kill(os.getpid(), signal.Signals[number])
                threading.Event().wait()
            if target in ("agent", "step"):
                os.kill(os.getppid(), signal.Signals[number])
            if target in ("self", "step"):
                os.kill(os.getpid(), signal.Signals[number])

    at, call, ranks, number, target = sys.argv.pop(1).split(":")
    trip = RealTrip(at, int(call), [int(rank) for rank in ranks.split("+")], f"{number}>{target}")
    cpu.enable([])
    with trips_set([trip]):
        run_and_exit(run.pretrain_gpt, on_fault=recording.fault, on_end=recording.end)


if __name__ == "__main__":
    main()
