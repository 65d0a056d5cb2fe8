"""What asks for Transformer Engine, FP8 or FP4 is refused by its flag where it is not to be had."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from megatron_emo.training import transformer_engine
from megatron_emo.training.transformer_engine import check_transformer_engine, main


def arguments(**changed) -> Namespace:
    asked = {"transformer_impl": "transformer_engine", "fp8": None, "fp8_recipe": "delayed"}
    return Namespace(**{**asked, "fp4": None, **changed})


def importing(result):
    def import_module(name):
        if isinstance(result, Exception):
            raise result
        return Namespace(__version__="2.20")

    return import_module


@pytest.fixture
def installed(monkeypatch):
    """Return install(capability): Transformer Engine on a GPU of that capability, None for none."""
    monkeypatch.setattr(transformer_engine.importlib, "import_module", importing(None))

    def install(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")

    return install


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'transformer_engine'"), OSError("libcublas.so: nowhere")],
)
def test_what_to_install_is_said(monkeypatch, error):
    monkeypatch.setattr(transformer_engine.importlib, "import_module", importing(error))
    with pytest.raises(ValueError) as caught:
        check_transformer_engine(arguments())
    message = str(caught.value)
    assert message.startswith("--transformer-impl transformer_engine (the default): ")
    assert str(error) in message and type(error).__name__ in message
    assert "pip install --no-build-isolation 'transformer_engine[pytorch]'" in message
    assert "nvcr.io/nvidia/pytorch" in message
    assert "--transformer-impl local" in message and "bf16" not in message
    with pytest.raises(ValueError, match="--fp8-format e4m3 --fp8-recipe tensorwise: .* in bf16$"):
        check_transformer_engine(arguments(fp8="e4m3", fp8_recipe="tensorwise"))


def test_local_layers_need_nothing(monkeypatch):
    monkeypatch.setattr(transformer_engine.importlib, "import_module", importing(ImportError("no")))
    check_transformer_engine(arguments(transformer_impl="local"))


@pytest.mark.parametrize("asked", [{"fp8": "hybrid"}, {"fp4": "e2m1"}])
def test_formats_that_local_layers_would_pass_over_are_refused(installed, asked):
    installed((10, 0))
    name = next(iter(asked))
    with pytest.raises(ValueError, match=f"--{name}-format .*: with --transformer-impl local no"):
        check_transformer_engine(arguments(transformer_impl="local", **asked))


def test_fp8_without_a_gpu_is_refused(installed):
    installed(None)
    check_transformer_engine(arguments())
    with pytest.raises(ValueError, match="--fp8-format hybrid .* needs a GPU with Transformer Eng"):
        check_transformer_engine(arguments(fp8="hybrid"))


@pytest.mark.parametrize(
    ("asked", "needed", "too_old"),
    [
        ({"fp8": "hybrid"}, (8, 9), (8, 6)),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, (8, 9), (8, 0)),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, (9, 0), (8, 9)),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, (10, 0), (9, 0)),
        ({"fp4": "e2m1"}, (10, 0), (9, 0)),
    ],
)
def test_a_gpu_too_old_for_the_format_is_named(installed, asked, needed, too_old):
    installed(needed)
    check_transformer_engine(arguments(**asked))
    installed((12, 0))
    check_transformer_engine(arguments(**asked))
    installed(too_old)
    expected = f"capability {needed[0]}.{needed[1]} or above, found some GPU"
    with pytest.raises(ValueError, match=expected):
        check_transformer_engine(arguments(**asked))


def test_scripts_are_told_in_one_line(installed, capsys):
    installed((9, 0))
    main(["--fp8-format", "hybrid"])
    shown = capsys.readouterr().out
    assert shown == (
        "Transformer Engine 2.20, --fp8-format hybrid --fp8-recipe delayed: available\n"
    )
    main([])
    assert capsys.readouterr().out == "Transformer Engine 2.20, bf16: available\n"
    with pytest.raises(SystemExit, match="mxfp8: expected a GPU of compute capability 10.0"):
        main(["--fp8-format", "hybrid", "--fp8-recipe", "mxfp8"])
