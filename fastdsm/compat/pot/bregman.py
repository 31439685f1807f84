"""POT's Sinkhorn for one cost: plans, losses for many histograms, its log dictionary and its warning.

Columns first, rows exact; the error, the norm of what columns miss, is looked at after sweeps 1, 11, 21 and so on, as there.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._ops import arguments
from ...results import SinkhornInfo
from .._shared import Convention, balanced, check_scale, sweeps_until, tensors_of

METHODS = ("sinkhorn", "sinkhorn_log")


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float | Tensor,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
) -> Any:
    """The plan of least <P, M> - reg H(P) with P 1 = a, P^T 1 = b.

    Args:
        a: (n,), >= 0; empty for uniform. b: (m,), likewise, or (m, k): k problems of one cost. Their totals may differ: rows
            are exact. Rows of mass 0 take no part, where in the origin's first sweep they do: its limit is the same. M: (n, m).
            Torch tensors, NumPy arrays, or lists, as results will be; dtypes are promoted to one.
        reg: > 0, a number or a scalar tensor. (At 0 the origin returns NaN.)
        method: "sinkhorn" or "sinkhorn_log", both right at any reg, which the origin's first is not: they differ by the log
            dictionary and its gauge. The origin's others are variants to the same plan: take "sinkhorn_log".
        numItermax: sweeps, >= 1, at most.
        stopThr: the norm of P^T 1 - b under which they end. At 0 or less no error is looked at: all sweeps in one launch.
        verbose: print errors, every 200 sweeps.
        log: also return a dictionary: "err", the errors; "niter", the index of the last sweep; "u", "v", factors of exp(-M /
            reg), from u = 1 / n ("sinkhorn"), or from 1, with "log_u" and "log_v" ("sinkhorn_log"). Differentiable.
        warn: warn (UserWarning) where the error was not found below stopThr; with "sinkhorn_log" and b (m, k) always, as there.
        warmstart: (log u, log v) to begin with, of which log u counts; with "sinkhorn_log" and b (m, k) k of them.

    Returns:
        (n, m), or the losses <P, M> (k,) of b (m, k); differentiable in a, b, M, reg and warmstart, the sweeps done unrolled.
        With ``log`` also the dictionary.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.
    """
    arguments.check_choice(method, "method", METHODS)
    function = sinkhorn_knopp if method == "sinkhorn" else sinkhorn_log
    options: dict[str, Any] = {"numItermax": numItermax, "stopThr": stopThr, "verbose": verbose, "log": log}
    return function(a, b, M, reg, warn=warn, warmstart=warmstart, **options)


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float | Tensor,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
) -> Any:
    """The loss <P, M> of :func:`sinkhorn`'s plan: a scalar, or (k,) for b (m, k). ``warn`` is False unless asked for."""
    (cost, masses, _), restored = tensors_of(M, b, a)
    options: dict[str, Any] = {"numItermax": numItermax, "stopThr": stopThr, "verbose": verbose, "log": log}
    found = sinkhorn(a, b, M, reg, method, warn=warn, warmstart=warmstart, **options)
    if masses.dim() == 2:
        return found
    plan = torch.as_tensor(found[0] if log else found, device=cost.device)
    loss = restored((cost * plan).sum())
    return (loss, found[1]) if log else loss


def sinkhorn_knopp(
    a: Any,
    b: Any,
    M: Any,
    reg: float | Tensor,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
) -> Any:
    """:func:`sinkhorn` with method="sinkhorn": potentials are factors, from u = 1 / n, and k problems end together."""
    start = (None, None) if warmstart is None else warmstart
    (a, b, M, u, _), restored = tensors_of(a, b, M, *start)
    a, b = _masses(a, b, M)
    many = b.dim() == 2
    columns = b.mT if many else b
    if u is None:
        u = M.new_full((*columns.shape[:-1], M.shape[0]), 1.0 / M.shape[0]).log()
    elif many:
        u = u.mT
    found = _swept(a, columns, M, reg, u, numItermax, stopThr, verbose, log)
    if warn and not found.converged:
        _warn()
    result = restored((found.plan * M).sum((-2, -1)) if many else found.plan)
    if not log:
        return result
    factors = (x.exp().mT if many else x.exp() for x in (found.log_u, found.log_v))
    u, v = map(restored, factors)
    return result, {"err": [restored(x) for x in found.errors], "niter": found.sweeps - 1, "u": u, "v": v}


def sinkhorn_log(
    a: Any,
    b: Any,
    M: Any,
    reg: float | Tensor,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
) -> Any:
    """:func:`sinkhorn` with method="sinkhorn_log": potentials as logarithms, from 0, and each of k problems ends by itself."""
    (_, masses), _ = tensors_of(a, b)
    if masses.dim() == 2:
        return _of_each(a, b, M, reg, numItermax, stopThr, verbose, log, warmstart)
    start = (None, None) if warmstart is None else warmstart
    (a, b, M, u, _), restored = tensors_of(a, b, M, *start)
    a, b = _masses(a, b, M)
    found = _swept(a, b, M, reg, u, numItermax, stopThr, verbose, log)
    if warn and not found.converged:
        _warn()
    if not log:
        return restored(found.plan)
    potentials = {"log_u": found.log_u, "log_v": found.log_v, "u": found.log_u.exp(), "v": found.log_v.exp()}
    errors = {"err": [restored(x) for x in found.errors], "niter": found.sweeps - 1}
    return restored(found.plan), errors | {name: restored(x) for name, x in potentials.items()}


def _of_each(
    a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warmstart: Any
) -> Any:
    """The losses of the histograms of b (m, k), and without errors their potentials (n, k) and (m, k)."""
    (a, b, M), restored = tensors_of(a, b, M)
    options: dict[str, Any] = {"numItermax": numItermax, "stopThr": stopThr, "verbose": verbose, "log": True}
    starts = [None] * b.shape[1] if warmstart is None else warmstart
    if len(starts) != b.shape[1]:
        raise ValueError(f"warmstart must be {b.shape[1]} pairs (log u, log v), one for each column of b, got {len(starts)}")
    losses, logs = [], []
    for masses, start in zip(b.unbind(1), starts, strict=True):
        pair = None if start is None else tuple(tensors_of(*start)[0])
        plan, found = sinkhorn_log(a, masses, M, reg, warmstart=pair, **options)
        losses.append((plan * M).sum())
        logs.append(found)
    result = restored(torch.stack(losses))
    if not log:
        return result
    return result, {name: restored(torch.stack([x[name] for x in logs], 1)) for name in ("log_u", "log_v", "u", "v")}


class _Found(NamedTuple):
    plan: Tensor
    log_u: Tensor
    log_v: Tensor
    errors: list[Tensor]
    sweeps: int
    converged: bool


def _masses(a: Tensor, b: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """Both, uniform where empty, checked against M (n, m)."""
    arguments.check_matrices(M, "M")
    if M.dim() != 2:
        raise ValueError(f"M must have shape (n, m), got {tuple(M.shape)}; for batches there is fastdsm.compat.pot.batch")
    n, m = M.shape
    a = M.new_full((n,), 1.0 / n) if a.shape[0] == 0 else a
    b = M.new_full((m,), 1.0 / m) if b.shape[0] == 0 else b
    if a.shape != (n,) or b.shape[0] != m or b.dim() > 2:
        raise ValueError(f"a must have shape ({n},) and b ({m},) or ({m}, k), got {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b


def _swept(
    a: Tensor, b: Tensor, M: Tensor, reg: Any, u: Tensor | None, most: int, stop_at: float, verbose: bool, log: bool
) -> _Found:
    """Sweeps for a (n,) and b (..., m) from log u (..., n), and potentials for the totals that masses have."""
    check_scale(reg, "reg")
    columns, excess = balanced(b, a)
    errors: list[Tensor] = []

    def close(plan: Tensor, info: SinkhornInfo) -> bool:
        errors.append((plan.sum(-2) - b.detach()).norm())
        if verbose:
            sweep = 10 * (len(errors) - 1)
            if sweep % 200 == 0:
                print(f"{'It.':5s}|{'Err':12s}\n{'-' * 19}")
            print(f"{sweep:5d}|{float(errors[-1]):8e}|")
        return bool(errors[-1] < stop_at)

    looked_at = log or verbose or stop_at > 0
    most = arguments.count_of(most, "numItermax", 1)
    logits = (-M).expand(*b.shape[:-1], *M.shape)
    found = sweeps_until(
        close if looked_at else None, most, 10, logits, first="col", f0=u, temperature=reg, row_marginal=a, col_marginal=columns
    )
    drift = found.sweeps * excess
    log_u, log_v = (
        (found.info.f - drift).masked_fill(a == 0, -torch.inf),
        (found.info.g + drift).masked_fill(b == 0, -torch.inf),
    )
    return _Found(found.plan, log_u, log_v, errors, found.sweeps, found.stopped)


def _warn() -> None:
    warnings.warn(
        "Sinkhorn did not converge to stopThr; increase numItermax or reg, or solve by Newton's method: "
        'fastdsm.sinkhorn(-M, temperature=reg, row_marginal=a, col_marginal=b, solver="newton")',
        UserWarning,
        stacklevel=4,
    )


CONVENTIONS = tuple(
    Convention(name, "columns", "rows", "numItermax: a sweep, to stopThr", "a | b", "reg", "-M", "as given")
    for name in ("sinkhorn", "sinkhorn2", "bregman.sinkhorn_knopp", "bregman.sinkhorn_log")
)
