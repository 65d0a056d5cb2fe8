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
        assert [row[1] for row in rows if row[:1] == [variant] and len(row) == 6] == ["wall", "cpu"]
    assert "round 2/2" in shown.err and "round" not in shown.out.replace("rounds", "")
    stored = json.loads((tmp_path / "out.json").read_text())
    ratio = stored["results"]["emo1-logits"]["ratios"]["wall"]["mle-logits"]
    assert table[-2].split()[:5] == [
        *("emo1-logits", "over", "mle-logits", "wall"),
        f"{ratio['median']:.3f}",
    ]
    assert (tmp_path / "out.png").stat().st_size > 0


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
