"""The direction of imports, and that the loss needs neither Megatron nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_emo"

# A part may import itself and what stands beside it; parts are the names under megatron_emo/.
MAY_IMPORT = {
    "__init__": {"loss", "objectives"},
    "config": set(),
    "objectives": {"config"},
    "reference": set(),
    "vocabulary": set(),
    "foreign_files": set(),
    "whole_files": set(),
    "torch_dist": {"foreign_files"},
    "cost_embedding": {"vocabulary", "torch_dist", "foreign_files"},
    "loss": {"objectives", "config", "cost_embedding"},
    "benchmark": {
        "loss",
        "objectives",
        "config",
        "cost_embedding",
        "reference",
        "data",
        "training_curves",
    },
    "gpu_check": {
        *("loss", "objectives", "config", "cost_embedding", "reference"),
        *("benchmark", "training_curves"),
    },
    "data": set(),
    "training_curves": set(),
    "evaluation": {"objectives", "config", "foreign_files", "whole_files"},
    "report": {"evaluation", "foreign_files", "whole_files"},
    "scaling": {
        *("evaluation", "conversion", "checkpoints", "report", "study", "launch"),
        *("benchmark", "foreign_files", "whole_files"),
    },
    "study": {"evaluation", "whole_files"},
    "hf": {"loss", "objectives", "cost_embedding", "config"},
    "conversion": {"torch_dist", "foreign_files", "vocabulary", "training", "evaluation"},
    "launch": {"checkpoints", "data", "torch_dist"},
    "checkpoints": {"torch_dist"},
    "training": {
        *("loss", "objectives", "cost_embedding", "config", "torch_dist", "data"),
        *("launch", "checkpoints"),
    },
}
# Where `megatron` may be imported, and whether at the top of a file or inside functions alone.
MEGATRON_AT_TOP = {"training"}
MEGATRON_INSIDE = {"training", "data", "benchmark", "conversion"}


def python_files():
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether it is imported at the top of the file) of every import statement."""
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [node.module]
                if node.module != "megatron_emo"
                else [f"megatron_emo.{alias.name}" for alias in node.names]
            )
        found += [(name, node in top) for name in names]
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_map(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part}: say in MAY_IMPORT what it may import"
    for module, is_top in imported(ast.parse(path.read_text())):
        head, *rest = module.split(".")
        if head == "megatron_emo" and rest:
            assert rest[0] in MAY_IMPORT[part] | {part}, f"{part} imports {module}"
        if head == "megatron":
            allowed = MEGATRON_AT_TOP if is_top else MEGATRON_INSIDE
            assert part in allowed, f"{part} imports {module}"
        assert head not in ("tools", "apex"), f"{part} imports {module}"


def test_every_part_exists():
    assert {part_of(path) for path in python_files()} == set(MAY_IMPORT)


def test_loss_needs_torch_alone():
    code = """
import sys
for absent in ("megatron", "transformers", "sentencepiece", "mauve", "matplotlib", "numpy"):
    sys.modules[absent] = None
import megatron_emo
assert "torch" not in sys.modules
import torch
out = megatron_emo.vocab_parallel_loss(
    torch.randn(2, 5), torch.tensor([0, 1]), megatron_emo.build_objective("emo1"), torch.eye(5)
)
assert out.loss.shape == (2,)
megatron_emo.EMOLoss
for name in megatron_emo.__all__:
    getattr(megatron_emo, name)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "path", [ROOT / "pretrain_gpt_emo.py", *sorted((ROOT / "tools").glob("*.py"))]
)
def test_entry_points_are_thin(path):
    lines = path.read_text().count("\n")
    assert lines <= (60 if path.parent == ROOT else 160), f"{path.name}: {lines} lines"
