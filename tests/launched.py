"""What the arguments of a launch are held to: the types that its kernel was compiled for."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.static.compilation import kernel_name
from benchmarks.static.execution import scalars
from fastdsm.kernels.common.configuration import ELEMENTS, Configuration

BITS = {"i32": 31, "i64": 63}


def misfits(configuration: Configuration, arguments: dict[str, Any]) -> list[str]:
    """What the kernel would read as something else."""
    found = []
    for name, kind in configuration.signature().items():
        found += [
            f"{kernel_name(configuration)}: {name} is compiled as {scalar}, launched with {getattr(value, 'dtype', value)}"
            for scalar, value in scalars([(kind, arguments.get(name))])
            if not _fits(scalar, value)
        ]
    return found


def _fits(kind: str, value: Any) -> bool:
    if kind.startswith("*"):
        return value is None or (isinstance(value, torch.Tensor) and value.dtype == ELEMENTS[kind[1:]])
    if kind in BITS:
        return type(value) is int and -(1 << BITS[kind]) <= value < 1 << BITS[kind]
    return type(value) in (int, float)
