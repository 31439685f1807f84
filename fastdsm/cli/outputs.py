"""Where commands write: looked at before the work, so that nothing is measured for a file that cannot be."""

from __future__ import annotations

from pathlib import Path

import typer


def writable_file(path: Path | None) -> Path | None:
    """The file, or an error of its option if it cannot be written; its folder is made, and what it holds stays."""
    if path is not None:
        existed = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
        if not existed:
            path.unlink()
    return path


def writable_folder(path: Path) -> Path:
    """The folder, made, or an error of its option if nothing can be written there."""
    writable_file(path / ".fastdsm")
    return path
