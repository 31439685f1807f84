"""Sinkhorn projection: ``fastdsm.sinkhorn`` and ``fastdsm.sinkhorn_sigma2``."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import arguments, reference, transforms
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
    S = logits / temperature, so that rows are exact at the end; ``first="row"`` is the mirror. The gradient is exact for
    the sweeps done, and takes O(n_iters (n + m)) memory per matrix.

    Args:
        logits: (..., n, m), float16, bfloat16, float32 or float64; any batch shape, strides, n >= 1 and m >= 1. The
            arithmetic is float32 (float64 for float64). -inf entries take no part. NaN or +inf make their matrix NaN.
        n_iters: sweeps, >= 0. 0 is one normalisation of the side that is exact at the end (a row softmax for "col").
        temperature: > 0, a float or a tensor broadcastable to the batch shape (...,), then differentiable.
        first: "col" or "row", the side normalised first in a sweep.
        tol: None, or a relative residual >= 0 at which each matrix stops by itself, after at most n_iters sweeps.
        f0: potential before the first sweep of the side not updated first, (..., n) for "col", (..., m) for "row";
            default 0; differentiable; ignored at n_iters = 0.
        row_marginal: (..., n), >= 0, default 1 per row that takes part; differentiable. A zero excludes its row.
        col_marginal: (..., m), likewise; default uniform with the rows' total. Totals must agree to 1e-4.
        mask: bool, broadcastable to (..., n, m), True where an entry takes part. What lies under it is never used. A row
            or column without any entry left is zero in value and gradient.
        solver: "sinkhorn", the truncated iteration.
        grad: None or "unrolled", the exact gradient of the truncated iteration.
        return_info: also return a :class:`SinkhornInfo`.
        backend: "auto" (Triton kernels for CUDA tensors, else the PyTorch path), "triton", "torch" or "reference".

    Returns:
        The plan, like logits; with ``return_info`` also residual, converged, sweeps, f and g (not differentiable).

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    Sources: Sinkhorn and Knopp (1967); log domain: Peyre and Cuturi, Computational Optimal Transport, section 4.4; as a
    layer of transformers: Sinkformers (arXiv 2110.11773), mHC (arXiv 2512.24880).
    """
    _check_method(solver, grad)
    problem = _Checked(logits, n_iters, temperature, first, tol, f0, row_marginal, col_marginal, mask, backend)
    if problem.backend == "reference":
        return reference.sinkhorn(logits, return_info=return_info, **problem.keywords)
    if tol is None and not return_info:
        return problem.restore(transforms.sinkhorn(*problem.inputs))
    plan, residual, sweeps, f, g, _ = transforms.sinkhorn_info(*problem.inputs, False)
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
    _check_method(solver, grad)
    problem = _Checked(logits, n_iters, temperature, first, tol, f0, row_marginal, col_marginal, mask, backend)
    if problem.backend == "reference":
        return reference.sinkhorn_sigma2(logits, **problem.keywords)
    plan, residual, sweeps, f, g, sigma2 = map(problem.restore, transforms.sinkhorn_info(*problem.inputs, True))
    return SinkhornSpectrum(plan, sigma2, residual, sweeps, f, g)


def _check_method(solver: str, grad: str | None) -> None:
    arguments.check_choice(solver, "solver", ("sinkhorn",))
    if grad is not None:
        arguments.check_choice(grad, "grad", ("unrolled",))


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

    def restore(self, x: Tensor) -> Tensor:
        """Give a result its batch shape back."""
        return x if len(self.batch) == 1 else x.reshape((*self.batch, *x.shape[1:]))
