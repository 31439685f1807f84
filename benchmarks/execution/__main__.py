"""``python -m benchmarks.execution``."""

import os

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter replaces the compiler, from Triton's import on

import typer

from .command import main

typer.run(main)
