"""One projection problem in canonical form, as every backend receives it.

The public calls validate and flatten; ``first="row"`` has been turned into ``first="col"`` by transposing, so that a
backend only ever runs the sweep ``g <- log c - LSE_i(S + f)``, ``f <- log r - LSE_j(S + g)``, whose rows are exact at
the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the arithmetic inside."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """Inputs of a batch of projections. Vectors are in the compute dtype and may be expanded (stride 0).

    logits: (B, n, m), float16, bfloat16, float32 or float64, any strides, B may be 0.
    n_iters: sweeps; 0 is one row softmax (times r).
    temperature: float, or a (B,) tensor.
    f0: (B, n) row potential before the first sweep, None for 0; None whenever n_iters is 0.
    row_marginal (B, n), col_marginal (B, m): None where uniform. One given: the other is uniform with its total.
    unit_rows: neither given: mass 1 per valid row if true, 1 per valid column if false.
    mask: (B, n, m) bool, true where an entry takes part.
    tol: a matrix stops after the first sweep that leaves its residual <= tol; negative: never.
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
