"""Newton's method on 4x4 matrices beside 20 sweeps: instructions of the paths that warps of random matrices take.

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
from fastdsm.problem import Outputs, Problem

from .compilation import compile_configuration, disassemble
from .execution import execute, parameter_words
from .launches import Call, Launch, recorded
from .model import predicted_time
from .report import SWEEPS, Row
from .sass import parse

TOL, MOST_STEPS = 1e-6, 60
WARP = 32
_TARGET = "sm_90"
_BYTES = Call("forward", 4, 4, torch.float32).bytes_per_matrix


def rows(stds: tuple[float, ...], warps: int) -> list[Row]:
    """Per standard deviation of the logits: instructions of a warp, mean over ``warps``, beside those of 20 sweeps."""
    (sweeps,) = Call("forward", 4, 4, torch.float32).record(SWEEPS)
    known = _counted(sweeps, Counter([()]))
    with recorded() as launches:
        _project(torch.empty(WARP, 4, 4))
    return [_row(std, _counted(launches[0], paths), known) for std, paths in zip(stds, _interpreted(stds, warps), strict=True)]


def _row(std: float, newton: Counter[str], sweeps: Counter[str]) -> Row:
    ours, theirs = (predicted_time(counts, WARP, WARP, _BYTES) for counts in (newton, sweeps))
    return {
        "std": std,
        "instructions": newton.total(),
        "sweeps_instructions": sweeps.total(),
        "mufu": newton["MUFU"],
        "sweeps_mufu": sweeps["MUFU"],
        "predicted_ns": ours["predicted_ns"],
        "sweeps_predicted_ns": theirs["predicted_ns"],
    }


def _counted(launch: Launch, paths: Counter[tuple[int, ...]]) -> Counter[str]:
    """Instructions of a warp by class, mean over the paths."""
    program = parse(disassemble(compile_configuration(launch.configuration, _TARGET).cubin)[1])
    parameters = parameter_words(launch.configuration.signature(), launch.arguments, _TARGET)
    total: Counter[str] = Counter()
    for path, number in paths.items():
        run = execute(program, parameters, path)
        assert run is not None
        for kind, count in run.counts.items():
            total[kind] += count * number
    return Counter({kind: round(count / paths.total()) for kind, count in total.items()})


def _project(logits: torch.Tensor) -> None:
    kernels.newton_forward(Problem(logits, MOST_STEPS, tol=TOL), Outputs(torch.empty_like(logits)))


def _interpreted(stds: tuple[float, ...], warps: int) -> list[Counter[tuple[int, ...]]]:
    """:func:`paths` in a process of its own, as the interpreter replaces Triton's compiler for good."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(paths, stds, [warps] * len(stds)))


def paths(std: float, warps: int) -> Counter[tuple[int, ...]]:
    """The maxima of ``warps`` warps, and how many have these."""
    logits = std * torch.randn(warps, WARP, 4, 4, generator=torch.Generator().manual_seed(0))
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


def main(warps: Annotated[int, typer.Option(min=1, help="warps of 32 random matrices")] = 256) -> None:
    """Print what a warp issues, and what the static model predicts, for one H100 or H200, from that."""
    table = Table("4x4 float32", "instructions", "of them MUFU", "predicted ns", title=f"a warp, 32 matrices, {_TARGET}")
    found = rows((1.0, 2.0, 4.0, 8.0), warps)
    for row in found:
        numbers = (f"{row['instructions']:,}", f"{row['mufu']:,}", f"{row['predicted_ns']:.4f}")
        table.add_row(f"newton, logit std {row['std']:g}", *numbers)
    numbers = (f"{row['sweeps_instructions']:,}", f"{row['sweeps_mufu']:,}", f"{row['sweeps_predicted_ns']:.4f}")
    table.add_row(f"{SWEEPS} sweeps", *numbers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
