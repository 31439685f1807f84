"""Sweeps as a chain of softmaxes, and their adjoint: one call per half sweep, for few matrices, where calls are the cost.

X = S + f + g after a column step is the log-softmax of X along columns, after a row step that along rows; uniform marginals
are factors that the next step takes out again. So, with X_0 the log-softmax of S along columns,

    X_k = log-softmax of X_(k-1) along rows (odd k) or columns (even k), k <= 2T - 2;  P = r softmax of X_(2T-2) along rows

and with D the cotangent of P, the adjoint goes back through these very steps, dX_k being that of X_k:

    dX_(2T-2) = P * (D - (P * D / r) 1 1^T);  dX_(k-1) = dX_k - exp(X_k) * (sums of dX_k along the lines of step k)

of which the last, for k = 0, is dS. A step rounds each entry of X by itself, where potentials round whole lines alike, so this
is for logits within ``RANGE`` nats and up to ``MOST_SWEEPS``: the largest share of the error policy's budget was 0.56 in 2,268
cases there (2x2 to 16x16; normal, two-valued, on offsets of rows, columns and both; 1, 2 and 20 sweeps).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .storage import by_columns, home, loaded

RANGE = 128.0
MOST_SWEEPS = 128

# Bytes of the line that ends a tensor: less than a vector register, with AVX-512, is summed value by value.
_LANES_BELOW = 64
# Bytes of a value of all matrices: 16x16 of 16, 32 and 64 take 5.0, 8.7 and 16 us a sweep as lines, 6.3, 8.0 and 13 as lanes.
_LANES_FROM = 128


class _Arrangement(NamedTuple):
    """The order in which (B, n, m) is laid out, and which dimensions then are summed over in a column and in a row step."""

    order: tuple[int, int, int]
    down: int
    across: int


# torch sums over a dimension with all that follow as vector lanes, and shares out between threads, whatever their size, what
# precedes: row steps over lanes, never a single matrix as lines. What lies column by column stays so.
_LINES = _Arrangement((1, 0, 2), 0, 2), _Arrangement((2, 0, 1), 2, 0)
_LANES = _Arrangement((1, 2, 0), 0, 1), _Arrangement((2, 1, 0), 1, 0)


def _arrangement(logits: Tensor, dtype: torch.dtype) -> _Arrangement:
    batch, n, m = logits.shape
    turned, size = by_columns(logits), dtype.itemsize
    lanes = size * (n if turned else m) < _LANES_BELOW or size * batch >= _LANES_FROM
    if batch == 1 and torch.get_num_threads() > 1:
        lanes = False
    return (_LANES if lanes else _LINES)[turned]


def forward(logits: Tensor, n_iters: int, temperature: float, row: float, dtype: torch.dtype, plan: Tensor) -> None:
    """Fill ``plan`` (B, n, m), rows of sum ``row``, computed in ``dtype``."""
    order, down, across = _arrangement(logits, dtype)
    S, target = loaded(logits.permute(*order), dtype, temperature), plan.permute(*order)
    log_softmax, P = torch._log_softmax, home(target, dtype)
    X = torch.empty_like(P)
    log_softmax(S, down, False, out=X)
    for _ in range(n_iters - 1):
        log_softmax(X, across, False, out=P)
        log_softmax(P, down, False, out=X)
    torch._softmax(X, across, False, out=P)
    if row != 1.0:
        P.mul_(row)
    if P is not target:
        target.copy_(P)


def backward(
    logits: Tensor, n_iters: int, temperature: float, row: float, dtype: torch.dtype, grad_plan: Tensor, d_logits: Tensor
) -> None:
    """Fill ``d_logits`` (B, n, m) with the exact adjoint of :func:`forward`, which is run again."""
    order, down, across = _arrangement(logits, dtype)
    S, D, target = loaded(logits.permute(*order), dtype, temperature), grad_plan.permute(*order), d_logits.permute(*order)
    log_softmax, back = torch._log_softmax, torch._log_softmax_backward_data
    x = log_softmax(S, down, False)
    X = [x]  # made as they come: to write them into the parts of one tensor would cost more, a view for each
    for _ in range(n_iters - 1):
        X.append(x := log_softmax(x, across, False))
        X.append(x := log_softmax(x, down, False))
    P = torch._softmax(x, across, False)
    dX = torch._softmax_backward_data(loaded(D, dtype), P, across, dtype)
    dS = home(target, dtype)
    for k in range(len(X) - 1, 0, -2):
        back(dX, X[k], down, dtype, out=dS)
        back(dS, X[k - 1], across, dtype, out=dX)
    back(dX, X[0], down, dtype, out=dS)
    if row != temperature:
        dS.mul_(row / temperature)
    if dS is not target:
        target.copy_(dS)
