"""Committed measurements in the site: pages link to ../benchmarks/results as in the checkout, and no file lies there twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SERVED = (".png", ".md")


def on_files(files: Files, config: Any) -> Files:
    """Add figures and reports as results/*."""
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in SERVED:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to benchmarks/results lead to what :func:`on_files` added, those to CHANGELOG.md to its page."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)*benchmarks/results/", f"]({up}results/", markdown)
    return re.sub(r"\]\((?:\.\./)*CHANGELOG\.md", f"]({up}changelog.md", markdown)
