"""The API pages: every public name is on one of them, and every directive names something that is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
MODULES = (
    "fastdsm",
    "fastdsm.mhc",
    "fastdsm.nn",
    "fastdsm.compat",
    "fastdsm.integrations",
    "fastdsm.diagnostics",
    "fastdsm.distributed",
)
WHOLE = {name.removeprefix("fastdsm.") for name in MODULES}
"""Modules that have a page, so that they need no directive."""


def directives(page: Path) -> list[str]:
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def resolved(path: str) -> Any:
    """What a tool that reads the source finds: of a module and a function of one name it is the module."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def test_there_are_pages() -> None:
    names = ["attention", "compat", "diagnostics", "distributed", "integrations", "mhc", "nn", "projection", "spectrum"]
    assert [page.stem for page in PAGES] == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_directive_resolves(page: Path) -> None:
    found = directives(page)
    assert found
    assert all((resolved(path).__doc__ or "").strip() for path in found)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_one_page(module: str) -> None:
    on_pages = [id(resolved(path)) for page in PAGES for path in directives(page)]
    public = importlib.import_module(module)
    names = [name for name in public.__all__ if module != "fastdsm" or name not in WHOLE]
    assert names
    assert {name: on_pages.count(id(getattr(public, name))) for name in names} == dict.fromkeys(names, 1)


def test_pages_link_to_each_other_by_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.md)", page.read_text(encoding="utf-8")):
            assert target in {"../choosing.md", "../serving.md", "../training.md"} or (page.parent / target).is_file(), target
