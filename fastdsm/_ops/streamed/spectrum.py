"""sigma2 of an attention's plan by Lanczos, from products with vectors that a backend provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..krylov import lanczos_of, noise
from ..problem import Attention, Potentials
from .sweeps import Passes, State, Sweeps, attention_forward, centred, final_potentials, valid_lines, weighed

# Rounding of float32 in a sum of squares of a plan, and in a Ritz value, relative to the sum: ten times what was seen.
_SLACK = 64


@dataclass(frozen=True)
class Accuracy:
    """Relative ``tol``, at most ``max_steps`` Lanczos steps, and whether an upper bound is wanted."""

    tol: float
    max_steps: int
    bounds: bool


@dataclass(frozen=True)
class Spectrum:
    """value (B, H), u (B, H, N), v (B, H, M), so that value = u^T P v; upper (B, H), infinite where it was not asked for."""

    value: Tensor
    u: Tensor
    v: Tensor
    upper: Tensor


def attention_sigma2(passes: Passes, problem: Attention, sweeps: Sweeps, accuracy: Accuracy, found: Spectrum) -> None:
    """Fill ``found`` by two passes a step, after the sweeps."""
    f, g = (x.new_empty((*x.shape[:2], 1, x.shape[2]), dtype=torch.float64) for x in (found.u, found.v))
    state = State(f, g, torch.empty_like(found.value), torch.empty_like(found.value, dtype=torch.int32))
    attention_forward(passes, problem, None, sweeps, None, None, state, residual=False)
    at = final_potentials(passes, problem, sweeps, state)
    queries, keys = (x.expand(y.shape) for x, y in zip(valid_lines(problem), (found.u, found.v), strict=True))

    def product(x: Tensor) -> Tensor:
        return weighed(passes, problem, "cols", at, x)

    def adjoint(x: Tensor) -> Tensor:
        return weighed(passes, problem, "rows", at, x)

    def squares() -> Tensor:
        """P_ij^2 is the plan of twice the logits and twice the potentials."""
        half = replace(problem, temperature=problem.temperature / 2)
        doubled = Potentials(2 * at.f_base, 2 * at.g_base, 2 * at.f_fine, 2 * at.g_fine, at.columns_first)
        return weighed(passes, half, "cols", doubled, torch.ones_like(found.v)).sum(-1)

    spectrum(product, adjoint, squares, queries, keys, accuracy, found)


def spectrum(
    product: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    squares: Callable[[], Tensor],
    queries: Tensor,
    keys: Tensor,
    accuracy: Accuracy,
    found: Spectrum,
) -> None:
    """Fill ``found`` for M = (I - q q^T) P diag(c)^-1/2 (I - p p^T), q and p constant on the lines that take part.

    product: P x (B, H, N) of x (B, H, M); adjoint: P^T x; squares: the sum of all P_ij^2 (B, H). queries (B, H, N) and keys
    (B, H, M): bool, lines that take part.
    """
    shape, dtype = queries.shape[:2], found.value.dtype
    n, m = (x.sum(-1, keepdim=True).clamp(min=1).to(dtype) for x in (queries, keys))
    root = (n / m).sqrt()  # of a key line's mass

    def forward(x: Tensor) -> Tensor:
        x = centred(x.unflatten(0, shape), keys)
        return centred(product(x / root), queries).flatten(0, 1)

    def backward(x: Tensor) -> Tensor:
        x = centred(x.unflatten(0, shape), queries)
        return centred(adjoint(x) / root, keys).flatten(0, 1)

    start = centred(noise(keys.shape[-1], found.v).expand(keys.shape), keys).flatten(0, 1)
    krylov = lanczos_of(forward, backward, start, accuracy.tol, accuracy.max_steps)
    found.value.copy_(krylov.value.unflatten(0, shape))
    found.u.copy_(krylov.u.unflatten(0, shape))
    found.v.copy_(krylov.v.unflatten(0, shape) / root)
    if not accuracy.bounds:
        found.upper.fill_(torch.inf)
        return
    # ||M||_F^2 from ||P diag(c)^-1/2||_F^2, less what the projections take: q q^T N, N p p^T, and back what both take.
    ones = [x.to(dtype) for x in (queries, keys)]
    left = torch.where(keys, adjoint(ones[0]) / root, 0.0).square().sum(-1) / n.squeeze(-1)
    image = torch.where(queries, product(ones[1] / root), 0.0)
    right, both = image.square().sum(-1) / m.squeeze(-1), image.sum(-1).square() / (n * m).squeeze(-1)
    total = squares() / root.squeeze(-1).square()
    rounding = _SLACK * torch.finfo(dtype).eps * total
    rest = (total - left - right + both - krylov.trace.unflatten(0, shape)).clamp(min=0.0) + rounding
    upper = krylov.border(rest.flatten()).unflatten(0, shape)
    found.upper.copy_((upper + rounding).clamp(min=0.0).sqrt())
