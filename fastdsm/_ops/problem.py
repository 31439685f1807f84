"""Problems in canonical form, as every backend receives them.

The public calls validate and flatten; a projection with ``first="row"`` has been turned into ``first="col"`` by
transposing, so that a backend only ever runs the sweep ``g <- log c - LSE_i(S + f)``, ``f <- log r - LSE_j(S + g)``, whose
rows are exact at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the arithmetic inside."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """Inputs of a batch of projections. Vectors are in the compute dtype and may be expanded (stride 0).

    logits: (B, n, m), float16, bfloat16, float32 or float64, any strides, B may be 0.
    n_iters: sweeps, or at most so many steps of Newton's method; 0 is one row softmax (times r).
    temperature: float, or a (B,) tensor.
    f0: (B, n) row potential before the first sweep, None for 0; None whenever n_iters is 0.
    row_marginal (B, n), col_marginal (B, m): None where uniform. One given: the other is uniform with its total.
    unit_rows: neither given: mass 1 per valid row if true, 1 per valid column if false.
    mask: (B, n, m) bool, true where an entry takes part.
    tol: a matrix stops after the first sweep (of Newton's method: step) that leaves its residual <= tol; negative: never.
    """

    logits: Tensor
    n_iters: int
    temperature: float | Tensor = 1.0
    f0: Tensor | None = None
    row_marginal: Tensor | None = None
    col_marginal: Tensor | None = None
    unit_rows: bool = True
    mask: Tensor | None = None
    tol: float = -1.0

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic inside and of every output that is not a matrix."""
        return compute_dtype(self.logits.dtype)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with every tensor changed."""
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)

    def part(self, where: slice | Tensor, blocks: int | None = None) -> Problem:
        """The problem of some of the batch, as :func:`part_of`."""
        return self.map_tensors(lambda x: part_of(x, where, blocks))


def doubled(x: Tensor) -> Tensor:
    """In float64, if it is floating."""
    return x.double() if x.is_floating_point() else x


def part_of(whole: Tensor, where: slice | Tensor, blocks: int | None) -> Tensor:
    """A slice of (B, ...), then a view, or what an index takes, as (blocks, B / blocks, ...) where ``blocks`` are given."""
    part = whole[where]
    return part if blocks is None else part.unflatten(0, (blocks, -1))


@dataclass(frozen=True)
class Outputs:
    """Where a forward writes. ``plan`` (B, n, m) in the logits' dtype, any strides; the rest compute dtype, contiguous.

    residual (B,), sweeps (B,) int32, f (B, n), g (B, m): all given or all None. sigma2 (B,): given or None.
    """

    plan: Tensor
    residual: Tensor | None = None
    sweeps: Tensor | None = None
    f: Tensor | None = None
    g: Tensor | None = None
    sigma2: Tensor | None = None

    def with_info(self, problem: Problem) -> Outputs:
        """The same, with room for residual, sweeps, f and g where they are not wanted."""
        if self.residual is not None:
            return self
        batch, n, m = problem.logits.shape
        new = partial(problem.logits.new_empty, dtype=problem.compute_dtype)
        sweeps = new((batch,), dtype=torch.int32)
        return replace(self, residual=new((batch,)), sweeps=sweeps, f=new((batch, n)), g=new((batch, m)))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """Every output that is wanted, changed."""
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if x is not None}
        return replace(self, **changed)

    def room_for(self, count: int) -> Outputs:
        """The same outputs of so many matrices, to be written by themselves."""
        return self.map_tensors(lambda x: x.new_empty(count, *x.shape[1:]))

    def put(self, where: Tensor, some: Outputs) -> None:
        """Write those of the matrices at an index."""
        for name, x in vars(some).items():
            if x is not None:
                getattr(self, name)[where] = x


@dataclass(frozen=True)
class Gradients:
    """Where a backward writes. ``logits`` (B, n, m) in the logits' dtype, any strides.

    f0 (B, n), log_row (B, n), log_col (B, m), compute dtype, contiguous: all given or all None. log_row and log_col are
    the gradients with respect to log r_i and log c_j as the sweeps used them (0 on excluded lines); f0 is that of the
    potential before the first sweep (0 when n_iters is 0).
    """

    logits: Tensor
    f0: Tensor | None = None
    log_row: Tensor | None = None
    log_col: Tensor | None = None


class Processes(Protocol):
    """Those that share the queries of a problem; results are alike on all of them."""

    @property
    def queries(self) -> int:
        """How many there are in all."""

    def sum(self, x: Tensor) -> Tensor:
        """Of every process's x."""

    def max(self, x: Tensor) -> Tensor:
        """Likewise; of bool whether any is true."""


@dataclass(frozen=True)
class Attention:
    """The logits S = (scale query key^T + bias) / temperature of every head, -inf where an entry takes no part.

    query: (B, H, N, d). key: (B, G, M, d), H a multiple of G: head h meets key head h // (H / G). One dtype, float16,
        bfloat16, float32 or float64, any strides; B, N and M may be 0 only together with an early return.
    temperature: float, or (B, H) in the compute dtype.
    bias: floating, mask: bool, True where an entry takes part; (B, H, N, M), expanded (stride 0) where broadcast.
    query_padding (B, N), key_padding (B, M): bool, True where a line takes no part.
    processes: where others hold more queries, of the same keys, what adds up and takes maxima over all of them.
    """

    query: Tensor
    key: Tensor
    scale: float
    temperature: float | Tensor = 1.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    query_padding: Tensor | None = None
    key_padding: Tensor | None = None
    processes: Processes | None = None

    @property
    def queries(self) -> int:
        """N, of all processes."""
        return self.query.shape[2] if self.processes is None else self.processes.queries

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic inside and of every potential."""
        return compute_dtype(self.query.dtype)


def attention_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    query_padding: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    tau: float,
) -> Attention:
    """Canonical form of an operator's inputs."""
    shape = (*query.shape[:3], key.shape[2])
    bias, mask = (None if x is None else x.expand(shape) for x in (bias, mask))
    return Attention(query, key, scale, tau if temperature is None else temperature, bias, mask, query_padding, key_padding)


@dataclass(frozen=True)
class Dropout:
    """Entries of the plan that are dropped: each with probability ``p``, drawn from ``seed`` (1,) int64; the rest / (1 - p)."""

    p: float
    seed: Tensor


def dropout_of(seed: Tensor | None, p: float) -> Dropout | None:
    """None where nothing is dropped."""
    return None if seed is None else Dropout(p, seed)


@dataclass(frozen=True)
class Potentials:
    """f (B, H, N) and g (B, H, M) of exp(S + f + g), each as a base and what has been added to it since: compute dtype.

    S + f + g is to be formed in one order wherever it is needed, ((S + first base) + last base) + (fine f + fine g), g the
    first where ``columns_first``, so that large bases are rounded alike in all passes; the fine parts are small.
    """

    f_base: Tensor
    g_base: Tensor
    f_fine: Tensor
    g_fine: Tensor
    columns_first: bool


@dataclass(frozen=True)
class Terms:
    """What the gradient of the logits takes away from P * (grad_out value^T), in the sweeps' exact adjoint.

    plan: of P. Segment s stands for E = exp(S + f + g) with ``segments[s]``, times a sum of rank-one matrices x_k y_k^T, the
    next ``counts[s]`` of them. x (B, H, K, N), y (B, H, K, M): finite, contiguous, compute dtype.
    """

    plan: Potentials
    segments: list[Potentials]
    x: Tensor
    y: Tensor
    counts: list[int]
