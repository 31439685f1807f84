"""pygmtools: plans of graph matching, of batches of different sizes, with or without dummy rows.

Source: pygmtools 0.6.0, ``pygmtools.sinkhorn`` and its PyTorch backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._ops import arguments
from ..projection import sinkhorn as _project
from ._shared import Convention, check_scale, tensors_of

_DUMMY = -100.0  # the logits of dummy rows, after the temperature


def sinkhorn(
    s: Any,
    n1: Any = None,
    n2: Any = None,
    unmatch1: None = None,
    unmatch2: None = None,
    dummy_row: bool = False,
    max_iter: int = 10,
    tau: float = 1.0,
    batched_operation: bool = False,
    backend: str | None = None,
) -> Any:
    """``max_iter`` normalisations of rows and columns in turn, of each pair the shorter side first, which here are called rows.

    Args:
        s: (B, n, m) or (n, m), scores; a torch tensor, or an array of NumPy, as the result will be.
        n1, n2: None, or the numbers (B,) of rows and columns of s that take part, the first ones; for (n, m) numbers.
        unmatch1, unmatch2: None. Scores of lines that remain without a match are not served: the origin never normalises the
            lines which it adds for them, and such sweeps have no fixed masses. Call pygmtools for them.
        dummy_row: add rows of scores -100 (after tau) up to as many as there are columns, which are cut off again.
        max_iter: half steps, >= 1: after an odd number the shorter side is exact, after an even one the longer.
        tau: > 0, what scores are divided by.
        batched_operation: either; how the origin loops, with the same values, and NaN for gradients if True. Here one launch.
        backend: None, "pytorch" or "numpy": that of s. (The origin's None is its global choice.)

    Returns:
        Like s, lines of the side normalised last of sum 1, zero beyond n1 and n2. Differentiable.

    Raises:
        NotImplementedError: of unmatch1 and unmatch2. TypeError, ValueError: with what was expected and what to do.
    """
    if unmatch1 is not None or unmatch2 is not None:
        raise NotImplementedError("unmatch1 and unmatch2 are not served; leave them out, or call pygmtools.sinkhorn for them")
    (s,), restored = tensors_of(s)
    arguments.check_matrices(s, "s")
    if s.dim() not in (2, 3):
        raise ValueError(f"s must have shape (B, n, m) or (n, m), got {tuple(s.shape)}; flatten the batch")
    if backend is not None:
        arguments.check_choice(backend, "backend", ("pytorch" if restored(s) is s else "numpy",))
    max_iter = arguments.count_of(max_iter, "max_iter", 1)
    check_scale(tau, "tau")
    matrices = s if s.dim() == 3 else s.unsqueeze(0)
    rows, columns = _counts(n1, matrices, -2, "n1"), _counts(n2, matrices, -1, "n2")
    if matrices.shape[-2] <= matrices.shape[-1]:
        plan = _shorter_first(matrices, rows, columns, dummy_row, max_iter, tau)
    else:
        plan = _shorter_first(matrices.mT, columns, rows, dummy_row, max_iter, tau).mT
    return restored(plan if s.dim() == 3 else plan.squeeze(0))


def _shorter_first(s: Tensor, rows: Tensor, columns: Tensor, dummy_row: bool, half_steps: int, tau: float) -> Tensor:
    """The plan of s (B, n, m), n <= m, pairs with more rows than columns turned round."""
    n, m = s.shape[-2:]
    turned = (rows > columns)[:, None, None]
    s = torch.where(turned, pad(s.mT[:, :n], (0, m - n)), s)
    rows, columns = torch.minimum(rows, columns), torch.maximum(rows, columns)
    exact: dict[str, Any] = {"row_marginal": 1.0} if half_steps % 2 else {"col_marginal": 1.0}
    inside = _lines(rows, n).unsqueeze(-1) & _lines(columns, m).unsqueeze(-2)
    if dummy_row:
        inside = pad(inside, (0, 0, 0, m - n))
        square = _lines(columns, m)
        logits = pad(s / tau, (0, 0, 0, m - n)).where(inside, _DUMMY)
        plan = _project(logits, half_steps=half_steps, first="row", mask=square.unsqueeze(-1) & square.unsqueeze(-2))
        plan = plan.where(inside, 0.0)[:, :n]
    else:
        plan = _project(s, half_steps=half_steps, first="row", temperature=tau, mask=inside, **exact)
    return torch.where(turned, pad(plan.mT[:, :n], (0, m - n)), plan)


def _counts(given: Any, s: Tensor, side: int, name: str) -> Tensor:
    """(B,): how many lines of a side take part, all by default."""
    lines, batch = s.shape[side], s.shape[0]
    if given is None:
        return torch.full((batch,), lines, device=s.device)
    counts = torch.as_tensor(given, device=s.device).reshape(-1)
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.shape != (batch,):
        raise ValueError(f"{name} must be {batch} integers, one for each matrix, got {counts.dtype} of {tuple(counts.shape)}")
    if arguments.may_read(counts) and bool(((counts < 0) | (counts > lines)).any()):
        raise ValueError(f"{name} must lie in 0 to {lines}, the lines that s has, got {counts.tolist()}")
    return counts


def _lines(counts: Tensor, size: int) -> Tensor:
    """(B, size), True for the first ``counts``."""
    return torch.arange(size, device=counts.device) < counts.unsqueeze(-1)


CONVENTIONS = (
    Convention(
        "sinkhorn", "the shorter side", "shorter, odd; longer, even", "max_iter: a half step", "1 | 1", "tau=1", "s",
        "each pair's shorter side as rows",
    ),
)  # fmt: skip
