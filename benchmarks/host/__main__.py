"""``python -m benchmarks.host``."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter launches nothing that could be left out

import typer

from .command import main

typer.run(main)
