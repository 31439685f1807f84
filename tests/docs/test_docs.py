"""The documentation is true: its Python runs, its commands exist, its links lead somewhere, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..timm_package import import_timm

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# Of the extra parity: a page that calls one is skipped where it is missing.
PEERS = {"geomloss", "hyper_connections", "ot", "pygmtools", "scipy", "sinkhorn_transformer", "timm", "transformers"}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line and text of the fenced blocks in one of the languages; the text is no further in than the fence."""
    text = path.read_text()
    for found in FENCE.finditer(text):
        indent, language, code = found.groups()
        if language in languages:
            lines = [line.removeprefix(indent) for line in code.splitlines()]
            yield text[: found.start(3)].count("\n") + 1, "\n".join(lines) + "\n"


def run(path: Path) -> None:
    """The blocks of a page in order, in one namespace; one whose first line is "# raises" must."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, code in blocks(path, "python", "py"):
        program = compile("\n" * (line - 1) + code, str(path), "exec")
        if code.startswith("# raises"):
            with pytest.raises(Exception):  # noqa: B017, PT011
                exec(program, namespace)
        else:
            exec(program, namespace)


@pytest.mark.parametrize("path", [x for x in PAGES if any(blocks(x, "python", "py"))], ids=named)
def test_python(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if any("timm" in code for _, code in blocks(path, "python", "py")):
        import_timm()
    try:
        run(path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PEERS:
            raise
        pytest.skip(f"{error.name}, of the extra parity")
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def commands(path: Path) -> list[list[str]]:
    """The words of every shell command of a page, behind what it sets in the environment; comments are none."""
    found = []
    for _, text in blocks(path, "console", "bash", "sh", "shell"):
        lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
        if any(line.startswith("$ ") for line in lines):  # the others are what it prints
            lines = [line for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


COMMANDS = [pytest.param(words, id=f"{named(path)}: {' '.join(words)}") for path in PAGES for words in commands(path)]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands(words: list[str]) -> None:
    """fastdsm's exist with these options, make's targets stand in the Makefile."""
    if Path(words[0]).name == "make":
        targets = [x for x in words[1:] if not x.startswith("-") and "=" not in x]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.escape(x)}:", makefile, re.MULTILINE) for x in targets)
    if Path(words[0]).name == "fastdsm" and len(words) > 1:
        typer = pytest.importorskip("typer", reason="the extra cli")
        from fastdsm.cli import app

        group = typer.main.get_command(app)
        if words[1].startswith("-"):
            group.make_parser(typer.Context(group)).parse_args(words[1:])
            return
        command = group.commands[words[1]]
        options = [name for x in command.params for name in x.opts]
        assert all(x.partition("=")[0] in [*options, "--help"] for x in words[2:] if x.startswith("-"))


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links(path: Path) -> None:
    """Relative links lead to files of the checkout, those of pages to pages; mkdocs checks anchors."""
    text = FENCE.sub("", path.read_text())
    for target in LINK.findall(text):
        if not re.match(r"\w+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_nothing_is_brought_from_elsewhere() -> None:
    """No font, script or image of another host, in the configuration or in a page."""
    remote = re.compile(r"!\[[^\]]*\]\(https?:|<(?:script|img|link|iframe)[^>]*https?:", re.IGNORECASE)
    for path in PAGES[1:]:
        assert not remote.search(FENCE.sub("", path.read_text())), path
    assert not re.search(r"https?:", (ROOT / "mkdocs.yml").read_text())


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 120


def test_every_page_is_in_the_menu() -> None:
    yaml = pytest.importorskip("yaml", reason="the extra dev")

    def pages(x: Any) -> Iterator[str]:
        if isinstance(x, str):
            yield x
        else:
            for part in x if isinstance(x, list) else x.values():
                yield from pages(part)

    menu = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages_of_results = (ROOT / "docs" / "results").glob("*.md")
    assert sorted(menu) == sorted(str(x.relative_to(ROOT / "docs")) for x in (*PAGES[1:], *pages_of_results))


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning, in less than two minutes; and what it is made of is in it."""
    if any(importlib.util.find_spec(x) is None for x in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the extra docs")
    start = time.perf_counter()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 120
    home = (tmp_path / "index.html").read_text()
    assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']https?:""", home)
    assert (tmp_path / "results" / "cuda-speedup.png").is_file()
    pages = "".join(x.read_text() for x in (tmp_path / "api").glob("*.html"))
    assert not re.search(":func:|<blockquote>", pages)
    assert 'href="projection.html#fastdsm.sinkhorn"' in pages
    assert "Keep a Changelog" in (tmp_path / "changelog.html").read_text()
