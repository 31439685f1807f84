"""Public calls that ``fastdsm verify`` leaves out, held against the float64 oracle under its policy."""

from __future__ import annotations

import torch

from fastdsm import reference, sinkhorn, sinkhorn_sigma2, temperature_for_sigma2
from fastdsm._ops.problem import compute_dtype
from fastdsm._verify.newton import NewtonCase, budgets
from fastdsm._verify.sinkhorn import FLOOR, SIGMA2_TOL, Case, Record, Target, cast, compare, half_ulp, inputs, worst

SIGMA2_TARGET = 0.3
REACHED_TOL = 1e-4  # how near to its target temperature_for_sigma2 promises sigma2


def plan_alone(case: Case, target: Target) -> list[Record]:
    """A plan of sweeps without a gradient, without info."""
    logits, options, _ = inputs(case)
    found = sinkhorn(logits, backend=target.backend, **options)
    truth, plain = (
        reference.sinkhorn(*cast(x, logits)[:1], **cast(x, logits, options)[1]) for x in (torch.float64, torch.float32)
    )
    assert isinstance(found, torch.Tensor)
    assert isinstance(truth, torch.Tensor)
    assert isinstance(plain, torch.Tensor)
    return [compare("forward", "plan alone", found, truth, plain, target=target, case=case)]


def converged_alone(case: NewtonCase, target: Target) -> list[Record]:
    """A converged plan without a gradient, without info; and with its sigma2.

    By Weyl sigma2 moves no further than the Frobenius norm of what the plan's budget does to the matrix it is of, beside the
    tolerance of its iteration.
    """
    logits, options, _ = inputs(case)
    wide = dict(cast(torch.float64, logits, options)[1])
    truth = reference.sinkhorn(logits.double(), solver="newton", **wide)
    assert isinstance(truth, torch.Tensor)
    allowed, _ = budgets(case, logits, wide, truth)
    of_sigma2 = (allowed / truth.sum(-2, keepdim=True).sqrt()).flatten(1).norm(dim=1) + FLOOR[torch.float32]
    sigma2 = reference.sigma2(truth)
    if max(case.shape[1:]) > 4:
        of_sigma2 = of_sigma2 + SIGMA2_TOL * sigma2
    if case.dtype != compute_dtype(case.dtype):
        allowed = allowed + half_ulp(truth.abs() + allowed, case.dtype)
    plan = sinkhorn(logits, solver="newton", backend=target.backend, **options)
    found = sinkhorn_sigma2(logits, solver="newton", backend=target.backend, **options)
    assert isinstance(plan, torch.Tensor)
    return [
        worst(target, "newton", "plan alone", case, (plan.double() - truth).abs(), allowed),
        worst(target, "newton", "plan beside sigma2", case, (found.plan.double() - truth).abs(), allowed),
        worst(target, "newton", "sigma2", case, (found.sigma2.double() - sigma2).abs(), of_sigma2),
    ]


def temperature(case: Case, target: Target) -> list[Record]:
    """sigma2 of the converged plan at the temperature that is found for it, in float64; a target not reached is NaN."""
    logits, _, _ = inputs(case)
    found, _ = temperature_for_sigma2(logits, SIGMA2_TARGET, backend=target.backend)
    plan = reference.sinkhorn(logits.double(), temperature=found.double().nan_to_num(1.0), solver="newton", n_iters=100)
    assert isinstance(plan, torch.Tensor)
    error = (reference.sigma2(plan) - SIGMA2_TARGET).abs().where(found.isfinite(), torch.nan)
    return [worst(target, "temperature", "sigma2 at the temperature", case, error, torch.full_like(error, REACHED_TOL))]
