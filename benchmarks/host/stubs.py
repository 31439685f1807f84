"""Launches that do nothing: the host goes the kernels' way, on a CPU too, and everything but the kernel is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdsm import kernels
from fastdsm._ops import arguments
from fastdsm._ops.plain import Kept
from fastdsm.kernels.common.arithmetic import INTERPRET
from fastdsm.kernels.common.configuration import Configuration


class _Stub:
    """In place of a compiled kernel."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self._run


@contextmanager
def stubbed(launches: list[str] | None = None) -> Iterator[None]:
    """Inside the block a compiled kernel's call does nothing, and "auto" is "triton"; what is written stays as it was taken.

    launches: the names of the kernels launched are appended. What was compiled and kept before is there again afterwards, and
    nothing is that was kept inside.
    """
    if INTERPRET:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the launches that are to be left out; start Python without it")
    resolve = arguments.resolve_backend

    def compiled(self: Configuration, target: Any = None) -> _Stub:
        return _Stub(_nothing if launches is None else partial(_noted, launches, self.kernel.fn.__name__))

    def resolved(backend: str, x: Tensor) -> str:
        return "triton" if backend in ("auto", "triton") else resolve(backend, x)

    tables = [*Kept.tables, *(x.compiled for x in kernels.configurations())]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        with mock.patch.object(Configuration, "compile", compiled), mock.patch.object(arguments, "resolve_backend", resolved):
            yield
    finally:
        Kept.forget()
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        torch.compiler.reset()


def _nothing(*values: Any) -> None:
    pass


def _noted(launches: list[str], name: str, *values: Any) -> None:
    launches.append(name)
