"""solver="newton" and its implicit gradient held against the float64 oracle; what :mod:`fastdsm._verify.sinkhorn` adds for it.

Converged plans have budgets of their own: two runs stop at different points within their tolerance, and the plain float32 run
does not foretell how far apart. A plan of residual tol, from logits rounded by a unit u of their largest entry, has potentials
off by up to k = (tol + 2 u max |S|) / (1 - sigma_2^2), so that

    plan       2 k times the largest r, and half a unit in the last place of a 16-bit result;
    gradient   k / (1 - sigma_2^2) times :func:`~fastdsm._verify.sinkhorn.gradient_size`, likewise: the plan's error enters a
               system of that condition number;
    residual   tol, that is 1e-6, or 1e-12 in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops.problem import compute_dtype
from ..projection import sinkhorn
from ..results import SinkhornInfo, default_tol
from .sinkhorn import DTYPES, Case, Record, Target, cast, failed, gradient_size, half_ulp, inputs, worst

_OPTIONS = ("row first", "temperature", "marginals", "one marginal", "f0")
_STEPS = 40


@dataclass(frozen=True)
class NewtonCase(Case):
    """As :class:`~fastdsm._verify.sinkhorn.Case`; ``n_iters`` caps the steps."""

    @property
    def summary(self) -> str:
        """Everything but the dtype."""
        option = f", {self.option}" if self.option else ""
        return f"newton {'x'.join(map(str, self.shape))}, std {self.std:g}{option}"


def newton_cases(target: Target, quick: bool = False) -> list[NewtonCase]:
    """The grid: sizes at every logit scale, options, in every dtype."""
    if quick:
        shapes = [(64, 4, 4), (2, 9, 9)] if target.interpreted else [(64, 4, 4), (8, 9, 9)]
    elif target.interpreted:
        shapes = [(3, 1, 1), (64, 3, 3), (64, 4, 4), (4, 6, 5), (2, 9, 9), (1, 5, 20)]
    else:
        shapes = [(3, 1, 1), (64, 3, 3), (256, 4, 4), (16, 6, 5), (8, 9, 9), (4, 5, 20), (2, 64, 64)]
    scales = [NewtonCase(shape, x, std, _STEPS) for shape in shapes for x in DTYPES for std in (0.1, 1.0, 4.0)]
    return scales + [NewtonCase(shape, x, 2.0, _STEPS, option) for shape in shapes[:2] for option in _OPTIONS for x in DTYPES]


def verify_newton_case(case: NewtonCase, target: Target) -> list[Record]:
    """Hold plan, residual and the gradient in the logits against the oracle; a call that raises is a miss."""
    try:
        return _compare(case, target)
    except Exception as error:
        return [failed(case, target, error)]


def _compare(case: NewtonCase, target: Target) -> list[Record]:
    logits, options, cotangent = inputs(case)
    wide = dict(cast(torch.float64, logits, options)[1])
    if {"row_marginal", "col_marginal"} <= wide.keys():  # totals agree to the narrower dtype only
        wide["col_marginal"] *= (wide["row_marginal"].sum(-1) / wide["col_marginal"].sum(-1)).unsqueeze(-1)
    leaf = logits.double().requires_grad_()
    truth = reference.sinkhorn(leaf, solver="newton", **wide)
    assert isinstance(truth, Tensor)
    (slope,) = torch.autograd.grad(truth, leaf, cotangent.double())
    truth = truth.detach()

    leaf = logits.to(target.device).requires_grad_()
    operands: dict[str, Any] = {k: x.to(target.device) if isinstance(x, Tensor) else x for k, x in options.items()}
    found = sinkhorn(leaf, solver="newton", return_info=True, backend=target.backend, **operands)
    plan, info = found
    assert isinstance(plan, Tensor)
    assert isinstance(info, SinkhornInfo)
    (gradient,) = torch.autograd.grad(plan, leaf, cotangent.to(target.device))

    inside = compute_dtype(case.dtype)
    of_plan, of_slope = budgets(case, logits, wide, truth)
    of_slope = of_slope * gradient_size(slope, cotangent)
    if case.dtype != inside:
        of_plan, of_slope = (x + half_ulp(y.abs() + x, case.dtype) for x, y in ((of_plan, truth), (of_slope, slope)))
    residual = info.residual.detach().cpu().double()
    return [
        worst(target, "newton", "plan", case, (plan.detach().cpu().double() - truth).abs(), of_plan),
        worst(target, "newton", "residual", case, residual, torch.full_like(residual, default_tol(inside))),
        worst(target, "newton", "gradient of logits", case, (gradient.cpu().double() - slope).abs(), of_slope),
    ]


def budgets(case: NewtonCase, logits: Tensor, wide: Mapping[str, Any], truth: Tensor) -> tuple[Tensor, Tensor]:
    """What the module's docstring allows the entries of a plan, before its rounding, and of a gradient of size 1.

    wide: the options in float64; truth: the plan.
    """
    inside = compute_dtype(case.dtype)
    lines = {k: x for k, x in wide.items() if k in ("row_marginal", "col_marginal")}
    gap = (1 - reference.sigma2(truth, **lines).square()).clamp(min=1e-9)[..., None, None]
    tau = wide.get("temperature", torch.ones(case.shape[0], dtype=torch.float64))[..., None, None]
    largest = (logits.double() / tau).abs().amax((-2, -1), keepdim=True)
    moved = (default_tol(inside) + 2 * torch.finfo(inside).eps * largest) / gap
    of_plan = 2 * moved * truth.sum(-1, keepdim=True).amax(-2, keepdim=True)
    return of_plan.expand_as(truth), (moved / gap).expand_as(truth)
