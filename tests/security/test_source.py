"""What no line of the package, the tools and the examples does, found in their syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    ROOT / "pretrain_gpt_emo.py",
    *(
        path
        for part in ("megatron_emo", "tools", "examples")
        for path in (ROOT / part).rglob("*.py")
    ),
]
EXCEPTIONS = {
    # Unpickles, with a list of the classes it may find.
    ROOT / "megatron_emo" / "torch_dist" / "index.py": ["pickle.Unpickler"],
    # Becomes the command that its own parent names, so that the kernel's signal reaches it.
    ROOT / "megatron_emo" / "launch" / "lifetime.py": ["os.execvp"],
}
"""What these files, and no others, may call."""
NEVER = {
    "builtins": {"eval", "exec", "compile", "__import__"},
    "pickle": {"load", "loads", "Unpickler"},
    "_pickle": {"load", "loads", "Unpickler"},
    **dict.fromkeys(("dill", "cloudpickle", "joblib", "marshal"), {"load", "loads", "Unpickler"}),
    "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"},
    "os": {"system", "popen", "execvp", "execv", "execl", "execlp", "spawnl", "spawnv"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "tempfile": {"mktemp"},
    "tarfile": {"open"},
    "zipfile": {"ZipFile"},
    "shutil": {"unpack_archive"},
    "torch.hub": {"load", "download_url_to_file", "load_state_dict_from_url"},
}
_HUGGING_FACE = re.compile(r"(Auto|GPT2|Llama|Generation|PreTrained)\w*|model_class")


class Finder(ast.NodeVisitor):
    """Collects what is refused, with names resolved through the file's imports."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._names: dict[str, str] = {}
        self._keywords: dict[str, set[str]] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            self._names[name] = alias.name if alias.asname else name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            known = {f"{ast.unparse(k)}={ast.unparse(v)}" for k, v in pairs if k is not None}
            self._keywords[node.targets[0].id] = known
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self._refuse(node, "assert, which python -O leaves out")

    def visit_Name(self, node: ast.Name) -> None:
        self._check_name(node, self._names.get(node.id, f"builtins.{node.id}"))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._check_name(node, self._full_name(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self._full_name(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        if name == "torch.load" and given.get("weights_only") != "True":
            self._refuse(node, "torch.load without weights_only=True")
        if (
            name in ("numpy.load", "numpy.lib.format.read_array")
            and given.get("allow_pickle") == "True"
        ):
            self._refuse(node, f"{name} with allow_pickle=True")
        for keyword in ("shell", "trust_remote_code"):
            if given.get(keyword, "False") not in ("False", keyword):
                self._refuse(node, f"{keyword}={given[keyword]}")
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if method == "from_pretrained":
            self._check_from_pretrained(node, given)
        self.generic_visit(node)

    def _check_from_pretrained(self, node: ast.Call, given: dict[str, str]) -> None:
        """Of a class that may have code of the folder's own: no such code, and nothing fetched."""
        spread = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
        known = set().union(*(self._keywords.get(name, set()) for name in spread))
        has_no_code = (
            given.get("trust_remote_code") == "False" or "'trust_remote_code'=False" in known
        )
        owner = ast.unparse(node.func.value).split(".")[-1]
        if owner.startswith("Auto") and not has_no_code:
            self._refuse(node, f"{owner}.from_pretrained without trust_remote_code=False")

    def _check_name(self, node: ast.AST, name: str) -> None:
        module, _, last = name.rpartition(".")
        if last in NEVER.get(module, ()):
            self._refuse(node, name)

    def _full_name(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._full_name(node.value)}.{node.attr}"
        return self._names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    def _refuse(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {node.lineno}: {what}")


def findings(source: str) -> list[str]:
    finder = Finder()
    finder.visit(ast.parse(source))
    return finder.found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous_is_called(path):
    found = findings(path.read_text(encoding="utf-8"))
    assert [line.split(": ")[1] for line in found] == EXCEPTIONS.get(path, [])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle; pickle.loads(b)",
        "from pickle import load as read; read(f)",
        "import pickle as p; p.Unpickler(f).load()",
        "import torch; torch.load(f)",
        "import torch as t; t.load(f, weights_only=False)",
        "from torch import load; load(f)",
        "import yaml; yaml.load(f, Loader=yaml.SafeLoader)",
        "eval('1')",
        "run = exec",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import os; os.system('ls')",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "AutoModel.from_pretrained(d)",
        "import transformers; transformers.AutoConfig.from_pretrained(d, local_files_only=True)",
        "assert x > 0, 'bad'",
    ],
)
def test_what_is_refused_is_found(line):
    assert findings(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(f, weights_only=True)",
        "import yaml; yaml.safe_load(f)",
        "model.eval()",
        "import re; re.compile('a')",
        "_LOCAL = {'trust_remote_code': False}\nAutoModel.from_pretrained(d, **_LOCAL)",
    ],
)
def test_what_is_harmless_is_not(line):
    assert findings(line) == []


def test_python_o_changes_nothing_that_is_checked():
    """A refusal of ours, in a process whose asserts are gone."""
    code = (
        "from megatron_emo.foreign_files import file_inside\n"
        "try: file_inside('.', '../x', 'index')\n"
        "except ValueError: print('refused', __debug__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == "refused False\n", result.stderr


@pytest.mark.parametrize(
    ("name", "floor", "why"),
    [
        ("torch", "2.10", "CVE-2025-32434 (2.6), CVE-2026-24747 (2.10): weights_only got round"),
        ("transformers", "5.3", "CVE-2026-4372, CVE-2026-5241: code without trust_remote_code"),
        ("safetensors", "0.4.3", ""),
        ("megatron-core", "0.19", "CVE-2026-24150, CVE-2026-24152 (0.15.3)"),
    ],
)
def test_floors_exclude_versions_with_known_holes(name, floor, why):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirement = next(r for r in map(Requirement, project["dependencies"]) if r.name == name)
    before = Version(floor).release
    before = ".".join(map(str, (*before[:-1], before[-1] - 1, 99)))
    assert before not in requirement.specifier, why
    assert Version(floor) in requirement.specifier or name == "megatron-core"
