"""From a kernel configuration to machine code and the resources it takes, without a GPU."""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastdsm import kernels
from fastdsm.kernels.common.configuration import Configuration, global_names

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Most shared memory one program may ask for, in bytes (CUDA programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Compiled:
    """Machine code of one configuration for one target.

    cubin: the binary. ptx: its source in PTX. shared: bytes of shared memory of one program, whether asked for
    at launch or declared.
    """

    cubin: bytes
    ptx: str
    shared: int


@dataclass(frozen=True)
class Resources:
    """What the assembler allotted: registers per thread; stack and local bytes per thread, both 0 unless it spilled."""

    registers: int
    stack: int
    local: int


def compile_configuration(configuration: Configuration, target: str) -> Compiled:
    """Compile for ``target``, "sm_80", "sm_90" or "sm_100". Not under TRITON_INTERPRET, which replaces the compiler."""
    kernel = configuration.compile(GPUTarget("cuda", int(target.removeprefix("sm_")), 32))
    ptx = kernel.asm["ptx"]
    declared = sum(int(size) for size in re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\];", ptx))
    return Compiled(kernel.asm["cubin"], ptx, kernel.metadata.shared + declared)


def disassemble(cubin: bytes) -> tuple[Resources, str]:
    """Resources and SASS text of a binary, read with the disassembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return read_resources(text), text


def read_resources(text: str) -> Resources:
    """The line ``REG:40 STACK:0 SHARED:0 LOCAL:0 ...`` of ``cuobjdump -res-usage``."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"expected a line REG:... STACK:... LOCAL:... from cuobjdump, got {text[:200]!r}")
    return Resources(*map(int, found.groups()))


def kernel_name(configuration: Configuration) -> str:
    """Name of the kernel function."""
    return configuration.kernel.fn.__name__


def source(configuration: Configuration) -> str:
    """Hash of the text of the kernel, of the device functions that it calls, and of the constants that these name.

    Host code beside them and where files lie are no part of it. Triton's own hash of a kernel depends on which kernels were
    hashed before it.
    """
    return _hash_of_device_code(configuration.kernel.fn)


@cache
def _hash_of_device_code(kernel: Callable[..., None]) -> str:
    found: set[Any] = set()
    new: set[Any] = {kernel}
    texts: set[str] = set()
    while new:
        found |= new
        texts |= {inspect.getsource(function) for function in new}
        named = [(name, function.__globals__.get(name)) for function in new for name in global_names(function.__code__)]
        texts |= {f"{name} = {value.value!r}" for name, value in named if isinstance(value, tl.constexpr)}
        ours = (getattr(value, "fn", None) for _, value in named)
        new = {x for x in ours if inspect.isfunction(x) and x.__module__.startswith(kernels.__name__)} - found
    return hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest()[:16]


def describe(configuration: Configuration) -> dict[str, Any]:
    """The configuration as plain values, keys sorted."""
    return {
        "constants": dict(sorted((name, _plain(value)) for name, value in configuration.constants.items())),
        "pointers": dict(sorted(configuration.pointers.items())),
        **configuration.options(),
        "matrices": configuration.matrices,
        "label": configuration.label,
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
