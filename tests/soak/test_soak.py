"""Thousands of steps and hundreds of saves leave memory, descriptors, threads and files as they
were.

`make test-slow` runs them; MEGATRON_EMO_SOAK_CYCLES=N changes the number of save and resume cycles.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LOSS_STEPS, WARM_UP = 3000, 500
NUM_CYCLES = int(os.environ.get("MEGATRON_EMO_SOAK_CYCLES", "200"))
MIB_PER_THOUSAND = 1.0
VOCAB, HIDDEN, WIDTH, TOKENS = 4096, 64, 32, 128

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Usage:
    """What this process holds."""

    mib: float
    """Resident."""
    descriptors: int
    threads: int
    """Of Python and of the libraries."""
    children: int
    temporary: int
    """Files and folders in the folder for temporary ones."""

    @classmethod
    def now(cls, temporary: Path) -> Usage:
        gc.collect()
        # What the allocator keeps for later in its threads' arenas, gloo's among them, is no leak.
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tasks = Path("/proc/self/task")
        children = sum(len((task / "children").read_text().split()) for task in tasks.iterdir())
        return cls(
            pages * resource.getpagesize() / 2**20,
            len(os.listdir("/proc/self/fd")),
            len(list(tasks.iterdir())),
            children,
            len(list(temporary.rglob("*"))),
        )


def check_flat(what: str, before: Usage, after: Usage, count: int) -> None:
    growth = (after.mib - before.mib) / count * 1000
    print(f"{what}: {before} -> {after}, {growth:.2f} MiB for 1,000 of {count}", flush=True)
    assert growth <= MIB_PER_THOUSAND, f"{what}: {growth:.2f} MiB for 1,000"
    for name in ("descriptors", "threads", "children", "temporary"):
        assert getattr(after, name) <= getattr(before, name), f"{what}: {name}: {before} -> {after}"


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Have this process, and those it starts, put temporary files into a folder of its own."""
    kept, before = os.environ.get("TMPDIR"), tempfile.tempdir
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        del os.environ["TMPDIR"]
        if kept is not None:
            os.environ["TMPDIR"] = kept


def check_loss_steps(report: str) -> None:
    """Steps whose targets, and so the number of distinct ones, change all the time."""
    import torch
    import torch.distributed as dist

    from megatron_emo import build_objective, fused_linear_loss
    from megatron_emo.cost_embedding import unit_rows

    rank, size = dist.get_rank(), dist.get_world_size()
    table = unit_rows(torch.randn(VOCAB // size, WIDTH))
    weight = torch.randn(VOCAB // size, HIDDEN, requires_grad=True)
    generator = torch.Generator().manual_seed(3)  # the same on every rank
    objective = build_objective("emo1")
    with temporary_folder(Path(report, f"tmp_{rank}")) as temporary:
        at_warm = None
        for step in range(LOSS_STEPS):
            target = torch.randint(0, VOCAB, (TOKENS, 1), generator=generator)
            mask = (torch.rand(TOKENS, 1, generator=generator) > 0.2).float()
            hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator).requires_grad_()
            path = ("recompute", "forward", "logits")[step % 3]
            out = fused_linear_loss(
                hidden,
                weight,
                target,
                objective,
                table,
                mask,
                dist.group.WORLD,
                path,
                vocab_size=VOCAB,
            )
            ((out.loss * mask).sum() / mask.sum()).backward()
            weight.grad = None
            if step + 1 == WARM_UP:
                at_warm = Usage.now(temporary)
        after = Usage.now(temporary)
    Path(report, f"rank_{rank}.txt").write_text(f"{at_warm}\n{after}\n")
    check_flat(f"loss, rank {rank}", at_warm, after, LOSS_STEPS - WARM_UP)


def test_memory_stays_over_thousands_of_losses(run_distributed, tmp_path):
    run_distributed(2)(check_loss_steps, report=str(tmp_path), timeout_s=1200.0)
    print(*(path.read_text() for path in sorted(tmp_path.glob("*.txt"))))


def check_cycles(folder: str, num_cycles: int) -> None:
    """Save with Megatron's dist_checkpointing, read back with it and with our reader."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_emo.conversion import megatron_model

    # The allocator settles over about 200 cycles: 1.8 MiB in the first 200, 0.1 in the next.
    warm_up = max(3, num_cycles)
    with temporary_folder(Path(folder, "tmp")) as temporary, megatron_model.one_process():
        model = megatron_model.build_model(model_arguments())
        for cycle in range(num_cycles + warm_up):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            expected = {name: p.clone() for name, p in model.named_parameters()}
            root = Path(folder, "run")
            saved = megatron_model.save_checkpoint(model, root, model_arguments(), cycle + 1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            if cycle % 2:
                state = {"model": model.sharded_state_dict()}
                model.load_state_dict(dist_checkpointing.load(state, str(saved))["model"])
            else:
                megatron_model.load_checkpoint(model, root)
            found = dict(model.named_parameters())
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            shutil.rmtree(saved)
            if cycle + 1 == warm_up:
                at_warm = Usage.now(temporary)
        after = Usage.now(temporary)
    Path(folder, "report.txt").write_text(f"{at_warm}\n{after}\n")
    check_flat("save and resume", at_warm, after, num_cycles)


def model_arguments():
    import argparse

    return argparse.Namespace(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        max_position_embeddings=32,
        padded_vocab_size=128,
    )


def test_nothing_is_left_behind_by_saves_and_resumes(run_distributed, tmp_path):
    run_distributed(1)(check_cycles, folder=str(tmp_path), num_cycles=NUM_CYCLES, timeout_s=1800.0)
    print((tmp_path / "report.txt").read_text())


def test_a_leak_is_seen(tmp_path):
    before = Usage.now(tmp_path)
    kept = [bytearray(os.urandom(1 << 20)) for _ in range(8)]
    with pytest.raises(AssertionError, match="MiB for 1,000"):
        check_flat("kept", before, Usage.now(tmp_path), 1000)
    del kept
    usage = Usage.now(tmp_path)
    with open(os.devnull), pytest.raises(AssertionError, match="descriptors"):
        check_flat("open", usage, Usage.now(tmp_path), 10**6)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    usage = Usage.now(tmp_path)
    thread.start()
    with pytest.raises(AssertionError, match="threads"):
        check_flat("thread", usage, Usage.now(tmp_path), 10**6)
    stop.set()
    thread.join()
