"""POT's ``ot.batch``: many problems of one size, rows first, columns exact.

The error, the largest norm of what rows miss, is looked at after sweeps 1, 11, 21 and so on; all problems end together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._ops import arguments
from ...log_projection import log_sinkhorn
from ...projection import sinkhorn
from ...results import SinkhornInfo
from .._shared import Convention, balanced, check_scale, detached, positive_logits, sweeps_until, tensors_of

GRADIENTS = ("detach", "autodiff", "last_step", "envelope")


@dataclass(frozen=True)
class OTResult:
    """What :func:`solve_batch` returns, under ``ot.utils.OTResult``'s names."""

    plan: Any
    value: Any
    value_linear: Any
    potentials: tuple[Any, Any]
    log: dict[str, int]


def solve_batch(
    M: Any,
    reg: float | Tensor | None = None,
    a: Any = None,
    b: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """Plans of least <P, M> + reg R(P) with P 1 = a, P^T 1 = b, and their values.

    Args:
        M: (B, n, m); a: (B, n), b: (B, m), default uniform of total 1. Torch, NumPy or lists, as results will be.
        reg: > 0, a number or a scalar tensor. Without it the origin takes a proximal method, which is not served.
        max_iter: sweeps, >= 1, at most; tol: the largest norm of P 1 - a at which all end; 0 or less makes all of them.
        method: "auto" or "log_sinkhorn", or "sinkhorn", whose potentials are factors.
        inner_iter, inner_reg: of the proximal method; only their defaults.
        reg_type: "entropy", R = -H(P), or "kl", R = KL(P | a b^T).
        grad: "envelope", of the values alone, plans being constants; "autodiff", of all, the sweeps unrolled; "last_step", of
            all, by one more sweep from constants; "detach", none in M. The origin's "last_step" leaves out how the plan depends
            on M but by its potentials; here it is the gradient of that sweep.

    Returns:
        An :class:`OTResult`: plan (B, n, m), value and value_linear = <P, M> (B,), potentials (B, n) and (B, m), log["n_iter"].

    Raises:
        NotImplementedError: of the proximal method. TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    arguments.check_choice(method, "method", ("auto", "log_sinkhorn", "sinkhorn", "proximal"))
    arguments.check_choice(reg_type, "reg_type", ("entropy", "kl"))
    arguments.check_choice(grad, "grad", GRADIENTS)
    if method == "proximal" or reg is None or (not isinstance(reg, Tensor) and reg == 0):
        raise NotImplementedError(f"the proximal method is not served; give reg > 0, or call ot.solve_batch; got reg={reg}")
    if (inner_iter, inner_reg) != (1, 1e-3):
        raise ValueError(
            f"inner_iter and inner_reg are the proximal method's, got {inner_iter} and {inner_reg}; leave them out"
        )
    (M, a, b), restored = tensors_of(M, a, b)
    a, b = _masses(a, b, M)
    found = _projected(-M, reg, a, b, max_iter, tol, grad, logarithms=False)
    plan, cost = found["T"], M
    if grad in ("detach", "envelope"):
        plan = plan.detach()
    if grad == "detach":
        cost = cost.detach()
    linear = (cost * plan).sum((1, 2))
    if reg_type == "entropy":
        value = linear + reg * (plan * (plan + 1e-16).log()).sum((1, 2))
    else:
        value = linear + reg * (plan * (plan / (a.unsqueeze(-1) * b.unsqueeze(-2)) + 1e-16).log()).sum((1, 2))
    u, v = found["potentials"]
    if method == "sinkhorn":
        u, v = u.exp(), v.exp()
    return OTResult(restored(plan), restored(value), restored(linear), (restored(u), restored(v)), {"n_iter": found["n_iters"]})


def bregman_log_projection_batch(
    K: Any, a: Any = None, b: Any = None, nx: None = None, max_iter: int = 10000, tol: float = 1e-5, grad: str = "detach"
) -> dict[str, Any]:
    """The plan of exp(K) with masses a and b.

    Args:
        K: (B, n, m), logits. a, b, max_iter, tol, grad: as for :func:`solve_batch`; "envelope" is "autodiff" here.
        nx: None; the library is that of the arrays.

    Returns:
        "T" (B, n, m), "log_T", right where T underflows, "potentials" (u, v), T = exp(K + u + v), "n_iters", the index of the
        last sweep.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    _check_options(nx, grad)
    (K, a, b), restored = tensors_of(K, a, b)
    found = _projected(K, 1.0, *_masses(a, b, K), max_iter, tol, grad, logarithms=True)
    found["potentials"] = tuple(map(restored, found["potentials"]))
    return found | {name: restored(found[name]) for name in ("T", "log_T")}


def bregman_projection_batch(
    K: Any, a: Any = None, b: Any = None, nx: None = None, max_iter: int = 10000, tol: float = 1e-5, grad: str = "detach"
) -> dict[str, Any]:
    """The plan of K >= 0: :func:`bregman_log_projection_batch` of log K, without "log_T", potentials being factors.

    Entries of 0 have a gradient of 0, which in the origin is what a positive number in their place would change.
    """
    _check_options(nx, grad)
    (K, a, b), restored = tensors_of(K, a, b)
    found = _projected(positive_logits(K), 1.0, *_masses(a, b, K), max_iter, tol, grad, logarithms=False)
    u, v = (restored(x.exp()) for x in found["potentials"])
    return {"T": restored(found["T"]), "n_iters": found["n_iters"], "potentials": (u, v)}


def _check_options(nx: Any, grad: str) -> None:
    if nx is not None:
        raise ValueError("nx must be None: the library is that of the arrays; leave it out")
    arguments.check_choice(grad, "grad", GRADIENTS)


def _masses(a: Tensor | None, b: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both, uniform where None, checked against (B, n, m)."""
    if like.dim() != 3:
        raise ValueError(
            f"a batch of matrices (B, n, m) is expected, got {tuple(like.shape)}; unsqueeze(0) makes one of a matrix"
        )
    arguments.check_matrices(like, "matrices")
    B, n, m = like.shape
    a = like.new_full((B, n), 1.0 / n) if a is None else a
    b = like.new_full((B, m), 1.0 / m) if b is None else b
    return arguments.broadcast(a, "a", (B, n)), arguments.broadcast(b, "b", (B, m))


def _projected(
    logits: Tensor, reg: Any, a: Tensor, b: Tensor, most: int, tol: float, grad: str, *, logarithms: bool
) -> dict[str, Any]:
    """ "T", "n_iters", "potentials", and "log_T" if ``logarithms``, of logits / reg."""
    most = arguments.count_of(most, "max_iter", 1)
    constant = grad in ("detach", "last_step")
    check_scale(reg, "reg")
    rows, excess = balanced(a, b)
    options: dict[str, Any] = {"first": "row", "temperature": reg, "row_marginal": rows, "col_marginal": b}
    if constant:
        options["temperature"] = detached(reg)

    def close(plan: Tensor, info: SinkhornInfo) -> bool:
        missed = (plan.sum(-1) - a.detach()).norm(dim=-1)
        return not missed.numel() or bool(missed.max() < tol)

    kept = logits.detach() if constant else logits
    found = sweeps_until(close if tol > 0 else None, most, 10, kept, **options)
    plan, info, sweeps, start = found.plan, found.info, found.sweeps, None
    n_iters = sweeps - 1
    if grad == "last_step":
        options["temperature"], start, sweeps, n_iters = reg, info.g.detach(), 1, n_iters
        plan, info = sinkhorn(logits, n_iters=1, f0=start, return_info=True, **options)
    drift = (found.sweeps + (grad == "last_step")) * excess
    potentials = (info.f + drift).masked_fill(a == 0, -torch.inf), (info.g - drift).masked_fill(b == 0, -torch.inf)
    result: dict[str, Any] = {"T": plan, "n_iters": n_iters, "potentials": potentials}
    if logarithms:
        of = logits if grad == "last_step" else kept
        result["log_T"] = log_sinkhorn(of, n_iters=sweeps, f0=start, **options)
    return result


CONVENTIONS = (
    Convention("solve_batch", "rows", "columns", "max_iter: a sweep, to tol", "a | b", "reg", "-M", "as given"),
    Convention(
        "bregman_log_projection_batch", "rows", "columns", "max_iter: a sweep, to tol", "a | b", "none", "K", "as given"
    ),
    Convention(
        "bregman_projection_batch", "rows", "columns", "max_iter: a sweep, to tol", "a | b", "none", "log K", "as given"
    ),
)
