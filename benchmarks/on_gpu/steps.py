"""The steps, in order of worth, and what stands for each of them on a machine without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..suite import options
from . import host, outcomes, table, timing, verification
from .runner import Step

TESTS, ROWS = "tests.jsonl", "cuda.jsonl"
# pytest's -k: what no GPU has timed yet; 262,144 matrices are of 7x7 and of 8x8.
NEVER_TIMED = "mhc or 262144 or newton or temperature or sigma2"
# Of tests.every_kernel, by what has been executed least: memory shared by instructions of our own, Newton's method and
# temperatures on tiles, tiles, panels, streams, attention.
_SANITIZED = {
    "registers": (("float32", "bfloat16"), ("5x5", "6x6", "7x7", "8x8")),
    "tiles": (("float32",), ("16x16", "64x64", "7x9", "33x40")),
    "large matrices": (("float32",), ("100x100", "130x200", "300x257")),
    "attention": (("bfloat16",), ("70x64", "300x40")),
    "small matrices": (("float32",), ("1x1", "3x3", "3x4", "4x4")),
}
# Text of one kernel in the table, that of 4x4 in float32.
_ONE = (
    '"_sinkhorn_fwd_kernel", {"constants": {"BLOCK": 128, "LINES": 4, "PACKED": false, "WITH_INFO": false, '
    '"WITH_SIGMA2": false}, "pointers": {"f_ptr": "fp32", "g_ptr": "fp32", "logits_ptr": "fp32"'
)
_COMPILED = {"TRITON_INTERPRET": "0"}


def steps(out: Path, target: str, jobs: int) -> list[Step]:
    """Everything a GPU alone can show; ``jobs``: processes at a time."""
    out = out.resolve()
    of, here = str(out), _module
    memory = {**_COMPILED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitized = [
        Step(
            f"{tool}, {name}",
            ("compute-sanitizer", "--tool", tool, "--print-limit", "20", "--error-exitcode", "9",
             *_python("tests.every_kernel", *dtypes, *sizes)),
            60.0,
            programs=("compute-sanitizer",),
            environment=memory,
        )
        for name, (dtypes, sizes) in _SANITIZED.items()
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip
    return [
        Step("info", _python("fastdsm", "info"), 30.0, ("typer", "rich")),
        Step("warm-up", _warmup(f'target="{target}", jobs={jobs}'), 240.0, environment=_COMPILED),
        Step("table", here(table, of, target, str(jobs)), 90.0, ("rich",), environment=_COMPILED),
        _tests(out, "tests/gpu", "-n", "4"),
        Step("verify", here(verification, of, str(jobs)), 180.0, environment=_COMPILED),
        *sanitized[:4],
        _rows("rows never timed", out, "cuda", NEVER_TIMED, 150.0),
        Step("host", here(host, of, "cuda", "20"), 90.0, environment=_COMPILED),
        Step("prediction", here(timing, of), 60.0, ("rich",), environment=_COMPILED),
        _rows("rows timed before", out, "cuda", f"not ({NEVER_TIMED})", 150.0),
        *sanitized[4:],
    ]


def dry(out: Path) -> list[Step]:
    """The same steps, small, each by what stands for a GPU here.

    The compiler is real, the verification is by the interpreter, tests for a GPU skip, the sanitizer is left out of its
    command, rows are a CPU's, of the host launches are stubbed, and of the prediction the measurement is missing.
    """
    out = out.resolve()
    real, of, here = {step.name: step for step in steps(out, "sm_90", 1)}, str(out), _module
    stand_ins: dict[str, dict[str, Any]] = {
        "warm-up": {"command": _warmup('target="sm_90", jobs=1, calls=["sinkhorn"], dtypes=[torch.float32], n=4')},
        "table": {"command": here(table, of, "sm_90", "1", _ONE)},
        "tests": {"command": _tests(out, "tests/gpu").command},
        "verify": {"command": here(verification, of, "1", "200"), "environment": {"TRITON_INTERPRET": "1"}},
        "rows never timed": {"command": _rows("", out, "cpu", "bench_sigma2_bounds and 65536", 60.0).command},
        "host": {"command": here(host, of, "cpu", "1", "sigma2_bounds(p)")},
        "prediction": {"command": here(timing, of, "forward 4x4 float32")},
        "rows timed before": {"command": _rows("", out, "cpu", "bench_sweep_of_one_matrix", 60.0).command},
    }
    sanitized, *left_out = (name for name in real if "check, " in name)
    stand_ins[sanitized] = {"command": _python("tests.every_kernel", "float32", "3x3"), "programs": ()}
    return [replace(step, **stand_ins.get(name, {})) for name, step in real.items() if name not in left_out]


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _module(module: ModuleType, *arguments: str) -> tuple[str, ...]:
    return _python(module.__name__, *arguments)


def _warmup(arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import torch, fastdsm; print(fastdsm.warmup({arguments}))")


def _tests(out: Path, *arguments: str) -> Step:
    """Each test's outcome kept, so that a run goes on."""
    command = _python("pytest", "-p", outcomes.__name__, "-p", "no:cacheprovider", "-v", *arguments)
    environment = {**_COMPILED, outcomes.FILE: str(out / TESTS)}
    return Step("tests", command, 180.0, ("pytest", "xdist"), environment=environment)


def _rows(name: str, out: Path, device: str, select: str, limit: float) -> Step:
    """Benchmarks by pytest's -k; each one's rows are appended, and what has an outcome is not run again."""
    arguments = options(device, 2, select, out / ROWS)
    command = _python("pytest", "-p", outcomes.__name__, *arguments)
    environment = {**_COMPILED, outcomes.FILE: str(out / TESTS)}
    return Step(name, command, limit, ("pytest", "pytest_benchmark"), environment=environment)
