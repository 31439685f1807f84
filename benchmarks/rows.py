"""One row of results: what was timed, how long it took, how wrong it was, and where. Kept as JSON lines."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "numpy", "fastdsm", "hyper-connections", "POT", "geomloss", "liger-kernel", "flash-sinkhorn",
)  # fmt: skip

FORWARD = "forward"
BACKWARD = "forward+backward"


@dataclass(frozen=True)
class Run:
    """Where and when rows were measured; equal in all rows of one run."""

    device: str  # "cpu" or "cuda"
    machine: str  # the processor's or the GPU's name
    threads: int
    versions: dict[str, str]
    commit: str  # with "-dirty" where tracked files differ from it
    date: str  # UTC, to the second


@dataclass(frozen=True)
class Row:
    """One implementation of one operation at one size, in one direction.

    A row with ``left_out`` says why nothing was timed; its numbers are None.
    """

    operation: str  # the public call; "newton": sinkhorn by that solver
    shape: tuple[int, ...]  # of the input; attention: heads, lines, which of query, key and value, features
    dtype: str
    sweeps: int | None  # None where the operation has no sweeps
    direction: str  # FORWARD or BACKWARD (forward and backward, timed together)
    implementation: str  # "fastdsm", "eager" (newton: the sweeps), "torch.compile", "clone", a peer's name or another
    call: str  # the call that was timed
    definition: str  # what the float64 truth computes that its output was held against
    seconds_median: float | None
    seconds_min: float | None
    device_seconds: float | None  # median of replays of a captured graph, without the host's part of a call; CUDA only
    rounds: int
    bytes: int  # the least traffic: each input, cotangent, output and gradient once
    percent_of_floor: float | None  # time of a clone that moves as many bytes / this time, medians, in percent
    input_bytes: int
    peak_extra_bytes: int | None  # most bytes held at once beyond the inputs; outputs and gradient count
    checked: int  # matrices held against float64: all, or every k-th of a large batch
    error: float | None  # largest |output - truth| of the very output of the last timed call
    gradient_error: float | None  # the same of the gradient, relative to the largest true entry
    ratio_to_eager: float | None  # median over the rounds of eager's time / this time in the same round
    device_ratio_to_eager: float | None  # the same of device_seconds
    left_out: str | None
    run: Run


@cache
def current_run(device: str) -> Run:
    """Describe this process's machine, versions and commit."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Run(device, machine, torch.get_num_threads(), versions, _commit(), date)


def _processor() -> str:
    """Name of the processor, as /proc/cpuinfo spells it where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Short commit of the checkout; "unknown" outside one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(path: Path, rows: Iterable[DataclassInstance]) -> None:
    """Write rows as JSON lines, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote."""
    return [row_of(json.loads(line)) for line in path.read_text().splitlines()]


def row_of(record: dict) -> Row:
    """Build the row that a JSON record describes; ValueError where its fields are not a row's."""
    expected = {field.name for field in fields(Row)}
    if set(record) != expected:
        raise ValueError(f"a row has the fields {sorted(expected)}, got {sorted(record)}; measure again")
    return Row(**{**record, "shape": tuple(record["shape"]), "run": Run(**record["run"])})
