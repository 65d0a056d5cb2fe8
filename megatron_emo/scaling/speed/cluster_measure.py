"""What this machine sustains: products, passes and collectives of two ranks, timed.

    python -m megatron_emo.scaling.speed.cluster_measure OUT.json --threads 1

Two processes start each other over a file. One times products and passes while the other waits,
then both do at once, which is what ranks that share a machine have; then they exchange tensors.
With two GPUs these are on GPUs, over NCCL, in bf16; with none on CPUs, over gloo, in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from megatron_emo.scaling.plans.plan_file import PlanError
from megatron_emo.scaling.speed.cluster import Cluster, Link

SCHEMA = "megatron_emo.scaling_device/1"
_PRODUCTS = {"cpu": (96, 192, 320, 512), "cuda": (512, 2048, 4096, 8192)}
"""Sizes of square products."""
_PASS_BYTES = {"cpu": (1 << 16, 1 << 20, 1 << 22), "cuda": (1 << 20, 1 << 26, 1 << 28)}
_SENT_BYTES = {"cpu": (1 << 10, 1 << 17, 1 << 20), "cuda": (1 << 12, 1 << 22, 1 << 26)}
_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "send")
_SUM_ACCESSES = 3
_GATE_ACCESSES = 9
"""Of each element of its input by a gated activation, one operator at a time: a sigmoid's product
and the gate's forward, 2.5; their gradients, and the two halves' put together, 6.5."""
_CHAIN = 50
"""Operators in a row that a start is taken from."""
_BUDGET_S = 0.25
"""Seconds of one timing, at least."""
_LIMIT_S = 300


def measure_machine(threads: int, ranks_per_node: int, report: Callable[[str], None]) -> dict:
    """Return a device entry for `cluster_from_entry`; takes 10 to 30 s.

    Raises:
        PlanError: the two processes failed, with what they printed last.
    """
    report(f"measuring products, passes and collectives of two ranks, {threads} threads each")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "entry.json")
        command = [sys.executable, "-m", __spec__.name, str(out), "--threads", str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "EMO_MEASURE_STORE": folder}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [_root(), env.get("PYTHONPATH")]))
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            texts = [process.communicate(timeout=_LIMIT_S)[0] for process in processes]
        except subprocess.TimeoutExpired as error:
            raise PlanError(f"--measure: not done within {_LIMIT_S} s") from error
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(process.returncode for process in processes):
            tail = "\n".join(line for text in texts for line in text.splitlines()[-5:])
            raise PlanError(f"--measure: the ranks ended with an error:\n{tail}")
        entry = json.loads(out.read_text())
    return {**entry, "ranks_per_node": ranks_per_node}


def _root() -> str:
    return str(Path(__file__).resolve().parents[3])


def cluster_from_entry(entry: dict) -> Cluster:
    """Return the machine of an entry that `measure_machine` made.

    Raises:
        PlanError: another kind of JSON.
    """
    try:
        if entry["schema"] != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA!r}, got {entry['schema']!r}")
        alone, together = entry["alone"], entry["together"]
        link = Link(entry["link"]["latency"], entry["link"]["bandwidth"], entry["link"]["shares"])
        is_cpu = entry["kind"] == "cpu"
        return Cluster(
            name=entry["name"],
            flops=alone["flops"],
            attention_flops=alone["flops"],
            memory_bandwidth=alone["bandwidth"],
            start_s=alone["start_s"],
            memory=None if is_cpu else entry["memory"],
            ranks_per_node=entry["ranks_per_node"],
            within=link,
            between=replace(link),
            itemsize=4 if is_cpu else 2,
            is_cpu=is_cpu,
            cores=entry["cores"] // entry["threads"] if is_cpu else None,
            together=(together["flops"], together["bandwidth"], together["start_s"]),
            assumptions=_assumptions(entry),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"device entry: expected one that --measure wrote: {error!r}") from error


def _assumptions(entry: dict) -> tuple[str, ...]:
    lines = [
        f"{when}: products {rates['flops'] / 1e9:.4g} GFLOP/s, passes "
        f"{rates['bandwidth'] / 1e9:.3g} GB/s, {rates['start_s'] * 1e6:.3g} us a start "
        f"(measured {entry['date']}, {entry['threads']} threads a rank, {entry['cores']} cores)"
        for when, rates in (
            ("one rank alone", entry["alone"]),
            ("a rank beside another", entry["together"]),
        )
    ]
    link = entry["link"]
    shares = ", ".join(f"{name} {share:.2f}" for name, share in link["shares"].items())
    return (
        *lines,
        f"link ({entry['backend']}, 2 ranks): {link['latency'] * 1e6:.4g} us a step, "
        f"{link['bandwidth'] / 1e9:.3g} GB/s an all-reduce; of that, by operation: {shares}",
    )


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return (start, rate) of seconds = start + amount / rate, by least relative squares.

    A start below 0 is taken as 0.
    """
    x, y = np.asarray(amounts, float), np.asarray(seconds, float)
    design = np.stack([1 / y, x / y], axis=1)
    (start, slope), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    if start < 0 or slope <= 0:
        start, slope = 0.0, float(np.sum(x / y) / np.sum((x / y) ** 2))
    return float(start), float(1 / slope)


class _Rank:
    """One of the two processes."""

    def __init__(self, rank: int) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist, self.rank = torch, dist, rank
        self.kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
        self.device = torch.device(self.kind, rank if self.kind == "cuda" else None)
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = torch.bfloat16 if self.kind == "cuda" else torch.float32
        store = dist.FileStore(str(Path(os.environ["EMO_MEASURE_STORE"], "store")), 2)
        backend = "nccl" if self.kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=_LIMIT_S)
        )
        self.backend = backend

    def seconds(self, act: Callable[[], Any], repeats: int | None = None) -> float:
        """Return the mean of one call: of a step it is the sum that counts, interruptions too.

        Args:
            repeats: the same on both ranks, where they exchange; else by time.
        """
        act()
        self.wait()
        count, seconds = 0, 0.0
        begun = time.perf_counter()
        while count < (repeats or 5) or (repeats is None and seconds < _BUDGET_S):
            act()
            self.wait()
            count += 1
            seconds = time.perf_counter() - begun
        return seconds / count

    def wait(self) -> None:
        if self.kind == "cuda":
            self.torch.cuda.synchronize()

    def rates(self) -> dict[str, float]:
        """Return flops, bandwidth and start_s of this rank now."""
        torch, flops, products = self.torch, [], []
        for size in _PRODUCTS[self.kind]:
            a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
            flops.append(2.0 * size**3)
            products.append(self.seconds(lambda a=a, b=b: a @ b))
        moved, passes = [], []
        for num_bytes in _PASS_BYTES[self.kind]:
            act, accesses = self._pass(num_bytes)
            moved.append(float(accesses * num_bytes))
            passes.append(self.seconds(act))
        return {
            "flops": fit_line(flops, products)[1],
            "bandwidth": fit_line(moved, passes)[1],
            "start_s": self._start(),
        }

    def _pass(self, num_bytes: int) -> tuple[Callable[[], Any], int]:
        """The call, and how often it reads or writes each element.

        A GPU computes under its reads. A core does not: between products most of its time goes
        into exponentials and into results in new memory, and a sum within its cache would promise
        five times what layers see.
        """
        torch = self.torch
        x = torch.randn(num_bytes // self.dtype.itemsize, device=self.device).to(self.dtype)
        if self.kind == "cuda":
            return lambda: torch.add(x, x), _SUM_ACCESSES
        x = x.view(-1, 256).requires_grad_()
        gradient = torch.randn_like(x[:, :128])

        def gate() -> None:
            a, b = x.chunk(2, dim=-1)
            x.grad = None
            (torch.nn.functional.silu(a) * b).backward(gradient)

        return gate, _GATE_ACCESSES

    def _start(self) -> float:
        """Return seconds of an operator on next to nothing, autograd's part included."""
        tiny = self.torch.ones(16, device=self.device, requires_grad=True)

        def chain() -> None:
            x = tiny
            for _ in range(_CHAIN):
                x = x * tiny
            x.sum().backward()

        return self.seconds(chain) / (2 * _CHAIN)

    def exchange(self) -> dict[str, Any]:
        """Return latency, bandwidth and shares of the link, from this rank's means."""
        lines = {}
        for name in _OPERATIONS:
            sent, seconds = [], []
            for num_bytes in _SENT_BYTES[self.kind]:
                act, factor = self._operation(name, num_bytes)
                sent.append(factor * num_bytes)
                seconds.append(self.seconds(act, repeats=15))
            lines[name] = fit_line(sent, seconds)
        start, bandwidth = lines["all_reduce"]
        # Two ranks: an all-reduce is two steps, the others are one.
        return {
            "latency": max(start / 2, 1e-9),
            "bandwidth": bandwidth,
            "shares": {name: rate / bandwidth for name, (_, rate) in lines.items()},
            "measured": {name: {"start_s": s, "bandwidth": r} for name, (s, r) in lines.items()},
        }

    def _operation(self, name: str, num_bytes: int) -> tuple[Callable[[], Any], float]:
        """The call, and what a rank sends over the bytes of the whole tensor."""
        torch, dist = self.torch, self.dist
        count = num_bytes // self.dtype.itemsize
        whole = torch.zeros(count, device=self.device, dtype=self.dtype)
        half = torch.zeros(count // 2, device=self.device, dtype=self.dtype)
        if name == "all_reduce":
            return lambda: dist.all_reduce(whole), 1.0
        if name == "all_gather":
            return lambda: dist.all_gather_into_tensor(whole, half), 0.5
        if name == "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(half, whole), 0.5
        other, received = 1 - self.rank, torch.empty_like(whole)

        def swap() -> None:
            works = [dist.isend(whole, other), dist.irecv(received, other)]
            for work in works:
                work.wait()

        return swap, 1.0


def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args(argv)
    rank = _Rank(args.rank)
    import torch

    torch.set_num_threads(args.threads)
    alone = rank.rates() if args.rank == 0 else None
    rank.dist.barrier()
    together = rank.rates()
    rank.dist.barrier()
    link = rank.exchange()
    found = [None, None]
    rank.dist.all_gather_object(found, together)
    if args.rank == 0:
        slower = {
            key: (max if key == "start_s" else min)(one[key] for one in found) for key in together
        }
        Path(args.out).write_text(json.dumps(_entry(rank, args, alone, slower, link)))
    rank.dist.destroy_process_group()


def _entry(rank: _Rank, args: argparse.Namespace, alone: dict, together: dict, link: dict) -> dict:
    torch = rank.torch
    is_cpu = rank.kind == "cpu"
    return {
        "schema": SCHEMA,
        "kind": rank.kind,
        "name": "CPU" if is_cpu else torch.cuda.get_device_name(),
        "backend": rank.backend,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": args.threads,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory": None if is_cpu else torch.cuda.get_device_properties(0).total_memory,
        "alone": alone,
        "together": together,
        "link": link,
    }


if __name__ == "__main__":
    _main()
