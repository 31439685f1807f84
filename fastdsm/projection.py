"""Sinkhorn projection: ``fastdsm.sinkhorn`` and ``fastdsm.sinkhorn_sigma2``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import reference
from ._ops import arguments, sharded, taped, transforms
from ._ops.plain import KeptCalls
from ._ops.problem import compute_dtype
from ._ops.runs import Forward, Run
from .half_steps import count_of as counted
from .half_steps import project as half_stepped
from .results import SinkhornInfo, SinkhornSpectrum, default_tol


class _Options(TypedDict, total=False):
    """What the overloads share."""

    temperature: float | Tensor
    n_iters: int | None
    first: str
    tol: float | None
    f0: Tensor | None
    row_marginal: float | Tensor | None
    col_marginal: float | Tensor | None
    mask: Tensor | None
    solver: str
    grad: str | None
    half_steps: int | None
    backend: str


@overload
def sinkhorn(logits: Tensor, *, return_info: Literal[False] = ..., **options: Unpack[_Options]) -> Tensor: ...
@overload
def sinkhorn(logits: Tensor, *, return_info: Literal[True], **options: Unpack[_Options]) -> tuple[Tensor, SinkhornInfo]: ...
@overload
def sinkhorn(logits: Tensor, *, return_info: bool, **options: Unpack[_Options]) -> Tensor | tuple[Tensor, SinkhornInfo]: ...
@sharded.by_shards("logits", rows=True, temperature=0, f0=1, row_marginal=1, col_marginal=1, mask=2)
def sinkhorn(
    logits: Tensor,
    *,
    n_iters: int | None = None,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    f0: Tensor | None = None,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    mask: Tensor | None = None,
    solver: str = "sinkhorn",
    grad: str | None = None,
    half_steps: int | None = None,
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
        logits: (..., n, m), float16, bfloat16, float32 or float64; any batch shape, strides, n and m, from 0 on. The
            arithmetic is float32 (float64 for float64). -inf entries take no part. NaN or +inf make their matrix NaN.
        n_iters: sweeps, >= 0, default 20. 0 is one normalisation of the side that is exact at the end (a row softmax for
            "col"). With "newton" a cap on the steps, of which the first is a sweep or, unless it is the last, several: 20
            serve logits up to a standard deviation of 16, 60 up to 100, and of any size on the PyTorch path and on kernels of 9
            to 64 lines, which warm cold problems by themselves.
        temperature: > 0, a float or a tensor broadcastable to the batch shape (...,), then differentiable. torch.compile serves
            all floats by one graph; a tensor that is made of one inside a compiled function is a constant to it.
        first: "col" or "row", the side normalised first in a sweep.
        tol: None, or a relative residual >= 0 at which each matrix stops by itself, after at most n_iters sweeps. None with
            "newton" is 1e-6, 1e-12 for float64.
        f0: potential before the first sweep of the side not updated first, (..., n) for "col", (..., m) for "row";
            default 0; differentiable; ignored at n_iters = 0. With "newton" a warm start. In units of logits / temperature:
            that of another temperature is to be multiplied by their ratio.
        row_marginal: (..., n), >= 0, or a number for every row; default 1 per row that takes part; differentiable. A zero
            excludes its row.
        col_marginal: (..., m), likewise; default uniform with the rows' total. Given with ``row_marginal`` it is scaled to
            that one's total, of the lines that a mask leaves. Totals further apart than 1e-4, or than four units of rounding
            of the dtypes they come in, are an error on a CPU and NaN on a GPU.
        mask: bool, broadcastable to (..., n, m), True where an entry takes part. What lies under it is never used. A row
            or column without any entry left is zero in value and gradient.
        solver: "sinkhorn", the truncated iteration, or "newton", converged to ``tol``. A matrix that n_iters steps do not
            bring there, as one without support (no positive diagonal), is finite, with its residual and converged = False.
        grad: "unrolled" (default of "sinkhorn", not for "newton"), the exact gradient of the sweeps done, in
            O(n_iters (n + m)) memory per matrix, and at most 10 MiB in all for a small batch on a CPU; or "implicit" (default
            of "newton"), that of the fixed point in logits, temperature and marginals, 0 for f0. The implicit gradient is
            right only when converged: a residual rho leaves an error of up to rho / (1 - sigma2^2)^2, and rounding is
            amplified by 1 / (1 - sigma2^2), the condition number. Second derivatives, and forward mode, at a plan that has
            not converged are those of the projection to the marginals that it has: finite, each matrix by itself.
        half_steps: None, or instead of n_iters so many normalisations, >= 1, of one side after the other from ``first`` on. An
            odd number ends with the side that began, which is then the exact one; residual is that of the other, sweeps
            counts the last one too, and ``tol`` looks after every second step from the third on. Not with Newton's method or
            the implicit gradient.
        return_info: also return a :class:`SinkhornInfo`.
        backend: "auto" (Triton kernels for CUDA tensors, else the PyTorch path), "triton", "torch" or "reference".

    Returns:
        The plan, like logits; with ``return_info`` also residual, converged and sweeps, and f and g, which are differentiable.
        Derivatives of reverse and forward mode (torch.func, torch.autograd.forward_ad) may be nested. Where an input carries a
        tangent the call is made of torch's own operations, in float64: far slower, and a reverse pass through it keeps a matrix
        for each half sweep. Residual, converged and sweeps have no tangent.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    Sources: Sinkhorn and Knopp (1967); log domain: Peyre and Cuturi, Computational Optimal Transport, section 4.4; as a
    layer of transformers: Sinkformers (arXiv 2110.11773), mHC (arXiv 2512.24880). Newton's method on this dual: Brauer,
    Clason, Lorenz and Wirth (arXiv 1710.06635); its safeguard is derived in ``fastdsm.pytorch.newton``, the implicit gradient
    and its condition number in ``fastdsm.pytorch.implicit``.
    """
    if row_marginal is not None or col_marginal is not None:
        row_marginal, col_marginal = arguments.marginals_of(row_marginal, col_marginal, logits)
    if half_steps is not None:
        return half_stepped(
            sinkhorn, sinkhorn, logits, counted(half_steps, n_iters, solver, grad), first=first, f0=f0, temperature=temperature,
            tol=tol, row_marginal=row_marginal, col_marginal=col_marginal, mask=mask, return_info=return_info, backend=backend,
        )  # fmt: skip
    tensors = (logits, temperature, f0, row_marginal, col_marginal, mask)
    return _calls(tensors, (20 if n_iters is None else n_iters, first, tol, solver, grad, return_info, backend, False))


@sharded.by_shards("logits", temperature=0, f0=1, row_marginal=1, col_marginal=1, mask=2)
def sinkhorn_sigma2(
    logits: Tensor,
    *,
    n_iters: int | None = None,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    f0: Tensor | None = None,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    mask: Tensor | None = None,
    solver: str = "sinkhorn",
    grad: str | None = None,
    half_steps: int | None = None,
    backend: str = "auto",
) -> SinkhornSpectrum:
    """Project and measure: the plan of :func:`sinkhorn` and its sigma2, from one launch on matrices that fit the chip.

    Arguments and errors as for :func:`sinkhorn`; sigma2 (...,) as :func:`fastdsm.sigma2` defines it for the lines that
    take part, of the plan before it is rounded to 16 bits. Plan and sigma2 are differentiable, in logits, temperature, f0 and
    marginals; the gradient of sigma2 with respect to the plan is u2 v2^T (at multiplicity: one element of the
    subdifferential), of the unrounded plan too: where a gradient is to come, logits of 16 bits are copied to float32.
    """
    if row_marginal is not None or col_marginal is not None:
        row_marginal, col_marginal = arguments.marginals_of(row_marginal, col_marginal, logits)
    if half_steps is not None:
        return half_stepped(
            sinkhorn_sigma2, sinkhorn, logits, counted(half_steps, n_iters, solver, grad), first=first, f0=f0, tol=tol,
            temperature=temperature, row_marginal=row_marginal, col_marginal=col_marginal, mask=mask, backend=backend,
        )  # fmt: skip
    tensors = (logits, temperature, f0, row_marginal, col_marginal, mask)
    return _calls(tensors, (20 if n_iters is None else n_iters, first, tol, solver, grad, True, backend, True))


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


class _Call:
    """A call whose arguments have the right forms: how they come to an operator, (B, n, m) and (B, n), and its results back."""

    def __init__(
        self,
        tensors: tuple[Any, ...],
        n_iters: int,
        first: str,
        tol: float | None,
        solver: str,
        grad: str | None,
        with_info: bool,
        backend: str,
        with_sigma2: bool,
    ) -> None:
        logits, temperature, _, row, col, _ = tensors
        self.grad = _resolve_method(solver, grad)
        arguments.check_matrices(logits, "logits", 0)
        n_iters = arguments.count_of(n_iters, "n_iters")
        arguments.check_choice(first, "first", ("col", "row"))
        arguments.check_tol(tol)
        if solver == "newton" and tol is None:
            tol = default_tol(logits.dtype)
        self.backend = arguments.resolve_backend(backend, logits)
        self.batch = logits.shape[:-2]
        self.flatten = arguments.flattening(tensors, arguments.of_projection(tensors, first), len(self.batch))
        self.n_iters, self.first, self.tol, self.solver, self.with_sigma2 = n_iters, first, tol, solver, with_sigma2
        self.with_info = with_info
        # A singular vector of a rounded plan errs by the rounding over the gap of its singular value: 5 % and more.
        self.rounded = logits.dtype if with_sigma2 and logits.dtype != compute_dtype(logits.dtype) else None
        self.looked_at = any(isinstance(x, Tensor) for x in (temperature, row, col))
        self.tolerance = arguments.tolerance_of_totals(row, col)
        self.ends = (first == "col", -1.0 if tol is None else float(tol), self.backend)
        self.call: transforms.Call = transforms.sinkhorn
        if self.grad == "implicit":
            self.call = transforms.fixed_point
        elif tol is not None or with_info:
            self.call = transforms.sinkhorn_info
        self.run: Run | None = None  # without a gradient
        self.trained: Callable[..., Any] | None = None  # with one

    def __call__(self, tensors: tuple[Any, ...], plain: bool) -> Any:
        """The results for ``tensors`` of the form that was looked at; ``plain``: they and the thread are."""
        scale = tensors[1]
        if type(scale) is float and 0.0 < scale < math.inf:
            tensors = (tensors[0], None, *tensors[2:])
        elif isinstance(scale, Tensor):
            scale = 1.0
        else:
            arguments.check_temperature(scale)
            scale, tensors = float(scale), (tensors[0], None, *tensors[2:])
        if self.flatten is not None:
            tensors = self.flatten(tensors)
        if self.looked_at:
            arguments.check_temperatures(tensors[1])
            if tensors[3] is not None or tensors[4] is not None:
                row, col, mask = tensors[3:]
                col = arguments.equalised(row, col, mask, self.tolerance)
                tensors = (*tensors[:4], col, tensors[5])
        if not plain and tensors[1] is None and arguments.is_symbol(scale):
            scale, tensors = 1.0, (tensors[0], arguments.filled(scale, tensors[0].shape[:1], tensors[0]), *tensors[2:])
        follows = transforms.backward_may_follow(tensors)
        if follows and self.rounded is not None:
            tensors = (tensors[0].float(), *tensors[1:])
        if plain and not follows:
            if self.run is None:
                self.run = Forward(tensors[0], self.n_iters, *self.ends, self.solver, self.with_info, self.with_sigma2)
            found: Any = self.run(tensors, scale)
            return self._restored(found)
        alone = self.call is transforms.sinkhorn  # the plan
        inputs = (*tensors, scale, self.n_iters, *self.ends)
        if self.grad == "implicit":
            inputs += (self.solver, self.with_info or follows, self.with_sigma2)
        elif not alone:
            inputs += (self.with_sigma2,)
        if not plain:
            results = self.call(*inputs)
        else:
            if self.trained is None:
                run = Forward(tensors[0], self.n_iters, *self.ends, self.solver, not alone, self.with_sigma2)
                self.trained = partial(taped.sinkhorn if alone and self.backend == "torch" else self.call.trained, run)
            results = self.trained(*inputs)
        return self._restored((results,) if alone else results)

    def of_nothing(self, tensors: tuple[Any, ...], plain: bool) -> Any:
        """Plans without rows or columns: converged without a sweep, and sigma2 is 0."""
        logits = tensors[0]
        n, m = logits.shape[-2:]
        new = partial(logits.new_zeros, dtype=compute_dtype(logits.dtype))
        plan, residual, sweeps = logits.clone(), new(self.batch), logits.new_zeros(self.batch, dtype=torch.int32)
        f, g = new((*self.batch, n)), new((*self.batch, m))
        if self.with_sigma2:
            return SinkhornSpectrum(plan, new(self.batch), residual, sweeps, f, g)
        return (plan, SinkhornInfo(residual, residual == 0, sweeps, f, g)) if self.with_info else plan

    def _restored(self, results: Sequence[Tensor]) -> Any:
        """What the caller gets, in the logits' batch shape; what nobody asked for an operator leaves empty."""
        if not self.with_info:
            plan = results[0]
            return plan if len(self.batch) == 1 else plan.reshape(*self.batch, *plan.shape[1:])
        if self.with_sigma2:
            plan, residual, sweeps, f, g, sigma2 = arguments.unflattened(results, self.batch)
            if self.rounded is not None:
                plan = plan.to(self.rounded)
            return SinkhornSpectrum(plan, sigma2, residual, sweeps, f, g)
        plan, residual, sweeps, f, g = arguments.unflattened(results[:5], self.batch)
        converged = residual <= (default_tol(residual.dtype) if self.tol is None else self.tol)
        return plan, SinkhornInfo(residual, converged, sweeps, f, g)

    def by_oracle(self, tensors: tuple[Any, ...], plain: bool) -> Any:
        """The same from the oracle."""
        logits, temperature, f0, row, col, mask = arguments.of_projection(tensors, self.first)
        col = arguments.equalised(row, col, mask, self.tolerance)
        keywords: dict[str, Any] = {
            "n_iters": self.n_iters, "temperature": temperature, "first": self.first, "tol": self.tol, "f0": f0,
            "row_marginal": row, "col_marginal": col, "mask": mask, "solver": self.solver, "grad": self.grad,
        }  # fmt: skip
        if self.with_sigma2:
            return reference.sinkhorn_sigma2(logits, **keywords)
        return reference.sinkhorn(logits, return_info=self.with_info, **keywords)


def looked(tensors: tuple[Any, ...], *options: Any) -> Callable[[tuple[Any, ...], bool], Any]:
    """What serves (logits, temperature, f0, marginals, mask) of this form, by these options."""
    call = _Call(tensors, *options)
    if 0 in tensors[0].shape[-2:]:
        return call.of_nothing
    return call.by_oracle if call.backend == "reference" else call


_calls = KeptCalls(looked)
