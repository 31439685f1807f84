"""``fastdsm`` and ``python -m fastdsm``: the command line, where its packages are installed."""

import sys


def main() -> None:
    """Run the command, or say in one line what it lacks."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        lacking = str(error.name).partition(".")[0]
        if lacking not in ("typer", "rich"):
            raise
        sys.exit(f'fastdsm: the command line needs {lacking}, which is not installed; pip install "fastdsm[cli]"')
    app(prog_name="fastdsm")


if __name__ == "__main__":
    main()
