"""fastdsm against the usual PyTorch loop: outputs checked under the error policy, then timed in pairs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .. import reference
from .._verify.sinkhorn import budget, gradient_size
from ..projection import sinkhorn

PAIRS = 7


@dataclass(frozen=True)
class Times:
    """Median seconds of one call, and of one call with its backward."""

    usual_forward: float
    fast_forward: float
    usual_both: float
    fast_both: float


@dataclass(frozen=True)
class Agreement:
    """Largest error of a layer's heads against float64, and the largest that the error policy allows."""

    plan_error: float
    plan_budget: float
    gradient_error: float
    gradient_budget: float


def usual_loop(logits: Tensor, n_iters: int) -> Tensor:
    """Log-domain Sinkhorn as it is usually written; square matrices, columns first."""
    f = torch.zeros_like(logits[..., :1])
    g = torch.zeros_like(logits[..., :1, :])
    for _ in range(n_iters):
        g = -torch.logsumexp(logits + f, dim=-2, keepdim=True)
        f = -torch.logsumexp(logits + g, dim=-1, keepdim=True)
    return torch.exp(logits + f + g)


def fast_call(logits: Tensor, n_iters: int) -> Tensor:
    """The same projection by fastdsm."""
    plan = sinkhorn(logits, n_iters=n_iters)
    return plan


def check(logits: Tensor, n_iters: int) -> Agreement:
    """Hold fastdsm's plan and gradient to the error policy, the usual loop being the plain PyTorch of that policy.

    Raises:
        RuntimeError: an entry exceeds its budget.
    """
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    plan, gradient = _both(fast_call, logits, n_iters, cotangent)
    usual_plan, usual_gradient = _both(usual_loop, logits, n_iters, cotangent)
    true_plan, true_gradient = _both(_oracle, logits.double(), n_iters, cotangent.double())
    size = gradient_size(true_gradient, cotangent)
    allowed = budget(true_plan, usual_plan, plan.dtype).max().item()
    allowed_gradient = budget(true_gradient, usual_gradient, gradient.dtype, size=size).max().item()
    found = Agreement(
        (plan - true_plan).abs().max().item(), allowed, (gradient - true_gradient).abs().max().item(), allowed_gradient
    )
    if not (found.plan_error <= allowed and found.gradient_error <= allowed_gradient):
        raise RuntimeError(
            f"expected errors against float64 within {allowed:.1e} (plan) and {allowed_gradient:.1e} (gradient), got "
            f"{found.plan_error:.1e} and {found.gradient_error:.1e}; run `fastdsm verify` and report its output"
        )
    return found


def time_pair(logits: Tensor, n_iters: int, limit: float) -> Times:
    """Median times of the usual loop and of fastdsm, in alternation, about ``limit`` seconds a figure at most."""
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    forward = _paired(lambda: usual_loop(logits, n_iters), lambda: fast_call(logits, n_iters), limit)
    both = _paired(
        lambda: _both(usual_loop, logits, n_iters, cotangent),
        lambda: _both(fast_call, logits, n_iters, cotangent),
        limit,
    )
    return Times(*forward, *both)


def _oracle(logits: Tensor, n_iters: int) -> Tensor:
    plan = reference.sinkhorn(logits, n_iters=n_iters)
    assert isinstance(plan, Tensor)
    return plan


def _both(call: Callable[[Tensor, int], Tensor], logits: Tensor, n_iters: int, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Plan, and the gradient of sum(plan * cotangent)."""
    leaf = logits.detach().requires_grad_()
    plan = call(leaf, n_iters)
    (gradient,) = torch.autograd.grad(plan, leaf, cotangent)
    return plan.detach(), gradient


def _paired(usual: Callable[[], object], fast: Callable[[], object], limit: float) -> tuple[float, float]:
    """Median seconds of each: a warm-up, then ``PAIRS`` runs of both in turn, the order swapped every time.

    A busy machine ends the pairs at ``limit`` seconds, after one at the least.
    """
    seconds: dict[Callable[[], object], list[float]] = {usual: [], fast: []}
    end = time.perf_counter() + limit
    for pair in range(PAIRS + 1):
        if pair > 1 and time.perf_counter() > end:
            break
        for run in (usual, fast) if pair % 2 else (fast, usual):
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if pair:
                seconds[run].append(elapsed)
    return median(seconds[usual]), median(seconds[fast])
