"""Sweeps as a chain of softmaxes, and their adjoint: one call per half sweep, for few matrices, where calls are the cost.

X = S + f + g after a column step is the log-softmax of X along columns, after a row step that along rows; uniform marginals
are factors that the next step takes out again. So, with X_0 the log-softmax of S along columns,

    X_k = log-softmax of X_(k-1) along rows (odd k) or columns (even k), k <= 2T - 2;  P = r softmax of X_(2T-2) along rows

and with D the cotangent of P, the adjoint goes back through these very steps, dX_k being that of X_k:

    dX_(2T-2) = P * (D - (P * D / r) 1 1^T);  dX_(k-1) = dX_k - exp(X_k) * (sums of dX_k along the lines of step k)

of which the last, for k = 0, is dS. A step rounds each entry of X by itself, where potentials round whole lines alike, and what
sweeps raise from far below, in matrices next to no support, keeps the rounding of every step. So this is for logits within
``RANGE`` nats and up to ``MOST_SWEEPS``: of 3,024 matrices there (2x2 to 16x16; normal, two-valued, triangular, with columns
that one row alone fills; 1, 20 and 128 sweeps) the largest share of the error policy's budget was 0.62. Some of 45 nats took
2.4 times the budget after 60 sweeps, of 115 nats 8 times after 120.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .storage import by_columns, home, loaded
from .tape import Recorded

RANGE = 32.0
MOST_SWEEPS = 128

# Bytes of the line that ends a tensor: less than a vector register, with AVX-512, is summed value by value.
_LANES_BELOW = 64
# Bytes of a value of all matrices: 16x16 of 16, 32 and 64 take 5.0, 8.7 and 16 us a sweep as lines, 6.3, 8.0 and 13 as lanes.
_LANES_FROM = 128
# Bytes of the line that ends a tensor from which matrices stay as they lie: a sweep of two 64x64 and its adjoint take 11 us so
# and as lines, which are copied before and after.
_AS_THEY_LIE_FROM = 256


class Arrangement(NamedTuple):
    """The order in which (B, n, m) is laid out, and which dimensions then are summed over in a column and in a row step."""

    order: tuple[int, int, int]
    down: int
    across: int


# torch sums over a dimension with all that follow as vector lanes, and shares out between threads, whatever their size, what
# precedes: row steps over lanes, never a single matrix as lines. What lies column by column stays so.
_LINES = Arrangement((1, 0, 2), 0, 2), Arrangement((2, 0, 1), 2, 0)
_AS_THEY_LIE = Arrangement((0, 1, 2), 1, 2), Arrangement((0, 2, 1), 2, 1)
_LANES = Arrangement((1, 2, 0), 0, 1), Arrangement((2, 1, 0), 1, 0)


def reach(n_iters: int, n: int, m: int, dtype: torch.dtype) -> float:
    """Up to how many nats between the logits of a matrix this serves it."""
    return RANGE


def _arrangement(logits: Tensor, dtype: torch.dtype) -> Arrangement:
    batch, n, m = logits.shape
    turned, size = by_columns(logits), dtype.itemsize
    line = size * (n if turned else m)
    if line >= _AS_THEY_LIE_FROM:
        return _AS_THEY_LIE[turned]
    lanes = line < _LANES_BELOW or size * batch >= _LANES_FROM
    if batch == 1 and torch.get_num_threads() > 1:
        lanes = False
    return (_LANES if lanes else _LINES)[turned]


def forward(logits: Tensor, n_iters: int, temperature: float, row: float, dtype: torch.dtype, plan: Tensor) -> None:
    """Fill ``plan`` (B, n, m), rows of sum ``row``, computed in ``dtype``."""
    order, down, across = _arrangement(logits, dtype)
    S, target = loaded(logits.permute(*order), dtype, temperature), plan.permute(*order)
    log_softmax, P = torch._log_softmax, home(target, dtype)
    X = log_softmax(S, down, False)  # contiguous, as what is filled has to be
    for _ in range(n_iters - 1):
        log_softmax(X, across, False, out=P)
        log_softmax(P, down, False, out=X)
    _fill(target, P, X, across, row)


def _fill(target: Tensor, P: Tensor, X: Tensor, across: int, row: float) -> None:
    """target = r softmax of X along rows, by way of P, its home."""
    torch._softmax(X, across, False, out=P)
    if row != 1.0:
        P.mul_(row)
    if P is not target:
        target.copy_(P)


def record(logits: Tensor, n_iters: int, temperature: float, row: float, dtype: torch.dtype) -> Recorded:
    """X_0 to X_(2T-2) and how they are laid out."""
    arrangement = order, down, across = _arrangement(logits, dtype)
    log_softmax = torch._log_softmax
    x = log_softmax(loaded(logits.permute(*order), dtype, temperature), down, False)
    X = [x]  # made as they come: to write them into the parts of one tensor would cost more, a view for each
    for _ in range(n_iters - 1):
        X.append(x := log_softmax(x, across, False))
        X.append(x := log_softmax(x, down, False))
    return Recorded(arrangement, X)


def finish(recorded: Recorded, row: float, dtype: torch.dtype, plan: Tensor) -> None:
    """Fill ``plan`` as :func:`forward` does, to the bit, from the record of its sweeps."""
    order, _, across = recorded.layout
    target = plan.permute(*order)
    _fill(target, home(target, dtype), recorded.tensors[-1], across, row)


def adjoint(
    recorded: Recorded, temperature: float, row: float, dtype: torch.dtype, grad_plan: Tensor, d_logits: Tensor
) -> None:
    """Fill ``d_logits`` (B, n, m) with the exact adjoint of the sweeps that were recorded."""
    (order, down, across), X = recorded
    D, target = grad_plan.permute(*order), d_logits.permute(*order)
    back = torch._log_softmax_backward_data
    dX = torch._softmax_backward_data(loaded(D, dtype), torch._softmax(X[-1], across, False), across, dtype)
    dS = home(target, dtype)
    for k in range(len(X) - 1, 0, -2):
        back(dX, X[k], down, dtype, out=dS)
        back(dS, X[k - 1], across, dtype, out=dX)
    back(dX, X[0], down, dtype, out=dS)
    if row != temperature:
        dS.mul_(row / temperature)
    if dS is not target:
        target.copy_(dS)
