"""``fastdsm`` and ``python -m fastdsm``: the command line, where its packages are installed."""

import sys

from . import _interrupts


def main() -> None:
    """Run the command, or say in one line what it lacks."""
    _interrupts.begin()
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        lacking = str(error.name).partition(".")[0]
        if lacking not in ("typer", "rich"):
            raise
        sys.exit(f'fastdsm: the command line needs {lacking}, which is not installed; pip install "fastdsm[cli]"')
    _interrupts.over()
    app(prog_name="fastdsm")


if __name__ == "__main__":
    main()
