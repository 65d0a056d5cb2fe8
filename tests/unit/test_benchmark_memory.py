"""What the benchmark says of memory: live storage, and how a peak grows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_emo.benchmark import sweep
from megatron_emo.benchmark.config import BenchmarkConfig
from megatron_emo.benchmark.memory import LiveStorage, peak_bytes
from megatron_emo.benchmark.problem import make_problem
from megatron_emo.benchmark.tokens import zipf_token_ids
from megatron_emo.benchmark.variants import VARIANTS

ZIPF = zipf_token_ids(12, 40, seed=3)


def test_live_storage_counts_what_is_alive_at_once_and_no_view_twice():
    before = torch.ones(1000)
    with LiveStorage() as live:
        first = before * 2  # 4000 bytes
        first.view(10, 100)[3:].add_(1)
        del first
        second = before + 1  # 4000 again, after the first has gone
        third = torch.empty(500)  # 2000
        third.copy_(second[:500])
        before.mul_(2)
    assert live.peak_bytes == 6000
    assert third[0] == 2


def test_live_storage_sees_the_backward_too():
    # With one token dW is larger than all that the forward makes.
    problem = make_problem(ZIPF[:1], 40, 6, 5, seed=0).to("cpu", torch.float32)
    logits, d_hidden, d_weight = 40 * 4, 6 * 4, 40 * 6 * 4
    with LiveStorage() as live:
        problem.gradients(F.linear(problem.hidden, problem.weight).sum())
    assert d_weight + d_hidden <= live.peak_bytes <= d_weight + d_hidden + logits


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch < 2.13")
def test_live_storage_looks_into_operators_written_in_python():
    problem = make_problem(ZIPF, 40, 6, 5, seed=0).to("cpu", torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=12)

    def loss():
        return F.linear_cross_entropy(
            problem.hidden, problem.weight, problem.target, options=options
        )

    logits, gradients = 12 * 40 * 4, (12 + 40) * 6 * 4
    assert peak_bytes(loss, problem) >= logits + gradients


def config(**change) -> BenchmarkConfig:
    sizes = {"num_tokens": 6, "vocab_size": 40, "hidden_size": 3, "cost_dim": 5}
    return BenchmarkConfig(**{**sizes, "variants": ("torch-ce", "mle-logits"), **change})


def load_ids(num_tokens, vocab_size):
    return zipf_token_ids(num_tokens, vocab_size, seed=0)


def test_a_sweep_finds_known_slopes(monkeypatch):
    def known(loss, problem):
        num_tokens, vocab_size = len(problem.hidden), len(problem.weight)
        gradients = (num_tokens + vocab_size) * 3 * 4
        return gradients + 1000 + 7 * num_tokens + 11 * vocab_size

    monkeypatch.setattr(sweep, "peak_bytes", known)
    results = sweep.run_sweep(config(), [8, 4, 12], [50, 40], load_ids)
    for result in results.values():
        assert [point.num_tokens for point in result.over_tokens] == [4, 8, 12]
        assert [point.vocab_size for point in result.over_vocab] == [40, 50]
        assert result.over_tokens[0].beyond_gradients == 1000 + 7 * 4 + 11 * 40
        assert result.over_vocab[1].beyond_gradients == 1000 + 7 * 6 + 11 * 50
        assert result.bytes_per_token == pytest.approx(7)
        assert result.bytes_per_vocab_entry == pytest.approx(11)


def test_recompute_grows_with_the_workspace_alone():
    """A logit is 4 bytes: plain cross-entropy holds several for every token and entry."""
    chosen = ("torch-ce", "mle-fused-recompute", "emo1-fused-recompute")
    sizes = {"num_tokens": 512, "vocab_size": 1500, "hidden_size": 8, "cost_dim": 8}
    few = config(**sizes, variants=chosen, workspace_mb=1)
    results = sweep.run_sweep(few, [512, 1024], [1500, 3000], load_ids)
    plain = results["torch-ce"]
    assert plain.bytes_per_token > 8 * 1500 and plain.bytes_per_vocab_entry > 8 * 512
    for name in chosen[1:]:
        assert abs(results[name].bytes_per_token) < 0.04 * plain.bytes_per_token
        assert abs(results[name].bytes_per_vocab_entry) < 0.04 * plain.bytes_per_vocab_entry
        assert results[name].over_tokens[-1].beyond_gradients < 3 * 2**20
    problem = few.make_problem(load_ids(512, 1500))
    peaks = {}
    for workspace_mb in (1, 2):
        object.__setattr__(problem, "workspace_mb", workspace_mb)
        peaks[workspace_mb] = peak_bytes(VARIANTS["mle-fused-recompute"].build(problem), problem)
    assert 2**19 < peaks[2] - peaks[1] < 2**21


def test_one_size_makes_no_line():
    with pytest.raises(ValueError, match="--sweep-vocab: expected at least 2 sizes, got 40 alone"):
        sweep.run_sweep(config(), [], [40, 40], load_ids)


def test_a_sweep_of_tokens_alone_says_nothing_of_the_vocabulary(tmp_path):
    results = sweep.run_sweep(config(), [4, 8], [], load_ids)
    assert results["torch-ce"].over_vocab == []
    assert results["torch-ce"].bytes_per_vocab_entry is None
    sweep.write_sweep_png(str(tmp_path / "out.png"), _run(), results)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    text = sweep.format_sweep(_run(), results)
    assert "bytes per token" in text and "bytes per vocab entry" not in text


def _run():
    config = {"hidden_size": 3, "cost_dim": 5, "dtype": "fp32", "workspace_mb": 1}
    versions = dict.fromkeys(("torch", "python", "commit", "date", "source"), "x")
    load = {"before": [1.0], "after": [1.0]}
    return {"config": config, "machine": "m", "num_threads": 1, "load_average": load, **versions}
