"""The checks in their order, each with one result, whatever becomes of the others."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_emo.gpu_check.environment import check_environment
from megatron_emo.gpu_check.kernels import check_kernels
from megatron_emo.gpu_check.memory import check_memory
from megatron_emo.gpu_check.narrow_tables import check_narrow_tables
from megatron_emo.gpu_check.parity import check_loss_parity
from megatron_emo.gpu_check.record import Figure, Record, Settings, SkippedCheck
from megatron_emo.gpu_check.synchronisation import check_synchronisation
from megatron_emo.gpu_check.timing import check_timing
from megatron_emo.gpu_check.training import check_training

Check = Callable[[Settings, Record], None]

CHECKS: dict[str, Check] = {
    "environment": check_environment,
    "kernels": check_kernels,
    "loss-parity": check_loss_parity,
    "narrow-tables": check_narrow_tables,
    "synchronisation": check_synchronisation,
    "memory": check_memory,
    "timing": check_timing,
    "training": check_training,
}

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class CheckResult:
    """What became of one check."""

    name: str
    status: str
    """passed, failed or skipped."""
    reason: str
    """Why it failed or was skipped; "" where it passed."""
    seconds: float
    figures: list[Figure]
    """Those found before it ended."""

    @property
    def summary(self) -> str:
        """The reason's first line."""
        return self.reason.partition("\n")[0]


def describe_check(name: str) -> str:
    """Return the first line a check says of itself."""
    return (CHECKS[name].__doc__ or "").partition("\n")[0]


def run_checks(
    settings: Settings,
    names: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> list[CheckResult]:
    """Return one result per check, in the order of CHECKS; an exception fails its check alone.

    Args:
        names: of CHECKS; all by default.
        report: is given a line before and after each check.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"--only: expected of {', '.join(CHECKS)}, got {name!r}")
    chosen = [name for name in CHECKS if name in names or not names]
    results = []
    for i, name in enumerate(chosen):
        report(f"[{i + 1}/{len(chosen)}] {name}: {describe_check(name)}")
        results.append(_run_check(name, settings))
        result = results[-1]
        detail = f": {result.summary}" if result.reason else f", {len(result.figures)} figures"
        report(f"[{i + 1}/{len(chosen)}] {name} {result.status} in {result.seconds:.1f} s{detail}")
    return results


def has_failed(results: Sequence[CheckResult]) -> bool:
    """True where a check failed."""
    return any(result.status == FAILED for result in results)


def _run_check(name: str, settings: Settings) -> CheckResult:
    record, start = Record(), time.perf_counter()
    try:
        with _exact_fp32_products():
            _free_memory(settings)
            CHECKS[name](settings, record)
        status, reason = _verdict(record)
    except SkippedCheck as skipped:
        status, reason = SKIPPED, str(skipped)
    # A device error, an exhausted memory or a missing symbol must not keep the rest from running.
    except Exception as error:
        status, reason = FAILED, f"{type(error).__name__}: {error}"
    return CheckResult(name, status, reason, time.perf_counter() - start, record.figures)


def _verdict(record: Record) -> tuple[str, str]:
    if not record.failures:
        return PASSED, ""
    count = len(record.failures)
    first = record.failures[0].name
    return FAILED, first if count == 1 else f"{first} and {count - 1} more"


@contextmanager
def _exact_fp32_products() -> Iterator[None]:
    """Without TF32, whose ten bits would drown the errors looked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _free_memory(settings: Settings) -> None:
    """Give back what the last check left: the next one looks at what is free."""
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.synchronize()  # a device broken by the last check says so here, not halfway
        torch.cuda.empty_cache()
