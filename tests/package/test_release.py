"""What is published says one thing in every place: version, date, licence, Pythons, files and targets."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fastdsm

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", CHANGELOG, re.MULTILINE)
HEADINGS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
PYTHONS = [x.rsplit(" ", 1)[1] for x in PROJECT["classifiers"] if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", x)]


def read(path: str) -> Any:
    """A YAML file of the checkout."""
    yaml = pytest.importorskip("yaml", reason="the extra dev")
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_version_and_date_are_the_same_everywhere() -> None:
    citation = read("CITATION.cff")
    version, date = RELEASES[0]
    assert version == PROJECT["version"] == fastdsm.__version__ == citation["version"]
    assert date == citation["date-released"]


def test_changelog_has_its_form() -> None:
    assert CHANGELOG.startswith("# Changelog\n")
    titles = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert titles == [*(["[Unreleased]"] if "[Unreleased]" in titles else []), *(f"[{v}] - {date}" for v, date in RELEASES)]
    dates = [datetime.date.fromisoformat(date) for _, date in RELEASES]
    assert dates == sorted(dates, reverse=True)
    for part in re.split(r"^## .*$", CHANGELOG, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert kinds == [x for x in HEADINGS if x in kinds], "each once, in this order"
        before, *groups = re.split(r"^### .*$", part, flags=re.MULTILINE)
        assert "- " not in before, "entries lie below a heading"
        assert all("\n- " in group for group in groups), "a heading without entries"


def test_citation() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "date-released", "license"} <= set(citation)
    assert not {"url", "repository", "repository-code", "doi", "contact"} & set(citation)
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").count(citation["authors"][0]["name"]) == 1
    assert citation["authors"] == PROJECT["authors"] == [{"name": "The fastdsm authors"}]
    assert citation["license"] == PROJECT["license"]
    assert (citation["title"], citation["type"]) == (PROJECT["name"], "software")


def test_pythons() -> None:
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert read(".github/workflows/tests.yml")["jobs"]["install"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PYPROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_workflow_runs_what_exists() -> None:
    workflow = read(".github/workflows/tests.yml")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    assert set(re.findall(r"\bmake (\w+)", commands)) == {"test", "lint", "dist", "gpu"}
    assert set(re.findall(r"\bmake (\w+)", commands)) <= targets
    examples = re.findall(r"examples/\w+\.py", commands)
    assert examples
    assert all((ROOT / x).is_file() for x in examples)
    assert set(workflow["jobs"]["install"]["needs"].split()) <= set(workflow["jobs"])
    gpu = workflow["jobs"]["gpu"]
    assert gpu["runs-on"] == ["self-hosted", "gpu"]
    assert "workflow_dispatch" in gpu["if"]
    assert workflow[True]["workflow_dispatch"]["inputs"]["gpu"]["default"] is False  # YAML 1.1 reads the key "on" as True


def test_issue_templates_say_what_they_are_about() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert templates
    for template in templates:
        _, head, body = template.read_text(encoding="utf-8").split("---\n", 2)
        assert re.search(r"^name: \S", head, re.MULTILINE)
        assert re.search(r"^about: \S", head, re.MULTILINE)
        assert body.count("```") % 2 == 0


def test_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("fastdsm", "kernels"):  # without the link, which is for type checkers in a checkout
        skipped = shutil.ignore_patterns("__pycache__", *(["kernels"] if name == "fastdsm" else []))
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / "dist" / built.stdout.split()[-1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "fastdsm").rglob("*") if path.is_file()}
    code |= {f"fastdsm/{path.relative_to(tmp_path).as_posix()}" for path in (tmp_path / "kernels").rglob("*.py")}
    assert held == code
    assert {"fastdsm/py.typed", "fastdsm/data/alice.txt", "fastdsm/kernels/mhc/mixes.py"} <= held
