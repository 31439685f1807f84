"""grad="implicit": the gradient of the fixed point of Sinkhorn's sweeps, whatever found it, in plain PyTorch.

P = exp(S + f + g) with P 1 = r, P^T 1 = c. For a change of S, dP = P * (dS + df 1^T + 1 dg^T) and dP 1 = 0, dP^T 1 = 0 fix df
and dg up to the constants (1, -1). With D the cotangent of P and W = P * D the adjoint is

    dS = W - P * (alpha 1^T + 1 beta^T),   [diag(r) P; P^T diag(c)] [alpha; beta] = [W 1; W^T 1],

whose null vector (1, -1) leaves dS alone. Without alpha = diag(1/r) (W 1 - P beta) it is the Laplacian system of Newton's
step,

    (diag(c) - P^T diag(1/r) P) beta = W^T 1 - P^T diag(1/r) W 1,

deflated and solved as there. alpha and beta are also the gradients of r and c. The plan of a column marginal k c is that of
c, as rows come out exact: hence sum c_j beta_j = 0, which takes the freedom out. (Where only one marginal is given, the other
has its total and the choice cancels.) f0 is forgotten at the fixed point: its gradient is 0.

Cotangents of f and g themselves are added to W 1 and W^T 1. The fixed point has potentials up to (1, -1) alone, and their
derivative is the one of least norm: what a cotangent says of that direction is left out.

Condition. With N = diag(r)^-1/2 P diag(c)^-1/2 the system is diag(c)^1/2 (I - N^T N) diag(c)^1/2, of eigenvalues 1 -
sigma_i(N)^2, 0 for the deflated pair: errors of P and of D are amplified by up to 1 / (1 - sigma_2^2). A residual rho of the
plan's marginals is an error of its potentials of up to rho / (1 - sigma_2^2), hence one of the gradient of up to rho / (1 -
sigma_2^2)^2. So the plan is brought nearer the fixed point first: on a CPU everything here is float64, and one Newton step
from the potentials that were found squares their residual, if that is below ``PURE_BELOW``. Where it is not, this is the
formula at a point that is no fixed point, and the gradient of nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops.problem import Gradients, Problem
from .host import may_look
from .laplacian import solve
from .layout import copy
from .newton import LONGEST_STEP, PURE_BELOW, direction, run
from .projection import Pair
from .sweeps import log_of
from .system import System, pieces

_LOST = 8.0  # units of rounding of the largest column potential that may be an error of a column sum
_MOST_STEPS, _FOUND = 100, 1e-10
_ACCURACY = 100.0  # units of rounding to which conjugate gradients are taken


def implicit_backward(
    problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients, grad_potentials: Pair | None = None
) -> None:
    """Fill ``gradients`` at the fixed point near the column potential ``g`` (B, m), which any solver may have found.

    grad_potentials: cotangents of f (B, n) and g (B, m).
    """
    dtype = torch.float64 if problem.logits.device.type == "cpu" else problem.compute_dtype
    for where, system in pieces(problem, dtype):
        at = system.at
        D = at.matrix(grad_plan[where]).to(dtype)
        P = _at_fixed_point(system, _unrounded(system, at.vector(g[where]).to(dtype), torch.finfo(g.dtype).eps))
        given = None
        if grad_potentials is not None:
            given = _fixed(system, *(at.vector(x[where]).to(dtype) for x in grad_potentials))
        d_logits, alpha, beta = _adjoint(system, P, D, given)
        tau = problem.temperature
        if isinstance(tau, Tensor):
            d_logits.div_(at.whole(tau[where]))
        elif tau != 1.0:
            d_logits.div_(tau)
        copy(gradients.logits[where], at.batch_first(d_logits.masked_fill_(at.whole(system.poisoned), torch.nan)))
        if gradients.f0 is not None and gradients.log_row is not None and gradients.log_col is not None:
            gradients.f0[where] = 0.0
            unit = torch.where(at.scalar(system.poisoned), torch.nan, system.unit)
            gradients.log_row[where] = at.vector(system.r * unit * alpha)
            gradients.log_col[where] = at.vector(system.c * unit * beta)


def _unrounded(system: System, g: Tensor, eps: float) -> Tensor:
    """A potential of logits so large that its rounding alone leaves no Newton step to make is found again from where it is."""
    at = system.at
    lost = g.abs().amax(at.line) * (_LOST * eps) > PURE_BELOW
    if not may_look(lost) or not bool(lost.any()):
        return g
    index = lost.nonzero().squeeze(1)
    some, start = system.take(index), g.index_select(at.batch, index)
    f = torch.where(some.r == 0, 0.0, log_of(some.r) - some.at_potential(start, torch.zeros_like(start)).log_sums)
    base, fine, _ = run(some, f, _MOST_STEPS, _FOUND)
    return g.index_copy(at.batch, index, base + fine)


def _at_fixed_point(system: System, g: Tensor) -> Tensor:
    """The plan a Newton step from g, where that is close enough for one."""
    at, g = system.at, torch.where(g.isfinite(), g, 0.0)
    point = system.at_potential(g, torch.zeros_like(g))
    step = torch.where(at.scalar(point.residual < PURE_BELOW), direction(system, point), 0.0)
    P = point.P.mul_(at.across(step.clamp_(-LONGEST_STEP, LONGEST_STEP).exp_()))
    return P.mul_(at.down(system.r / (at.sums(P, at.cols) + system.spare_rows)))


def _fixed(system: System, of_f: Tensor, of_g: Tensor) -> Pair:
    """Cotangents of the potentials by units of mass, 0 on excluded lines, without their part along (1, -1)."""
    at = system.at
    valid = 1.0 - system.spare_rows, 1.0 - system.spare_cols
    of_f, of_g = (torch.where(x > 0, y, 0.0) / system.unit for x, y in zip(valid, (of_f, of_g), strict=True))
    lines = at.sums(valid[0], at.line) + at.sums(valid[1], at.line)
    mean = at.scalar((at.sums(of_f, at.line) - at.sums(of_g, at.line)) / lines.clamp(min=1.0))
    return of_f - mean * valid[0], of_g + mean * valid[1]


def _adjoint(system: System, P: Tensor, D: Tensor, given: Pair | None) -> tuple[Tensor, Tensor, Tensor]:
    """dS, alpha and beta; P is that of r / unit, which only scales dS. ``given``: cotangents of the potentials."""
    at, inverse_r = system.at, system.inverse_r
    W = P * D.masked_fill(system.S.isneginf(), 0.0)
    rows, cols = at.sums(W, at.cols), at.sums(W, at.rows)
    if given is not None:
        rows, cols = rows + given[0], cols + given[1]
    b = cols - at.sums(P * at.down(rows * inverse_r), at.rows)
    accuracy = torch.full_like(b.select(at.line, 0), _ACCURACY * torch.finfo(b.dtype).eps)
    beta = solve(at, P, inverse_r, b, system.c * system.rounding, accuracy)
    total = at.sums(system.c, at.line)
    beta = beta - at.scalar(at.sums(system.c * beta, at.line) / torch.where(total > 0, total, 1.0))
    alpha = (rows - at.sums(P * at.across(beta), at.cols)) * inverse_r
    W.sub_(P * at.down(alpha)).sub_(P * at.across(beta)).mul_(at.whole(system.unit.squeeze(at.line)))
    return W, alpha, beta
