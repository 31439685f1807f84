"""Newton's method on matrices of 4 to 8 lines beside 20 sweeps: instructions of the paths that warps of random matrices take.

A warp of the kernel takes its branches by maxima over its matrices: of a flag after the first sweep, then of the care of each
step. The interpreter says what these maxima are, and machine code executed with them how many instructions a warp issues.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from triton.runtime import interpreter

from fastdsm import kernels
from fastdsm._ops.problem import Outputs, Problem

from .compilation import compile_configuration, disassemble
from .execution import execute, parameter_words
from .launches import Call, Launch, recorded
from .model import predicted_time
from .report import SWEEPS, Row
from .sass import parse

TOL, MOST_STEPS = 1e-6, 60
WARP = 32
_TARGET = "sm_90"


def rows(stds: tuple[float, ...], warps: int, lines: int = 4) -> list[Row]:
    """Instructions of a warp: mean over ``warps`` per standard deviation of the logits; last, those of 20 sweeps."""
    with recorded() as launches:
        _project(torch.empty(WARP, lines, lines))
    call = Call("forward", lines, lines, torch.float32)
    newton, (sweeps,) = _Code(launches[0]), call.record(SWEEPS)
    means = [newton.mean(x) for x in _interpreted(stds, warps, lines)]
    found = [_row(f"newton, logit std {std:g}", x, call.bytes_per_matrix) for std, x in zip(stds, means, strict=True)]
    return [*found, _row(f"{SWEEPS} sweeps", _Code(sweeps).mean(Counter([()])), call.bytes_per_matrix)]


def _row(name: str, counts: Counter[str], bytes_per_matrix: int) -> Row:
    predicted = predicted_time(counts, WARP, WARP, bytes_per_matrix)["predicted_ns"]
    return {"name": name, "instructions": counts.total(), "mufu": counts["MUFU"], "predicted_ns": predicted}


class _Code:
    """The machine code of a launch."""

    def __init__(self, launch: Launch) -> None:
        self.program = parse(disassemble(compile_configuration(launch.configuration, _TARGET).cubin)[1])
        self.parameters = parameter_words(launch.configuration.signature(), launch.arguments, _TARGET)

    def mean(self, paths: Counter[tuple[int, ...]]) -> Counter[str]:
        """Instructions of a warp by class, mean over the paths."""
        total: Counter[str] = Counter()
        for path, number in paths.items():
            run = execute(self.program, self.parameters, path)
            assert run is not None
            for kind, count in run.counts.items():
                total[kind] += count * number
        return Counter({kind: round(count / paths.total()) for kind, count in total.items()})


def _project(logits: torch.Tensor) -> None:
    kernels.newton_forward(Problem(logits, MOST_STEPS, tol=TOL), Outputs(torch.empty_like(logits)))


def _interpreted(stds: tuple[float, ...], warps: int, lines: int) -> list[Counter[tuple[int, ...]]]:
    """:func:`paths` in a process of its own, as the interpreter replaces Triton's compiler for good."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(paths, stds, [warps] * len(stds), [lines] * len(stds)))


def paths(std: float, warps: int, lines: int) -> Counter[tuple[int, ...]]:
    """The maxima of ``warps`` warps, and how many have these."""
    logits = std * torch.randn(warps, WARP, lines, lines, generator=torch.Generator().manual_seed(0))
    found: Counter[tuple[int, ...]] = Counter()
    for warp in logits:
        with _maxima() as path:
            _project(warp)
        found[tuple(path)] += 1
    return found


@contextmanager
def _maxima() -> Iterator[list[int]]:
    """Maxima of integers that kernels take inside the block, in order."""
    found: list[int] = []
    original = interpreter.ReduceOps.min_max

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        value = original(self, *arguments, **options)
        if not value.dtype.is_floating():
            found.append(int(value.handle.data.item()))
        return value

    with patch.object(interpreter.ReduceOps, "min_max", recording):
        yield found


def main(
    warps: Annotated[int, typer.Option(min=1, help="warps of 32 random matrices")] = 256,
    lines: Annotated[int, typer.Option(min=4, max=8)] = 4,
) -> None:
    """Print what a warp issues, and what the static model predicts, for one H100 or H200, from that."""
    title = f"a warp, 32 matrices, {_TARGET}"
    table = Table(f"{lines}x{lines} float32", "instructions", "of them MUFU", "predicted ns", title=title)
    for row in rows((1.0, 2.0, 4.0, 8.0), warps, lines):
        table.add_row(row["name"], f"{row['instructions']:,}", f"{row['mufu']:,}", f"{row['predicted_ns']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
