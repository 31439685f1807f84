"""The command line, ``fastdsm`` or ``python -m fastdsm``, with the extra ``fastdsm[cli]``: one module per command."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, demo, info, trap, verify, warmup

app = typer.Typer(
    help="Doubly-stochastic matrices: project, measure sigma2, differentiate; on CPU and GPU with the same calls.",
    epilog="Start with: fastdsm info, then fastdsm verify --quick, then fastdsm demo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """What stands before a command."""
    if version:
        print(f"fastdsm {__version__}")
        raise typer.Exit


for command in (info.info, warmup.warmup, verify.verify, demo.demo, trap.trap, bench.bench):
    app.command()(command)
