"""The assertion of the one error policy, which ``fastdsm._verify.sinkhorn`` states."""

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
