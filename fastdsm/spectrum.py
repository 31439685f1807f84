"""The second singular value of plans: ``fastdsm.sigma2`` and ``fastdsm.sigma2_bounds``."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import reference
from ._ops import arguments, sharded, transforms
from ._ops.plain import KeptCalls
from ._ops.problem import compute_dtype
from ._ops.runs import Bounds, Run, Sigma2
from .pytorch.spectrum import JACOBI_MAX_SIDE, METHODS


class _Options(TypedDict, total=False):
    """What the overloads share."""

    method: str
    tol: float
    max_iters: int | None
    v0: Tensor | None
    mask: Tensor | None
    row_marginal: float | Tensor | None
    col_marginal: float | Tensor | None
    backend: str


@overload
def sigma2(plan: Tensor, *, return_vectors: Literal[False] = ..., **options: Unpack[_Options]) -> Tensor: ...
@overload
def sigma2(plan: Tensor, *, return_vectors: Literal[True], **options: Unpack[_Options]) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def sigma2(plan: Tensor, *, return_vectors: bool, **options: Unpack[_Options]) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...
@sharded.by_shards("plan", v0=1, row_marginal=1, col_marginal=1, mask=2)
def sigma2(
    plan: Tensor,
    *,
    method: str = "auto",
    tol: float = 1e-4,
    max_iters: int | None = None,
    v0: Tensor | None = None,
    mask: Tensor | None = None,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    return_vectors: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Second singular value of a plan relative to its first: the norm of M, P with the trivial pair projected out.

    M = (I - q q^T) diag(r)^-1/2 P diag(c)^-1/2 (I - p p^T), q = sqrt(r / total), p = sqrt(c / total); for a square uniform
    plan M = (I - J) P (I - J). At convergence sigma2 lies in [0, 1] and its square is the rate of a Sinkhorn sweep. What
    passes through L such matrices loses detail at least by their product ("The Homogeneity Trap", arXiv 2601.02080).

    Args:
        plan: (..., n, m), non-negative, float16, bfloat16, float32 or float64, any strides.
        method: "auto" suits the size; "jacobi" (min(n, m) <= 8), "squaring" (fixed work, indifferent to gaps), "lanczos",
            "power" (cheap with ``v0`` from the step before, as in spectral normalisation).
        tol: relative accuracy aimed at, > 0. Where the plan requires grad it is squared: vectors err like its root.
        max_iters: steps at most (squarings, Lanczos or power steps, Jacobi sweeps); None: the method's own default.
        v0: (..., m), start of "power", which alone takes it.
        mask: bool, broadcastable to (..., n, m): lines without an entry take no part.
        row_marginal, col_marginal: (..., n) and (..., m), or a number, the marginals the plan was made for; default uniform.
        return_vectors: also return u2 (..., n) and v2 (..., m), unit vectors orthogonal to q and p, or zeros where sigma2 is 0
            (not differentiable). Of a float64 plan uniform but for its rounding, where sigma2 is no more than that, any.
        backend: as for :func:`fastdsm.sinkhorn`; a named method always runs on the PyTorch path.

    Returns:
        (...,) float32 (float64 for float64): ||M v2||, the Rayleigh lower bound. Its gradient is u2 v2^T, scaled by the
        marginals; at multiplicity one element of the subdifferential. It is that of the plan as given: of one rounded to 16
        bits u2 and v2 err by the rounding over the gap between sigma2 and sigma3, 5 % and more; :func:`fastdsm.sinkhorn_sigma2`
        takes them from the plan before it is rounded. Forward mode and second derivatives take a full SVD; where sigma2
        meets another singular value, as in the uniform plan, there is no second derivative, and it is NaN or huge.
    """
    if row_marginal is not None or col_marginal is not None:
        row_marginal, col_marginal = arguments.marginals_of(row_marginal, col_marginal, plan)
    tensors = (plan, row_marginal, col_marginal, mask, v0)
    return _values(tensors, (method, tol, max_iters, return_vectors, backend))


@sharded.by_shards("plan", row_marginal=1, col_marginal=1, mask=2)
def sigma2_bounds(
    plan: Tensor,
    *,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Certified interval of :func:`sigma2`: lower <= sigma2 <= upper, each (...,); no gradient, no tangent.

    upper is ||(M^T M)^(2^k)||_F^(1 / 2^(k+1)), within the factor rank^(1 / 2^(k+2)) of sigma2 whatever the gaps; lower is
    the Rayleigh quotient of that power's largest column. Beyond 32 lines on a CPU: lower is ||M v|| of Lanczos' v, upper 1.0001
    times that, if a Cholesky factor of upper^2 I - M^T M exists (Rump, BIT 46, 2006). All allow for rounding.
    upper / lower <= 1.001 for n, m <= 64 and sigma2 >= 1e-10.
    Arguments and errors as for :func:`sigma2`.
    """
    if row_marginal is not None or col_marginal is not None:
        row_marginal, col_marginal = arguments.marginals_of(row_marginal, col_marginal, plan)
    return _intervals((plan, row_marginal, col_marginal, mask), (backend,))


class _OfPlans:
    """A call for plans whose arguments have the right forms: (B, n, m), (B, n) and (B, m) in it, and batches of its results."""

    def __init__(self, tensors: tuple[Any, ...], backend: str) -> None:
        plan, row, col, mask, *start = tensors
        arguments.check_matrices(plan, "plan", 0)
        self.backend = arguments.resolve_backend(backend, plan)
        n, m = plan.shape[-2:]
        self.tolerance = arguments.tolerance_of_totals(row, col)
        self.batch, self.empty = plan.shape[:-2], 0 in plan.shape[-2:]
        formed = (
            plan,
            arguments.line_vector(row, "row_marginal", plan, n, "row"),
            arguments.line_vector(col, "col_marginal", plan, m, "column"),
            arguments.mask_of(mask, plan),
            *(arguments.line_vector(x, "v0", plan, m, "column") for x in start),
        )
        self.flatten = arguments.flattening(tensors, formed, len(self.batch))

    def flat(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tensors as an operator takes them, their values looked at."""
        if self.flatten is not None:
            tensors = self.flatten(tensors)
        plan, row, col, mask, *start = tensors
        return plan, row, arguments.equalised(row, col, mask, self.tolerance), mask, *start

    def nothing(self, plan: Tensor, *lines: int) -> Tensor:
        """The zeros (..., *lines) of plans without rows or columns."""
        return plan.new_zeros((*self.batch, *lines), dtype=compute_dtype(plan.dtype))


class _Value(_OfPlans):
    def __init__(
        self,
        tensors: tuple[Any, ...],
        method: str,
        tol: float,
        max_iters: int | None,
        return_vectors: bool,
        backend: str,
    ) -> None:
        plan, *_, v0 = tensors
        arguments.check_matrices(plan, "plan", 0)
        arguments.check_choice(method, "method", ("auto", *METHODS))
        if not tol > 0:
            raise ValueError(f"tol must be > 0, a relative accuracy such as 1e-4, got {tol}")
        if max_iters is not None:
            max_iters = arguments.count_of(max_iters, "max_iters", 1)
        if method == "jacobi" and min(plan.shape[-2:]) > JACOBI_MAX_SIDE:
            raise ValueError(
                f'method="jacobi" serves min(n, m) <= {JACOBI_MAX_SIDE}, got {tuple(plan.shape)}; use "squaring" or "auto"'
            )
        if v0 is not None and method != "power":
            raise ValueError(f'v0 is the start of method="power" alone, got method={method!r}; leave one of them out')
        super().__init__(tensors, backend)
        if self.backend == "reference" and return_vectors:
            raise ValueError('backend="reference" gives no vectors; use return_vectors=False or another backend')
        self.method, self.tol, self.max_iters, self.vectors = method, tol, max_iters or 0, return_vectors
        self.run: Run | None = None

    def __call__(self, tensors: tuple[Any, ...], plain: bool) -> Any:
        if self.empty:
            n, m = tensors[0].shape[-2:]
            value, u, v = self.nothing(tensors[0]), self.nothing(tensors[0], n), self.nothing(tensors[0], m)
            return (value, u, v) if self.vectors else value
        plan, row, col, mask = (tensors := self.flat(tensors))[:4]
        if self.backend == "reference":
            return reference.sigma2(plan, row_marginal=row, col_marginal=col, mask=mask).reshape(self.batch)
        tol = self.tol
        if plan.requires_grad and torch.is_grad_enabled():
            tol = tol * tol
        if plain and not transforms.backward_may_follow(tensors):
            self.run = self.run or Sigma2(plan, self.method, tol, self.max_iters, self.backend)
            found: Any = self.run(tensors)
        else:
            found = transforms.sigma2(*tensors, self.method, tol, self.max_iters, self.backend)
        results = arguments.unflattened(found, self.batch)
        return tuple(results) if self.vectors else results[0]


class _Interval(_OfPlans):
    def __init__(self, tensors: tuple[Any, ...], backend: str) -> None:
        super().__init__(tensors, backend)
        self.run: Run | None = None

    def __call__(self, tensors: tuple[Any, ...], plain: bool) -> Any:
        if self.empty:
            return self.nothing(tensors[0]), self.nothing(tensors[0])
        flat: Any = tuple([x if x is None else x.detach() for x in self.flat(tensors)])
        plan, row, col, mask = flat
        if self.backend == "reference":
            lower = upper = reference.sigma2(plan.double(), row_marginal=row, col_marginal=col, mask=mask)
            return tuple(arguments.unflattened((lower, upper), self.batch))
        if plain:
            self.run = self.run or Bounds(plan, self.backend)
            found: Any = self.run(flat)
            return tuple(arguments.unflattened(found, self.batch))
        return tuple(arguments.unflattened(torch.ops.fastdsm.sigma2_bounds(*flat, self.backend), self.batch))


_values, _intervals = KeptCalls(_Value), KeptCalls(_Interval)
