"""--emo-cost-dim through pretrain(): trains as on a table reduced beforehand; what is refused."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file

from megatron_emo.cost_embedding import CostEmbeddingInfo, write_cost_embedding
from megatron_emo.cost_embedding.reduce import reduce_rows
from megatron_emo.torch_dist import read_arguments, resolve_checkpoint_dir

TP2 = ("--tensor-model-parallel-size", "2")
SHORT = ("--train-iters", "4", "--eval-interval", "4")


@pytest.fixture
def reduced_table(tmp_path, cost_embedding) -> str:
    """The table of 10 columns reduced to 4 in one process."""
    path = tmp_path / "reduced.safetensors"
    rows, _ = reduce_rows(load_file(cost_embedding)["cost_embedding"], 4)
    write_cost_embedding(path, rows, source="test", tokenizer_fingerprint="", source_dim=10)
    return str(path)


def test_trains_as_on_a_table_reduced_beforehand_and_resumes_with_that_dim_alone(
    run_pretraining, tmp_path, cost_embedding, reduced_table
):
    folder = str(tmp_path / "checkpoint")
    save = ("--save", folder, "--save-interval", "4")
    ours = run_pretraining(2, *SHORT, *TP2, *save, "--emo-cost-dim", "4")
    beforehand = run_pretraining(2, *SHORT, *TP2, cost=reduced_table)
    for name in ("lm loss", "emo loss", "grad-norm"):
        assert sorted(ours[name]) == [1, 2, 3, 4]
        for iteration, value in beforehand[name].items():
            assert ours[name][iteration] == pytest.approx(value, abs=1e-5), (name, iteration)

    sha256 = CostEmbeddingInfo.from_file(cost_embedding).sha256
    saved = read_arguments(resolve_checkpoint_dir(folder))
    assert saved.emo_cost_embedding_id == f"{sha256}:dim=4"
    # As many columns as the file has are no reduction.
    for dim, found in ((None, sha256), ("5", f"{sha256}:dim=5"), ("10", sha256)):
        flags = () if dim is None else ("--emo-cost-dim", dim)
        message = f"has id {found}, the checkpoint .* id {saved.emo_cost_embedding_id}; .*-cost-dim"
        run_pretraining(1, *SHORT, "--load", folder, *flags, error=message)


@pytest.mark.parametrize(
    ("cost", "dim", "message"),
    [
        ("file", "12", "--emo-cost-dim 12: --emo-cost-embedding {file} has 10 columns"),
        ("file", "0", "--emo-cost-dim 0: dim: expected >= 1, got 0"),
        ("output-layer", "4", "--emo-cost-dim 4: .*expected a file .* got output-layer"),
    ],
)
def test_what_cannot_be_reduced_is_refused_by_the_flag(
    run_pretraining, cost_embedding, cost, dim, message
):
    path = str(cost_embedding)
    source = path if cost == "file" else cost
    message = message.replace("{file}", re.escape(path))
    run_pretraining(1, *SHORT, "--emo-cost-dim", dim, cost=source, error=message)
