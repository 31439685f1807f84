"""``python -m benchmarks.mutation``."""

import typer

from .command import main

typer.run(main)
