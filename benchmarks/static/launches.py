"""What the real launchers launch for ordinary calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastdsm import kernels
from fastdsm._ops.problem import Gradients, Outputs, Problem, compute_dtype
from fastdsm.kernels.common.configuration import Launch

ALIGNMENT = 512
BATCH = 512
"""Matrices of a recorded call; a multiple of what any program handles."""

OPERATIONS = ("forward", "forward+sigma2", "backward", "sigma2", "sigma2_bounds")
_SIZES = (*range(1, 34), 48, 64, 65, 96, 100, 128, 129, 160, 192, 193, 256)
# Square matrices of 5 to 8 lines are the register family's; 7x8 is the tile family's.
SHAPES = sorted([*((n, n) for n in _SIZES), (7, 8)])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Tensors(NamedTuple):
    """Of a call: ``matrix`` is read, logits or plans, and of a backward ``other``, the cotangent; the rest is written."""

    matrix: torch.Tensor
    other: torch.Tensor
    value: torch.Tensor
    upper: torch.Tensor
    u2: torch.Tensor
    v2: torch.Tensor


@dataclass(frozen=True)
class Call:
    """An ordinary call of one of OPERATIONS: contiguous (batch, n, m) logits or plans of ``dtype``, no options."""

    operation: str
    n: int
    m: int
    dtype: torch.dtype

    @property
    def sweeps(self) -> bool:
        """Whether the operation makes sweeps, so that their number matters."""
        return not self.operation.startswith("sigma2")

    @property
    def bytes_per_matrix(self) -> int:
        """Least traffic: logits in, plan out; backward: logits and cotangent in, gradient out; sigma2: plan in."""
        matrices = {"backward": 3, "sigma2": 1, "sigma2_bounds": 1}.get(self.operation, 2)
        return matrices * self.n * self.m * self.dtype.itemsize

    def describe(self) -> dict[str, Any]:
        """As plain values."""
        return {"operation": self.operation, "n": self.n, "m": self.m, "dtype": str(self.dtype).removeprefix("torch.")}

    def record(self, n_iters: int) -> list[Launch]:
        """Its launches for ``n_iters`` sweeps, in a batch such that program 0 is full but walks no further."""
        launches = self.record_batch(n_iters, BATCH)
        covered = min(launch.programs * launch.configuration.matrices for launch in launches)
        return launches if covered >= BATCH else self.record_batch(n_iters, covered)

    def record_batch(self, n_iters: int, batch: int) -> list[Launch]:
        """Its launches for ``batch`` matrices."""
        tensors = self.tensors(batch, "cpu")
        with recorded() as launches:
            self.launch(n_iters, tensors)
        return launches

    def tensors(self, batch: int, device: str) -> Tensors:
        """What a launch takes, as it was taken."""
        inside = compute_dtype(self.dtype)
        matrix, other = (torch.empty(batch, self.n, self.m, dtype=self.dtype, device=device) for _ in range(2))
        value, upper = (torch.empty(batch, dtype=inside, device=device) for _ in range(2))
        u2, v2 = (torch.empty(batch, lines, dtype=inside, device=device) for lines in (self.n, self.m))
        return Tensors(matrix, other, value, upper, u2, v2)

    def launch(self, n_iters: int, tensors: Tensors) -> None:
        """Launch what serves the call."""
        matrix, other, value, upper, u2, v2 = tensors
        problem = Problem(logits=matrix, n_iters=n_iters)
        if self.operation == "backward":
            kernels.sinkhorn_backward(problem, other, Gradients(torch.empty_like(matrix)), None)
        elif self.operation == "sigma2":
            kernels.sigma2(matrix, None, None, None, 1e-4, value, u2, v2)
        elif self.operation == "sigma2_bounds":
            kernels.sigma2_bounds(matrix, None, None, None, value, upper)
        else:
            sigma2 = value if self.operation == "forward+sigma2" else None
            kernels.sinkhorn_forward(problem, Outputs(other, sigma2=sigma2))


def _address(argument: Any) -> Any:
    """Pointers as addresses, 0 where absent, aligned as CUDA's allocator aligns."""
    if hasattr(argument, "_make"):
        return argument._make(map(_address, argument))
    if argument is None:
        return 0
    return -(-argument.data_ptr() // ALIGNMENT) * ALIGNMENT if isinstance(argument, torch.Tensor) else argument


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches made inside the block, in order, with addresses for pointers when it is left; none of them runs."""
    with kernels.recorded() as launches:
        yield launches
    launches[:] = [replace(x, arguments={name: _address(value) for name, value in x.arguments.items()}) for x in launches]


def ordinary_calls() -> Iterator[Call]:
    """Calls of every operation, dtype and a range of sizes, float32 and small first; square ones but for one."""
    for dtype in DTYPES:
        for operation in OPERATIONS:
            for shape in SHAPES:
                yield Call(operation, *shape, dtype)
