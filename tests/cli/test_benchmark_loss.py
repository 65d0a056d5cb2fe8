"""tools/benchmark_loss.py through its main()."""

from __future__ import annotations

import json

import pytest

SIZES = "--num-tokens 12 --vocab-size 40 --hidden-size 6 --cost-dim 5 --rounds 2 --warmup 1".split()


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("benchmark_loss").main


def test_table_on_stdout_progress_on_stderr_json_and_picture_in_files(tmp_path, main, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]
    main([*SIZES, "--variants", "mle-logits", "emo1-logits", *files])
    shown = capsys.readouterr()
    table = shown.out.splitlines()
    assert "Zipf-Mandelbrot" in shown.out
    rows = [line.split() for line in table]
    for variant in ("mle-logits", "emo1-logits"):
        assert [row[1] for row in rows if row[:1] == [variant] and len(row) == 7] == ["wall", "cpu"]
    assert "round 2/2" in shown.err and "round" not in shown.out.replace("rounds", "")
    stored = json.loads((tmp_path / "out.json").read_text())
    ratio = stored["results"]["emo1-logits"]["ratios"]["wall"]["mle-logits"]
    assert table[-2].split()[:5] == [
        *("emo1-logits", "over", "mle-logits", "wall"),
        f"{ratio['median']:.3f}",
    ]
    assert (tmp_path / "out.png").stat().st_size > 0


def test_collectives_are_counted_in_ranks_of_their_own(tmp_path, main, capsys):
    output = tmp_path / "out.json"
    chosen = ["--variants", "emo1-fused-recompute", "torch-ce", "--ids", "distinct"]
    main([*SIZES, *chosen, "--tensor-parallel", "2", "--json", str(output)])
    # 12 distinct rows of 5, 16 bytes a token, and dX [12, 6].
    expected = {"all_reduce": 12 * 5 * 4, "all_gather": 16 * 12}
    stored = json.loads(output.read_text())["results"]
    assert dict(stored["emo1-fused-recompute"]["traffic"]["forward"]) == expected
    assert stored["emo1-fused-recompute"]["traffic"]["backward"] == [["all_reduce", 12 * 6 * 4]]
    assert stored["torch-ce"]["traffic"] is None
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["emo1-fused-recompute", "backward", "288", "288", "all_reduce", "288"] in rows


def test_a_sweep_instead_of_times(tmp_path, main, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]
    sizes = ["--sweep-tokens", "8", "16", "--sweep-vocab", "40", "80"]
    main([*SIZES, *sizes, "--variants", "torch-ce", *files])
    shown = capsys.readouterr()
    assert "N=16 V=40: torch-ce" in shown.err and "clock" not in shown.out
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["run"]["source"] == "drawn from a Zipf-Mandelbrot law, --seed 1234"
    assert f"{stored['results']['torch-ce']['bytes_per_token']:,.0f}" in shown.out
    assert (tmp_path / "out.png").stat().st_size > 0


TINY = """
    --num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 --seq-length 8
    --max-position-embeddings 8 --micro-batch-size 1 --global-batch-size 1 --lr 1e-3 --mock-data
    --split 98,1,1 --tokenizer-type NullTokenizer --vocab-size 40 --num-workers 0
    --eval-iters 0 --eval-interval 9
""".split()


@pytest.mark.slow
def test_whole_training_steps(tmp_path, main, capsys):
    pytest.importorskip("megatron.core")
    output = tmp_path / "out.json"
    main(
        [
            "--steps",
            "5",
            "--rounds",
            "1",
            "--objectives",
            "emo1",
            "--json",
            str(output),
            "--",
            *TINY,
        ]
    )
    shown = capsys.readouterr()
    assert "round 1/1, emo1: median" in shown.err
    stored = json.loads(output.read_text())
    (times,) = stored["results"]["emo1"]["seconds"]
    assert len(times) == 2 and all(0 < time < 60 for time in times)
    assert stored["run"]["flags"] == TINY
    assert [line for line in shown.out.splitlines() if line.startswith("emo1 ")]


def test_sizes_and_dtype_reach_the_measurement(tmp_path, main):
    output = tmp_path / "out.json"
    main([*SIZES, "--dtype", "bf16", "--variants", "torch-ce", "--json", str(output)])
    stored = json.loads(output.read_text())
    config = stored["run"]["config"]
    assert (config["num_tokens"], config["vocab_size"], config["dtype"]) == (12, 40, "bf16")
    assert config["variants"] == ["torch-ce"]
    assert 1e-4 < stored["results"]["torch-ce"]["gradient_error"] < 1e-1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "emo9"], "--variants: expected mle-logits"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--tokens", "nowhere"], "--tokens: expected a .npy file"),
        (["--", "--lr", "1"], "--lr: flags behind -- are for --steps"),
        (["--steps", "2"], "--steps: expected more than the 3 that are dropped, got 2"),
        (["--steps", "9", "--png", "x"], "--png: draws the layer alone"),
        (["--sweep-vocab", "9"], "--sweep-vocab: expected at least 2 sizes"),
        (["--sweep-vocab", "9", "8", "--tensor-parallel", "2"], "--tensor-parallel: counts"),
        (["--text", "nowhere"], "--text and --tokenizer: expected both"),
    ],
)
def test_mistakes_end_in_one_line(main, argv, message):
    with pytest.raises(SystemExit, match=f"^benchmark_loss: {message}") as caught:
        main([*SIZES, *argv])
    assert "\n" not in str(caught.value)


def test_help_is_shown(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--num-tokens" in capsys.readouterr().out
