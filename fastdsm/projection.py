"""Sinkhorn projection: ``fastdsm.sinkhorn`` and ``fastdsm.sinkhorn_sigma2``."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import reference
from ._ops import arguments, transforms
from .results import SinkhornInfo, SinkhornSpectrum, default_tol


def sinkhorn(
    logits: Tensor,
    *,
    n_iters: int = 20,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    f0: Tensor | None = None,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    solver: str = "sinkhorn",
    grad: str | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """Project logits onto the doubly-stochastic matrices: P = exp(logits / temperature + f + g).

    One sweep with ``first="col"`` is ``g_j <- log c_j - LSE_i(S_ij + f_i)``, then ``f_i <- log r_i - LSE_j(S_ij + g_j)``,
    S = logits / temperature, so that rows are exact at the end; ``first="row"`` is the mirror. ``solver="sinkhorn"`` makes
    ``n_iters`` of them, which leaves plans with sigma2 near 1 far from convergence: a sweep takes the error times sigma2^2.
    ``solver="newton"`` goes on from the first sweep by Newton's method on the dual until the residual is ``tol``, whatever
    sigma2; the same side is exact at the end.

    Args:
        logits: (..., n, m), float16, bfloat16, float32 or float64; any batch shape, strides, n >= 1 and m >= 1. The
            arithmetic is float32 (float64 for float64). -inf entries take no part. NaN or +inf make their matrix NaN.
        n_iters: sweeps, >= 0. 0 is one normalisation of the side that is exact at the end (a row softmax for "col"). With
            "newton" a cap on the steps, of which the first is a sweep or, unless it is the last, several: 20 serve logits
            up to a standard deviation of 16, 60 up to 100.
        temperature: > 0, a float or a tensor broadcastable to the batch shape (...,), then differentiable.
        first: "col" or "row", the side normalised first in a sweep.
        tol: None, or a relative residual >= 0 at which each matrix stops by itself, after at most n_iters sweeps. None with
            "newton" is 1e-6, 1e-12 for float64.
        f0: potential before the first sweep of the side not updated first, (..., n) for "col", (..., m) for "row";
            default 0; differentiable; ignored at n_iters = 0. With "newton" a warm start.
        row_marginal: (..., n), >= 0, default 1 per row that takes part; differentiable. A zero excludes its row.
        col_marginal: (..., m), likewise; default uniform with the rows' total. Totals must agree to 1e-4.
        mask: bool, broadcastable to (..., n, m), True where an entry takes part. What lies under it is never used. A row
            or column without any entry left is zero in value and gradient.
        solver: "sinkhorn", the truncated iteration, or "newton", converged to ``tol``. A matrix that n_iters steps do not
            bring there, as one without support (no positive diagonal), is finite, with its residual and converged = False.
        grad: "unrolled" (default of "sinkhorn", not for "newton"), the exact gradient of the sweeps done, in
            O(n_iters (n + m)) memory per matrix; or "implicit" (default of "newton"), that of the fixed point in logits,
            temperature and marginals, 0 for f0. The implicit gradient is right only when converged: a residual rho leaves
            an error of up to rho / (1 - sigma2^2)^2, and rounding is amplified by 1 / (1 - sigma2^2), the condition number.
        return_info: also return a :class:`SinkhornInfo`.
        backend: "auto" (Triton kernels for CUDA tensors, else the PyTorch path), "triton", "torch" or "reference".

    Returns:
        The plan, like logits; with ``return_info`` also residual, converged, sweeps, f and g (not differentiable).

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    Sources: Sinkhorn and Knopp (1967); log domain: Peyre and Cuturi, Computational Optimal Transport, section 4.4; as a
    layer of transformers: Sinkformers (arXiv 2110.11773), mHC (arXiv 2512.24880). Newton's method on this dual: Brauer,
    Clason, Lorenz and Wirth (arXiv 1710.06635); its safeguard is derived in ``fastdsm.pytorch.newton``, the implicit gradient
    and its condition number in ``fastdsm.pytorch.implicit``.
    """
    grad = _resolve_method(solver, grad)
    problem = _Checked(
        logits, n_iters, temperature, first, _tol_of(solver, tol, logits), f0, row_marginal, col_marginal, mask, backend
    )
    if problem.backend == "reference":
        return reference.sinkhorn(logits, solver=solver, grad=grad, return_info=return_info, **problem.keywords)
    if grad == "unrolled" and tol is None and not return_info:
        return problem.restore(transforms.sinkhorn(*problem.inputs))
    plan, residual, sweeps, f, g, _ = problem.projected(solver, grad, return_info, False)
    if not return_info:
        return problem.restore(plan)
    residual, sweeps, f, g = map(problem.restore, (residual, sweeps, f, g))
    converged = residual <= (default_tol(residual.dtype) if tol is None else tol)
    return problem.restore(plan), SinkhornInfo(residual, converged, sweeps, f, g)


def sinkhorn_sigma2(
    logits: Tensor,
    *,
    n_iters: int = 20,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    f0: Tensor | None = None,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    solver: str = "sinkhorn",
    grad: str | None = None,
    backend: str = "auto",
) -> SinkhornSpectrum:
    """Project and measure: the plan of :func:`sinkhorn` and its sigma2, from one launch on matrices that fit the chip.

    Arguments and errors as for :func:`sinkhorn`; sigma2 (...,) as :func:`fastdsm.sigma2` defines it for the lines that
    take part. Plan and sigma2 are differentiable, in logits, temperature, f0 and marginals; the gradient of sigma2 with
    respect to the plan is u2 v2^T (at multiplicity: one element of the subdifferential).
    """
    grad = _resolve_method(solver, grad)
    problem = _Checked(
        logits, n_iters, temperature, first, _tol_of(solver, tol, logits), f0, row_marginal, col_marginal, mask, backend
    )
    if problem.backend == "reference":
        return reference.sinkhorn_sigma2(logits, solver=solver, grad=grad, **problem.keywords)
    plan, residual, sweeps, f, g, sigma2 = map(problem.restore, problem.projected(solver, grad, True, True))
    return SinkhornSpectrum(plan, sigma2, residual, sweeps, f, g)


def _resolve_method(solver: str, grad: str | None) -> str:
    """The gradient to take: as named, else the solver's own."""
    arguments.check_choice(solver, "solver", ("sinkhorn", "newton"))
    if grad is None:
        return "unrolled" if solver == "sinkhorn" else "implicit"
    arguments.check_choice(grad, "grad", ("unrolled", "implicit"))
    if (solver, grad) == ("newton", "unrolled"):
        raise ValueError(
            'grad="unrolled" is the gradient of sweeps, and solver="newton" makes none; '
            'use grad="implicit" (the default of "newton"), or solver="sinkhorn"'
        )
    return grad


def _tol_of(solver: str, tol: float | None, logits: Tensor) -> float | None:
    """As given; Newton's method always has one."""
    if solver != "newton" or tol is not None or not isinstance(logits, Tensor):
        return tol
    return default_tol(logits.dtype)


class _Checked:
    """A call's arguments, checked, broadcast over the batch and flattened to (B, n, m)."""

    def __init__(
        self,
        logits: Tensor,
        n_iters: int,
        temperature: float | Tensor,
        first: str,
        tol: float | None,
        f0: Tensor | None,
        row_marginal: Tensor | None,
        col_marginal: Tensor | None,
        mask: Tensor | None,
        backend: str,
    ) -> None:
        arguments.check_matrices(logits, "logits")
        arguments.check_count(n_iters, "n_iters")
        arguments.check_choice(first, "first", ("col", "row"))
        arguments.check_tol(tol)
        self.backend = arguments.resolve_backend(backend, logits)
        n, m = logits.shape[-2:]
        scale = arguments.temperature_of(temperature, logits)
        start = arguments.line_vector(f0, "f0", logits, n if first == "col" else m, "row" if first == "col" else "column")
        row = arguments.line_vector(row_marginal, "row_marginal", logits, n, "row")
        col = arguments.line_vector(col_marginal, "col_marginal", logits, m, "column")
        arguments.check_marginals(row, col)
        mask = arguments.mask_of(mask, logits)
        self.batch = logits.shape[:-2]
        count = math.prod(self.batch)

        def flat(x: Any) -> Any:
            if not isinstance(x, Tensor) or len(self.batch) == 1:
                return x
            return x.reshape((count, *x.shape[len(self.batch) :]))

        tau = scale if isinstance(scale, Tensor) else None
        tensors = (logits, tau, start, row, col, mask)
        self.keywords: dict[str, Any] = {
            "n_iters": n_iters, "temperature": scale, "first": first, "tol": tol, "f0": start,
            "row_marginal": row, "col_marginal": col, "mask": mask,
        }  # fmt: skip
        self.inputs = (
            *map(flat, tensors),
            1.0 if isinstance(scale, Tensor) else scale,
            n_iters,
            first == "col",
            -1.0 if tol is None else float(tol),
            self.backend,
        )

    def projected(self, solver: str, grad: str, with_info: bool, with_sigma2: bool) -> tuple[Tensor, ...]:
        """Plan, residual, sweeps, f, g and sigma2, flat; what was not asked for may be empty."""
        if grad == "unrolled":
            return transforms.sinkhorn_info(*self.inputs, with_sigma2)
        with_info = with_info or transforms.backward_may_follow(self.inputs)
        return transforms.fixed_point(*self.inputs, solver, with_info, with_sigma2)

    def restore(self, x: Tensor) -> Tensor:
        """Give a result its batch shape back."""
        return x if len(self.batch) == 1 else x.reshape((*self.batch, *x.shape[1:]))
