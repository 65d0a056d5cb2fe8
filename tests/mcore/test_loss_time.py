"""`--emo-time-loss` in a real run of a pipeline: who has the loss, and what its records say."""

from __future__ import annotations

from recorded_runs import SMALL, run_recorded

from megatron_emo.launch.events import event_file, read_events


def test_the_last_stage_times_its_loss_every_step(run_distributed, tmp_path):
    argv = [*SMALL, "--train-iters", "3", "--tensorboard-dir", str(tmp_path), "--emo-time-loss"]
    argv += ["--num-layers", "2", "--pipeline-model-parallel-size", "2", "--objective", "emo1"]
    run_distributed(2)(run_recorded, argv=argv)
    first, last = (list(read_events(event_file(tmp_path / "events", rank))) for rank in range(2))
    timed = [[r for r in records if r["kind"] == "loss_time"] for records in (first, last)]
    assert [r["iteration"] for r in timed[1]] == [r["iteration"] for r in timed[0]] == [1, 2, 3]
    steps = {r["iteration"]: r["step_ms"] for r in last if r["kind"] == "step"}
    for record in timed[1]:
        assert record["num_microbatches"] == 2  # 4 sequences, 2 at a time
        assert 0 < record["forward_ms"] and 0 < record["backward_ms"]
        assert record["device"] == "CPU" and record["peak_bytes"] > 1 << 20
    for record in timed[1][1:]:  # the first step's time has the set-up in it
        assert record["forward_ms"] + record["backward_ms"] < 3 * steps[record["iteration"]]
    assert all(r["forward_ms"] is None and r["num_microbatches"] == 0 for r in timed[0])
