"""The layout: the map names every file, kernels import neither the PyTorch path nor the oracle, no file grows long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = [path for path in sorted((ROOT / "kernels").iterdir()) if (path / "__init__.py").exists()]
LONGEST = 420


def _python(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if not (folder.name == "fastdsm" and "kernels" in path.parts)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_the_map_names_the_files_of_each_family(family: Path) -> None:
    row = next(line for line in (ROOT / "kernels" / "README.md").read_text().splitlines() if f"| `{family.name}/` |" in line)
    named = set(re.findall(r"`(\w+)`", row.strip("| ").split("|")[-1]))
    files = {path.stem for path in family.glob("*.py")} - {"__init__", "launch"}
    assert files == named


def test_kernels_import_neither_the_pytorch_path_nor_the_oracle() -> None:
    found = []
    for path in _python(ROOT / "kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [x.name for x in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            found += [(path.name, name) for name in names if re.search(r"\b(pytorch|reference)\b", name)]
    assert found == []


def test_no_file_is_long() -> None:
    folders = [ROOT / name for name in ("fastdsm", "kernels", "benchmarks", "tests")]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in _python(folder)}
    assert {str(path): length for path, length in lengths.items() if length > LONGEST} == {}
