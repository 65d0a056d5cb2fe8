"""tools/check_checkpoint.py: what it prints of a run's folder, and its exit codes."""

from __future__ import annotations

import pickle

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from megatron_emo.checkpoints import sign, write_tracker


def exchange(value):
    return [value]


def write(folder):
    folder.mkdir(parents=True)
    index = Metadata(state_dict_metadata={}, storage_data={})
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    for name in ("metadata.json", "__0_0.distcp"):
        (folder / name).write_bytes(name.encode() * 100)
    assert sign(folder, exchange=exchange, rank=0) == []


@pytest.fixture
def verify(load_tool, capsys, tmp_path):
    def call(*argv):
        with pytest.raises(SystemExit) as ended:
            load_tool("check_checkpoint").main(["verify", *map(str, argv)])
        return ended.value.code, capsys.readouterr().out.replace(str(tmp_path), "")

    return call


def test_a_runs_folder_is_as_good_as_its_latest(verify, tmp_path):
    for iteration in (5, 10):
        write(tmp_path / f"iter_{iteration:07d}")
    write_tracker(tmp_path, 10)
    text = "/iter_0000005: whole\n/iter_0000010 (latest): whole\n"
    assert verify(tmp_path) == (0, text)
    shard = tmp_path / "iter_0000005" / "__0_0.distcp"
    shard.write_bytes(b"X" + shard.read_bytes()[1:])
    text = text.replace("5: whole", "5: __0_0.distcp: altered")
    assert verify(tmp_path) == (0, text)
    write_tracker(tmp_path, 5)
    code, text = verify(tmp_path)
    assert code == 74 and "/iter_0000005 (latest): __0_0.distcp: altered\n" in text
    assert verify(tmp_path, "--quick")[0] == 0
    assert verify(shard.parent) == (74, "/iter_0000005: __0_0.distcp: altered\n")


def test_what_is_missing_is_named(verify, tmp_path):
    assert verify(tmp_path / "absent") == (74, "/absent: no such folder\n")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    text = "/run: expected a run's --save folder or one of its iter_*, found checkpoints\n"
    assert verify(tmp_path / "run") == (74, text)
    write(tmp_path / "iter_0000005")
    assert verify(tmp_path)[1].endswith("no latest_checkpointed_iteration.txt\n")
    write_tracker(tmp_path, 10)
    assert verify(tmp_path) == (
        74,
        "/iter_0000005: whole\n/iter_0000010 (latest): no such folder\n",
    )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    code, text = verify(tmp_path)
    assert code == 74 and "expected an iteration or 'release', found ''" in text
