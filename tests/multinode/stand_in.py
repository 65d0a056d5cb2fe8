"""In the place of `python -m megatron_emo.launch.torchrun` on a node: notes how it was started and
behaves as the variable BEHAVIOUR says, without Megatron.

    finish      ends with 0
    preempt     the first start waits for SIGTERM, leaves the marker PREEMPTED and ends with 75;
                later ones finish
    preempted   every start does as the first of preempt does
    fail        node 1 ends with 78 at once; node 0 waits for SIGTERM, and ends with 143
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_emo.launch.markers import Marker, State, write_marker

_SHOWN = ("NNODES", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "OBJECTIVE", "SEED")


def value_of(flag: str) -> str:
    return sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index(flag) + 1]


def wait_for_signal() -> float:
    """Return when SIGTERM came."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print("ready", flush=True)
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        return time.time()
    raise TimeoutError("SIGTERM: expected within 300 s")


def main() -> int:
    began = time.time()
    save = Path(value_of("--save"))
    node = int(os.environ["SLURM_NODEID"])
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    save.mkdir(parents=True, exist_ok=True)
    shown = {name: os.environ.get(name) for name in _SHOWN} | {"argv": sys.argv[1:]}
    (save / f"start_{start}_node_{node}.json").write_text(json.dumps(shown))
    behaviour = os.environ.get("BEHAVIOUR", "finish")
    waits = behaviour == "preempted" or (behaviour == "preempt" and start == 0)
    if behaviour == "fail":
        if node == 1:
            return 78
        wait_for_signal()
        return 143
    moment = wait_for_signal() if waits else time.time()
    state, code = (State.PREEMPTED, 75) if waits else (State.FINISHED, 0)
    if node == 0:
        marker = Marker(state, code, moment, rank=0, iteration=7, message="by a test")
        write_marker(save, marker, since=began)
    return code


if __name__ == "__main__":
    sys.exit(main())
