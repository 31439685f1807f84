"""``python -m benchmarks.static``."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

import typer

from .command import main

typer.run(main)
