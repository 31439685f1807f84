"""The largest temperature at which the converged plan of each matrix has a given sigma2: scan, bracket, refine.

sigma2(tau), of the plan of logits / tau swept to convergence, is continuous. Neither end needs to be guessed:

- tau -> inf: by sigma2 <= tanh(D / (4 tau)), D the largest |L_ij + L_kl - L_il - L_kj|, no root lies above
  D / (4 atanh(target)); with the row and column means of L taken out, D <= 4 max |L|. Entries that are masked make D infinite:
  sigma2 then tends to that of the mask's own plan, and the scan starts 16 times higher instead.
- tau -> 0: the plan tends to the optimal assignment's, sigma2 to 1 where that is unique. Where it is not the curve may stay
  below the target for good; it also need not be monotone. So the curve is walked down from the top in steps of 1/4 in log tau
  to the first change of sign, which brackets the largest root (two roots within one step are passed over), 48 steps at most:
  a factor of 10^5.

Inside the bracket: regula falsi in log tau with Illinois' halving, each third step a bisection, so that the bracket at least
halves every three steps. Every matrix has its own bracket; on a CPU those that are done leave the batch. The potentials are
those of a smooth function of tau divided by it, f = F(tau) / tau, so that F starts the next plan's sweeps.

Matrices of up to 64 lines whose logits are narrower than float64 have all of this in one launch where there are kernels, in
float32 (``kernels/tile/temperature.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..projection import sinkhorn
from ..spectrum import sigma2
from . import composed, transforms
from .marginals import excluded_entries, lines_taking_part, marginals_of
from .runs import TemperatureSearch

_PLAN_TOL = 1e-7  # residual of a plan that counts as converged; sigma2 then errs by about as much over 1 - sigma2
_SIGMA2_TOL = 1e-6  # where refining stops
_TOL = 1e-4  # distance from the target at which a root counts as reached
_STEP = 0.25
_SCAN = 48
_START = 1.01  # above the bound, which a 2 x 2 matrix attains
_MASKED_START = 16.0
_REFINEMENTS = 40
_NARROW = 1e-12
_ROUNDING = 1e-13  # what is left of logits of rank one when their means are taken out, relative to the logits


class Matrices(NamedTuple):
    """Logits (B, n, m) in float64 without row and column means, -inf where no part is taken, and the marginals or None."""

    logits: Tensor
    row: Tensor | None
    col: Tensor | None
    n_iters: int
    backend: str

    def at(self, where: Tensor) -> Matrices:
        """Those of the matrices that ``where`` lists."""
        row, col = (None if x is None else x[where] for x in (self.row, self.col))
        return Matrices(self.logits[where], row, col, self.n_iters, self.backend)

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Both marginals, 0 on lines that take no part."""
        return marginals_of(self.logits, self.row, self.col, None)

    @property
    def lines(self) -> Tensor:
        """Entries whose lines take part, masked ones among them."""
        return lines_taking_part(self.logits, self.row, self.col, None)


@dataclass(frozen=True)
class Converged:
    """plan (B, n, m), potentials f (B, n) and g (B, m), whether each plan has converged (B,)."""

    plan: Tensor
    f: Tensor
    g: Tensor
    done: Tensor


def matrices_of(
    logits: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None, n_iters: int, backend: str
) -> tuple[Matrices, Tensor]:
    """The matrices of a call, and their reach (B,): atanh(target) / 16 times a temperature that no root lies above.

    It is NaN where all of a matrix is rounding, which has no interaction, and NaN or inf where the matrix has NaN or inf.
    """
    row, col = (None if x is None else x.double() for x in (row, col))
    excluded = excluded_entries(mask, logits, row, col)
    centred = logits.to(torch.float64, copy=True).masked_fill_(excluded, 0.0)
    rounding = centred.abs().amax((-2, -1)).mul_(_ROUNDING)
    outside = excluded.double()
    inside = torch.rsub(outside, 1.0)
    counts = [inside.sum(dim, keepdim=True) for dim in (-1, -2)]
    masked = torch.mul(*counts).mul_(outside).amax((-2, -1))  # 1 or more where an entry is excluded whose lines are not
    if row is not None and col is not None:  # their totals agree to the dtype they came in, a plan has to meet both
        r, c = ((x * (count.flatten(1) > 0)).sum(-1, keepdim=True) for x, count in zip((row, col), counts, strict=True))
        col = torch.where(c == 0, col, col * (r / c))
    for dim, count in zip((-1, -2), counts, strict=True):
        mean = centred.sum(dim, keepdim=True).div_(count.clamp_(min=1.0))
        centred.addcmul_(inside, mean, value=-1.0)
    size = centred.abs().amax((-2, -1))
    reach = size.masked_fill_(size <= rounding, torch.nan).mul_(masked.clamp_(min=_START / _MASKED_START, max=1.0))
    return Matrices(centred.masked_fill_(excluded, -torch.inf), row, col, n_iters, backend), reach


def converged_plans(matrices: Matrices, temperature: Tensor, f0: Tensor | None) -> Converged:
    """The converged plans at ``temperature`` (B,), started from the row potential ``f0``. The one place that makes plans."""
    plan, info = sinkhorn(
        matrices.logits, temperature=temperature, f0=f0, row_marginal=matrices.row, col_marginal=matrices.col, solver="newton",
        n_iters=matrices.n_iters, tol=_PLAN_TOL, return_info=True, backend=matrices.backend,
    )  # fmt: skip
    return Converged(plan, info.f, info.g, info.converged)


class _Curve:
    """log tau -> (sigma2 of the converged plan, whether it has converged), matrix by matrix."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
        self.potential = torch.zeros_like(matrices.logits[..., 0])

    def __call__(self, log_tau: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        part = self.matrices.at(where)
        tau = log_tau.exp()
        found = converged_plans(part, tau, self.potential[where] / tau[:, None])
        self.potential[where] = (found.f * tau[:, None]).nan_to_num(nan=0.0)
        value = sigma2(
            found.plan, tol=_SIGMA2_TOL, mask=part.lines, row_marginal=part.row, col_marginal=part.col, backend=part.backend
        )
        return value, found.done


@dataclass
class _Bracket:
    """Two ends in log tau, (B,), and sigma2 - target there, of opposite signs where ``found``."""

    a: Tensor
    b: Tensor
    at_a: Tensor
    at_b: Tensor
    found: Tensor


def search(
    matrices: Matrices, reach: Tensor, target: float | Tensor, needed: Tensor | None, dtype: torch.dtype, run: TemperatureSearch
) -> tuple[Tensor, Tensor]:
    """(temperature, reached), (B,) each: NaN and False where no root was found, or where it is not ``needed``.

    dtype: that of the temperatures, and of a target that is a number. run: the search in one launch, where that is open to the
    logits as they came.
    """
    slope = target.double().atanh() if isinstance(target, Tensor) else math.atanh(target)
    start = (reach * (_MASKED_START / slope)).log2_()
    if isinstance(target, Tensor):  # where it is 0 or 1 nothing is searched, as where it is out of bounds, a logarithm's NaN
        start.nan_to_num_(torch.nan, torch.nan, torch.nan)
    else:
        target = torch.full_like(start, target, dtype=dtype)
    if needed is not None:
        start.masked_fill_(~needed, torch.nan)
    if run.serves and (found := _by_kernel(run, matrices, target, start)):
        return found
    curve, target, searched = _Curve(matrices), target.double(), start.isfinite()
    bracket = _scan(curve, target, start.mul(math.log(2.0)).where(searched, 0.0), searched)
    log_tau, error, done = _refine(curve, target, bracket)
    reached = bracket.found & done & (error.abs() <= _TOL)
    return torch.where(reached, log_tau.exp(), torch.nan).to(dtype), reached


def _by_kernel(run: TemperatureSearch, matrices: Matrices, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """What :func:`search` returns, in one launch; None where no kernel serves these matrices."""
    given = matrices.logits, matrices.row, matrices.col, target, start
    temperature, reached = run(tuple([None if x is None else x.float() for x in given]))
    assert temperature is not None
    assert reached is not None
    return (temperature, reached.view(torch.bool)) if run.serves else None


def _scan(curve: _Curve, target: Tensor, top: Tensor, searched: Tensor) -> _Bracket:
    """Down from ``top`` to the first change of sign."""
    active, error = searched.clone(), torch.zeros_like(top)
    where = _listed(active)
    error[where] = curve(top[where], where)[0] - target[where]
    bracket = _Bracket(top.clone(), top.clone(), error, error.clone(), torch.zeros_like(searched))
    for _ in range(_SCAN):
        where = _listed(active)
        if len(where) == 0:
            break
        start, before = bracket.b[where], bracket.at_b[where]
        value, _ = curve(start - _STEP, where)
        error = value - target[where]
        on, crossed = active[where], (error >= 0) != (before >= 0)
        bracket.a[where] = torch.where(on, start, bracket.a[where])
        bracket.at_a[where] = torch.where(on, before, bracket.at_a[where])
        bracket.b[where] = torch.where(on, start - _STEP, start)
        bracket.at_b[where] = torch.where(on, error, before)
        bracket.found[where] = bracket.found[where] | (on & crossed)
        active[where] = on & ~crossed
    return bracket


def _refine(curve: _Curve, target: Tensor, bracket: _Bracket) -> tuple[Tensor, Tensor, Tensor]:
    """The root inside the bracket: log tau, sigma2 - target there, and whether that plan has converged."""
    x, error, done = bracket.b.clone(), bracket.at_b.clone(), torch.zeros_like(bracket.found)
    weight_a, weight_b = bracket.at_a.clone(), bracket.at_b.clone()
    last_b, last_a = (torch.zeros_like(bracket.found) for _ in range(2))  # which end the step before replaced
    active = bracket.found.clone()
    for step in range(_REFINEMENTS):
        where = _listed(active)
        if len(where) == 0:
            break
        a, b, at_a, at_b = (y[where] for y in (bracket.a, bracket.b, weight_a, weight_b))
        middle = (a + b) / 2
        if step % 3 != 2:
            secant = a + (b - a) * (at_a / (at_a - at_b))
            middle = torch.where(secant.isfinite(), secant, middle)
        value, converged = curve(middle, where)
        new = value - target[where]
        on, replaces_b = active[where], (new >= 0) == (at_b >= 0)
        x[where], error[where] = torch.where(on, middle, x[where]), torch.where(on, new, error[where])
        done[where] = torch.where(on, converged, done[where])
        # Illinois: an end that stays twice counts half, lest the other alone move.
        weight_a[where] = torch.where(replaces_b, torch.where(last_b[where], at_a / 2, at_a), new)
        weight_b[where] = torch.where(replaces_b, new, torch.where(last_a[where], at_b / 2, at_b))
        last_b[where], last_a[where] = replaces_b, ~replaces_b
        bracket.a[where] = torch.where(on & ~replaces_b, middle, a)
        bracket.b[where] = torch.where(on & replaces_b, middle, b)
        narrow = (bracket.a[where] - bracket.b[where]).abs() <= _NARROW
        active[where] = on & ~(new.abs() <= _SIGMA2_TOL) & ~narrow
    return x, error, done


def _listed(active: Tensor) -> Tensor:
    """Indices of the active matrices; of all of them on an accelerator, where counting would stall the host."""
    if active.device.type == "cpu":
        return active.nonzero().squeeze(-1)
    return torch.arange(len(active), device=active.device)


def root_gradients(matrices: Matrices, temperature: Tensor, reached: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of logits (B, n, m) and target (B,) from that of the temperature, by the implicit function theorem.

    sigma2(L / tau) = target, and d sigma2 = <G, dL> / tau - <G, L> d tau / tau^2 with G the gradient of the converged plan's
    sigma2 in L / tau: that of the plan, u v^T over sqrt(r c), through the fixed point. So

        d tau = (tau <G, dL> - tau^2 d target) / <G, L>.

    <G, L> does not change with the gauge of L, since the lines of G sum to zero. Zero where nothing was reached.
    """
    L, tau = matrices.logits, torch.where(reached, temperature, 1.0).double()
    # The search came here from warm starts; these plans have to do without.
    found = converged_plans(matrices._replace(n_iters=4 * matrices.n_iters), tau, None)
    spectrum = sigma2(
        found.plan, tol=_SIGMA2_TOL**2, mask=matrices.lines, row_marginal=matrices.row, col_marginal=matrices.col,
        return_vectors=True, backend="auto",
    )  # fmt: skip
    assert not isinstance(spectrum, Tensor)
    u, v = (x * torch.where(mass == 0, 0.0, mass.rsqrt()) for x, mass in zip(spectrum[1:], matrices.marginals, strict=True))
    G = transforms.fixed_point_backward(
        u.unsqueeze(-1) * v.unsqueeze(-2), found.f, found.g, L / tau[:, None, None], None, None, matrices.row,
        matrices.col, None, 1.0, 0, True, _PLAN_TOL, matrices.backend, False,
    )[0]  # fmt: skip
    slope = (G * L.masked_fill(L.isneginf(), 0.0)).sum((-2, -1))
    factor = torch.where(reached, grad.double() * tau / slope, 0.0)
    d_logits = torch.where(reached[:, None, None], G * factor[:, None, None], 0.0)
    return d_logits, -tau * factor


def near_root(temperature: Tensor, reached: Tensor, logits: Tensor, target: Tensor, *inputs: Any) -> Tensor:
    """``temperature`` (B,), with derivatives to the second order in an operator's inputs, zero where nothing was reached.

    Two chord steps tau <- tau - (sigma2(tau) - target) / s from it, s the slope of sigma2 there, which is held. What the root
    moves by with the inputs, of first order, the first step leaves an error of second order of, the second one of third.
    """
    row, col, mask, _, n_iters, backend = inputs
    logits = torch.where(reached[:, None, None], logits.double(), 0.0)

    def curve(logits: Tensor, tau: Tensor) -> Tensor:
        options = 1.0, 4 * n_iters, True, _PLAN_TOL, backend, "newton", True, True
        return composed.fixed_point(logits, tau, None, row, col, mask, *options)[-1]

    start = tau = torch.where(reached, temperature.detach(), 1.0).double()
    slope = torch.func.grad(lambda tau: curve(logits.detach(), tau).sum())(start).detach()
    slope = torch.where(reached, slope, 1.0)
    for _ in range(2):
        tau = tau - (curve(logits, tau) - target) / slope
    return composed.with_tangent(temperature, torch.where(reached, tau, start))
