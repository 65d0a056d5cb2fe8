"""Tables of runs drawn from known laws, for tests of scaling studies."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_emo.scaling.comparison.pairs import Runs
from megatron_emo.scaling.laws.surfaces import Surface

LAWS = {
    "mle": Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "emo1": Surface(E=1.69, A=380.0, B=395.0, alpha=0.34, beta=0.28),
    "emo2": Surface(E=1.69, A=400.0, B=402.0, alpha=0.34, beta=0.28),
}
LOSS_SHARE = {"mle": 1.0, "emo1": 1.03, "emo2": 1.05}
"""FLOPs with the loss over those without."""


def flops_per_token(params: np.ndarray) -> np.ndarray:
    """Return C / D of a made-up family whose small models count more than 6 N."""
    return 6 * params * (1 + 0.3 * (params / 1e6) ** -0.3)


def write_runs(
    path: Path,
    objectives: Sequence[str] = ("mle", "emo1"),
    budgets: int = 4,
    sizes: int = 5,
    seeds: int = 2,
    noise: float = 0.003,
    with_hours: bool = True,
) -> Path:
    """Write a runs.csv: budgets x sizes x seeds for each objective, two parts of noise of three
    shared by a pair."""
    rng = np.random.default_rng(0)
    names = ["name", "objective", "seed", "size", "budget", "params", "tokens", "flops"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "gpu_hours", "loss"])
        for budget in 1e15 * 4.0 ** np.arange(budgets):
            for params in LAWS["mle"].optimum(budget)[0] * np.geomspace(0.25, 4, sizes):
                for seed in range(seeds):
                    shared = rng.normal(0, noise)
                    for name in objectives:
                        tokens = budget / flops_per_token(params)
                        flops = budget * LOSS_SHARE[name]
                        loss = LAWS[name].loss(params, tokens)
                        loss *= np.exp(shared + rng.normal(0, noise / 2))
                        run = f"{name}-{params:.0f}-{seed}"
                        hours = flops / 1e18 if with_hours else ""
                        writer.writerow(
                            [run, name, seed, f"{params:.0f}", budget, params, tokens, flops]
                            + [hours, loss]
                        )
    return path


def make_runs(law: Surface, noise: np.ndarray | None = None, budgets: int = 4) -> Runs:
    """Return runs of one seed, budgets x 5 sizes, with log-losses moved by noise [n]."""
    flops = np.repeat(np.geomspace(1e15, 1e17, budgets), 5)
    params = np.sqrt(flops / 120) * np.tile(np.geomspace(0.3, 3, 5), budgets)
    tokens = flops / 6 / params
    loss = law.loss(params, tokens)
    if noise is not None:
        loss = loss * np.exp(noise)
    count = len(loss)
    return Runs(
        np.arange(count), params, tokens, flops, loss, None, None, ("",) * count, None, None
    )
