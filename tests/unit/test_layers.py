"""Packages import only what stands to their left; the laziness of the top package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import narrows

ROOT = Path(narrows.__file__).parent
ORDER = [
    {"errors"},
    {"registry", "files"},
    {"ops"},
    {"contracts"},
    {"config", "data", "figure"},
    {"model"},
    {"retrieve"},
    {"listen"},
    {"cache"},
    {"latent"},
    {"draft"},
    {"compression"},
    {"engine"},
    {"llm", "pipeline"},
    {"train"},
    {"bench", "server", "export"},
    {"conversion"},
    {"cli"},
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("narrows"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("narrows.")}
    return found


def test_imports_point_left() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        for other in imports(ast.parse(path.read_text())):
            same = other == package or {other, package} == {"llm", "pipeline"}  # one layer
            if not same and RANK.get(other, 99) >= RANK[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, narrows; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_resolve() -> None:
    for name in narrows.__all__:
        assert getattr(narrows, name) is not None
    assert callable(narrows.compress)
