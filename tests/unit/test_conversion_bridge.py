"""What can be told of the Bridge engine where megatron-bridge is absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import save_model

from megatron_emo.conversion import bridge
from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.import_hf import ImportOptions, import_hf

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_names_the_pinned_versions():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    named = [word for word in bridge.INSTALL_COMMAND.split() if "==" in word]
    assert len(named) == 3
    assert set(named) <= set(pins)


def test_a_missing_engine_is_an_error_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(bridge, "is_available", lambda: False)
    for call in (
        lambda: bridge.hf_to_model(tmp_path, torch.nn.Module()),
        lambda: next(bridge.model_to_hf(torch.nn.Module(), None)),
        bridge.supported_architectures,
    ):
        with pytest.raises(ImportError, match="pip install --no-deps megatron-bridge==0.6.2"):
            call()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_other_layers_than_it_fills_are_refused(tmp_path, name):
    save_model(name, tmp_path / "hf")
    options = ImportOptions(engine="bridge", transformer_impl="transformer_engine")
    message = "--transformer-impl transformer_engine: expected local with --engine bridge"
    with pytest.raises(ConversionError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "mg", options, say=len)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_wheels_beside_the_environment_are_found_and_not_imported(tmp_path):
    """`megatron` is a namespace package: its parts may lie in two places."""
    package = tmp_path / "bridge" / "megatron" / "bridge"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    code = f"""
import sys
from pathlib import Path
import megatron
from megatron_emo.conversion import bridge
bridge.BESIDE_ENVIRONMENT = Path({str(tmp_path / "bridge")!r})
assert bridge.is_available()
assert "megatron.bridge" not in sys.modules and "megatron.core" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
