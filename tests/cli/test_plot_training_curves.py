"""tools/plot_training_curves.py through its main()."""

from __future__ import annotations

import pytest
from torch.utils.tensorboard import SummaryWriter


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("plot_training_curves").main


@pytest.fixture
def run(tmp_path) -> str:
    """NAME=DIR of a run with two iterations and a validation."""
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for iteration, value in ((1, 7.0), (2, 6.0)):
            writer.add_scalar("lm loss", value, iteration)
        writer.add_scalar("lm loss validation", 6.5, 2)
    return f"mine={tmp_path / 'run'}"


def test_an_image_and_a_table_come_out(tmp_path, run, main, capsys):
    output = tmp_path / "curves.png"
    main(["--run", run, "--output", str(output), "--scalars", "lm loss"])
    printed = capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "mine: the last validation 'lm loss' is 0.500 nats below" in printed
    assert f"curves: {output}" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run", "{run}"], "no run logged 'emo loss'; logged are lm loss, lm loss validation"),
        (["--run", "x={folder}"], "expected TensorBoard event files"),
        (["--run", "{folder}"], "--run: expected NAME=DIR"),
        (["--run", "{run}", "--run", "{run}"], "--run: expected NAME=DIR with a name of its own"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, run, main, argv, message):
    words = [word.format(run=run, folder=tmp_path) for word in argv]
    with pytest.raises(SystemExit, match=f"^plot_training_curves: .*{message}") as caught:
        main([*words, "--output", str(tmp_path / "o.png")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.png").exists()


def test_help_shows_the_docstrings_command(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python tools/plot_training_curves.py --run" in capsys.readouterr().out
