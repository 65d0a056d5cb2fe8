"""Times of the output layer with its loss at the sizes of an 8B model, all in one run."""

from __future__ import annotations

from statistics import median

import torch

from megatron_emo.benchmark.config import BenchmarkConfig
from megatron_emo.benchmark.measure import VariantResult, run_benchmark
from megatron_emo.benchmark.tokens import zipf_token_ids
from megatron_emo.benchmark.variants import VARIANTS
from megatron_emo.gpu_check.memory import VOCAB_SIZES
from megatron_emo.gpu_check.record import Record, Settings

RATIO_BOUND = 1.15
"""emo1 over mle on the same path, with a bf16 table."""
FP8_RATIO_BOUND = 1.10
FORWARD_BOUND_MS = 45.0
"""emo1-fused-forward at the larger vocabulary, on an H200."""
_PATHS = ("logits", "fused-logits", "fused-recompute", "fused-forward")
_HOPPER = (9, 0)


def check_timing(settings: Settings, record: Record) -> None:
    """emo1 over mle on every path at the sizes of an 8B model; milliseconds on an H200."""
    if settings.device == "cuda":
        record.note("device", torch.cuda.get_device_name())
    for vocab_size in VOCAB_SIZES if settings.is_full else (211,):
        results, distinct = time_variants(settings, vocab_size)
        record.note(f"V={vocab_size} distinct targets over tokens", distinct)
        for name, result in results.items():
            record_variant(settings, record, vocab_size, name, results, result)


def chosen_variants() -> tuple[str, ...]:
    """Return plain cross-entropy and {mle, emo1} on every path, with fp8 tables where there are."""
    names = [f"{objective}-{path}" for path in _PATHS for objective in ("mle", "emo1")]
    names += [name for name in VARIANTS if name.startswith("emo1") and "fp8" in name]
    chosen = ["torch-ce", *names]
    return tuple(name for name in chosen if name in VARIANTS and VARIANTS[name].is_available())


def time_variants(settings: Settings, vocab_size: int) -> tuple[dict[str, VariantResult], float]:
    """Return (one result per variant, distinct targets over tokens)."""
    num_tokens, width, rounds, warmup = (8192, 4096, 20, 3) if settings.is_full else (48, 16, 2, 1)
    target = zipf_token_ids(num_tokens, vocab_size, seed=5)
    config = BenchmarkConfig(
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        hidden_size=width,
        cost_dim=width,
        dtype="bf16",
        device=settings.device,
        rounds=rounds,
        warmup=warmup,
        variants=chosen_variants(),
    )
    return run_benchmark(config, target), len(target.unique()) / num_tokens


def record_variant(
    settings: Settings,
    record: Record,
    vocab_size: int,
    name: str,
    results: dict[str, VariantResult],
    result: VariantResult,
) -> None:
    """Add a variant's milliseconds and, for emo1, its ratio to mle on the same path."""
    times = _first_clock(result)
    # Ratios are promised for cards whose tensor cores outrun the row kernels as Hopper's do.
    applies = settings.is_full and torch.cuda.get_device_capability() >= _HOPPER
    is_headline = name == "emo1-fused-forward" and vocab_size == max(VOCAB_SIZES)
    record.bound(
        f"V={vocab_size} {name}: ms (median)",
        1000 * median(times),
        FORWARD_BOUND_MS,
        applies=applies and is_headline and "H200" in torch.cuda.get_device_name(),
    )
    base = VARIANTS[name].baseline
    if name.startswith("emo1") and base in results:
        others = _first_clock(results[base])
        ratio = median(a / b for a, b in zip(times, others, strict=True))
        bound = FP8_RATIO_BOUND if "fp8" in name else RATIO_BOUND
        record.bound(f"V={vocab_size} {name} over {base}", ratio, bound, applies=applies)


def _first_clock(result: VariantResult) -> list[float]:
    """Seconds per round: of the device on a GPU, of the wall on a CPU."""
    return next(iter(result.seconds.values()))
