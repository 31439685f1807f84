"""``fastdsm warmup``: what will be launched, compiled before traffic into Triton's cache."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..warmup import CALLS
from ..warmup import warmup as warm


class DType(StrEnum):
    """What ``--dtype`` may name."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


def warmup(
    target: Annotated[
        str | None, typer.Option(metavar="sm_90", help="What to compile for; by default the CUDA device that is here.")
    ] = None,
    call: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Only what it can launch; may be repeated: {', '.join(CALLS)}.")
    ] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="Only for this dtype; may be repeated.")] = None,
    n: Annotated[
        list[str] | None, typer.Option("--n", "-n", metavar="N|NxM", help="Only for matrices of this size; may be repeated.")
    ] = None,
    features: Annotated[
        list[int] | None, typer.Option(min=1, help="Only for attention with so many features; may be repeated.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes; by default one for each processor.")
    ] = None,
) -> None:
    """Compile kernels before traffic, into Triton's cache, so that no call compiles anything in the middle of it.

    Without options every kernel there is, about a thousand, a second or more of a processor each; what is in the cache already
    is not compiled again. With --target it needs no GPU: a container image can carry the cache (TRITON_CACHE_DIR says where).

    Examples:

        fastdsm warmup

        fastdsm warmup --target sm_90 --call sinkhorn --dtype float32 --n 4

        TRITON_CACHE_DIR=/image/cache fastdsm warmup --target sm_90 --call sinkhorn_attention --features 64
    """
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("compiling", total=None)
            warmed = warm(
                target=target,
                calls=call or None,
                dtypes=[getattr(torch, name) for name in dtype] if dtype else None,
                n=[_size(text) for text in n] if n else None,
                features=features or None,
                jobs=jobs,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except (ValueError, RuntimeError) as error:
        console.print(str(error), markup=False, style="red", soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    ready, compiled = warmed.kernels, warmed.compiled
    console.print(f"{ready} kernels for {warmed.target} are ready, {compiled} of them compiled now", highlight=False)


def _size(text: str) -> tuple[int, int]:
    """Of "4" or "300x257"."""
    try:
        lines = [int(x) for x in text.split("x")]
    except ValueError:
        lines = []
    if len(lines) not in (1, 2):
        raise ValueError(f"--n must be lines of a matrix, as 4, or both of its sides, as 300x257, got {text}")
    return lines[0], lines[-1]
