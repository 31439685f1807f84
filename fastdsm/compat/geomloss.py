"""GeomLoss: entropic transport solved to convergence: plan, value and potentials.

Source: geomloss 0.3.1, ``geomloss.ot.solve`` and ``solve_batch``; Feydy's thesis, equations 3.207 to 3.209. Its updates are
averaged and annealed, and after so many of them its plan is no Sinkhorn sweep's; in the limit there is but one, which is here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops import arguments
from ..projection import sinkhorn
from ._shared import Convention, check_scale, tensors_of

_STEPS = 100  # of Newton's method; 60 serve logits of a standard deviation of 100


@dataclass(frozen=True)
class OTResultMatrix:
    """A solution, (N, M) of ``solve``, (B, N, M) of ``solve_batch``, in the arrays' library.

    plan: P. density: P / (a b^T), exp((f + g - C) / reg). potential_a, potential_b: f and g, relative to the masses, free by a
    constant (+1, -1). value: <a, f> + <b, g>, the least <P, C> + reg KL(P | a b^T) of masses of total 1, with its envelope
    gradient, P in C and f, g in a, b (by a constant: masses keep their total). marginal_a, marginal_b: P's own.
    """

    plan: Any
    density: Any
    potential_a: Any
    potential_b: Any
    value: Any
    marginal_a: Any
    marginal_b: Any


def solve(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResultMatrix:
    """:func:`solve_batch` of one problem: C (N, M), a (N,), b (M,)."""
    (C, a, b), restored = tensors_of(C, a, b)
    if C.dim() != 2:
        raise ValueError(f"C must have shape (N, M), got {tuple(C.shape)}; for batches there is solve_batch")
    a, b = (x if x is None else x.unsqueeze(0) for x in (a, b))
    options: dict[str, Any] = {"unbalanced": unbalanced, "unbalanced_type": unbalanced_type, "method": method}
    found = solve_batch(C.unsqueeze(0), reg=reg, a=a, b=b, max_iter=max_iter, tol=tol, **options)
    return OTResultMatrix(**{name: restored(x.squeeze(0)) for name, x in vars(found).items()})


def solve_batch(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResultMatrix:
    """The plans of least <P, C> + reg KL(P | a b^T) with P 1 = a, P^T 1 = b, by Newton's method.

    Args:
        C: (B, N, M), costs. a: (B, N), b: (B, M), > 0, default uniform of total 1; totals may differ by 1e-3, as there, and b
            is scaled to a's. Torch tensors, NumPy arrays or lists, as results will be.
        reg: > 0.
        unbalanced, unbalanced_type, method: only their defaults; with ``unbalanced`` call GeomLoss.
        max_iter: None, or at most so many steps, of Newton's method and not of the origin's: 100 by default, and no more are
            needed. (The origin demands a number.)
        tol: None, or the relative residual to reach; default 1e-6, 1e-12 for float64. (The origin has none.)

    Returns:
        An :class:`OTResultMatrix`. The gradient of plan and potentials is the implicit one. The origin's gradient of the value
        in C is 2 P, where finite differences find P.

    Raises:
        NotImplementedError: of unbalanced problems. TypeError, ValueError: as :func:`fastdsm.sinkhorn`.

    Warns:
        RuntimeWarning: where steps did not suffice.
    """
    if unbalanced is not None:
        raise NotImplementedError(f"unbalanced transport is not served, got unbalanced={unbalanced}; call geomloss.ot.solve")
    arguments.check_choice(unbalanced_type, "unbalanced_type", ("KL",))
    arguments.check_choice(method, "method", ("auto",))
    (C, a, b), restored = tensors_of(C, a, b)
    if C.dim() != 3:
        raise ValueError(f"C must have shape (B, N, M), got {tuple(C.shape)}; for one problem there is solve")
    arguments.check_matrices(C, "C")
    check_scale(reg, "reg")
    a, b = _masses(a, C, -2, "a"), _masses(b, C, -1, "b")
    total, other = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    if arguments.may_read(C) and bool(((total - other).abs() > 1e-3 * (total + other)).any()):
        raise ValueError("a and b must have equal totals, to 1e-3 of their sum; scale one of them")
    b = b * (total / other)
    plan, info = sinkhorn(
        -C,
        temperature=reg,
        row_marginal=a,
        col_marginal=b,
        solver="newton",
        tol=tol,
        return_info=True,
        n_iters=_STEPS if max_iter is None else arguments.count_of(max_iter, "max_iter", 1),
    )
    if arguments.may_read(C) and not bool(info.converged.all()):
        warnings.warn(
            f"residuals of up to {float(info.residual.max()):.1e} are left; increase max_iter, tol or reg",
            RuntimeWarning,
            stacklevel=2,
        )
    f, g = reg * (info.f - a.log()), reg * (info.g - b.log())
    value = _Value.apply(C, a, b, plan, f, g)
    density = ((f.unsqueeze(-1) + g.unsqueeze(-2) - C) / reg).exp()
    found = (plan, density, f, g, value, plan.sum(-1), plan.sum(-2))
    return OTResultMatrix(*map(restored, found))


class _Value(torch.autograd.Function):
    """<a, f> + <b, g> with its gradient by the envelope theorem, P in C, f in a, g in b, which are differentiable again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(C: Tensor, a: Tensor, b: Tensor, plan: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return (a * f).sum(-1) + (b * g).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, f, g = ctx.saved_tensors
        return grad[..., None, None] * plan, grad.unsqueeze(-1) * f, grad.unsqueeze(-1) * g, None, None, None


def _masses(x: Tensor | None, C: Tensor, side: int, name: str) -> Tensor:
    """(B, lines), uniform where None, positive."""
    shape = (C.shape[0], C.shape[side])
    if x is None:
        return C.new_full(shape, 1.0 / shape[1])
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if arguments.may_read(x) and x.numel() and not bool((x > 0).all()):
        raise ValueError(
            f"{name} must be > 0 everywhere, for potentials relative to it, got {float(x.min())}; leave such lines out"
        )
    return x


CONVENTIONS = tuple(
    Convention(name, "-", "both, converged", "max_iter: a Newton step", "a | b", "reg", "-C", "potentials relative to a b^T")
    for name in ("solve", "solve_batch")
)
