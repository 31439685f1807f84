"""The assertion of the one error policy, which ``fastdsm._verify.sinkhorn`` states, and what some quantities may err beyond."""

from __future__ import annotations

from torch import Tensor

from fastdsm._verify.sinkhorn import budget, gradient_size


def assert_within(found: Tensor, truth: Tensor, plain: Tensor, *, cotangent: Tensor | None = None) -> None:
    """``found`` errs against the float64 ``truth`` by no more than the policy allows, given the plain float32 run.

    ``cotangent``: of a gradient, whose size it sets.
    """
    size = 1.0 if cotangent is None else gradient_size(truth, cotangent)
    error = (found.detach().double() - truth).abs()
    allowed = budget(truth, plain, found.dtype, size=size)
    assert found.shape == truth.shape
    worst = (error - allowed).flatten().argmax() if error.numel() else 0
    assert bool((error <= allowed).all()), f"error {error.flatten()[worst]:.3e} over the budget {allowed.flatten()[worst]:.3e}"


def drift(n_iters: int) -> float:
    """What potentials may be off by beyond the policy after sweeps that take the machine's own reciprocal.

    It errs by up to a unit, 2^-23 of its value (PTX ISA, ``rcp.approx.ftz.f32``), and always so for the same argument. A sweep
    takes two in a row, for v = c / s and for u = r / (K v), and close to the fixed point every sweep takes the same two: each
    multiplies u, and divides v, by up to 1 + 2^-22 once more. f + a, g - a of a = n_iters 2^-22, which the plan does not see.
    """
    return n_iters * 2.0**-22
