"""sigma2 of given plans in plain PyTorch: Jacobi, repeated squaring, Lanczos and power iteration on the deflated matrix.

Each method takes M (B, n, m), from which sqrt(r) and sqrt(c) are projected out, and returns (value, u, v): unit vectors and
value = ||M v||, the Rayleigh lower bound. M is formed in float64, so that a plan next to uniform keeps a relative error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._ops.krylov import lanczos_of, noise, stop, times, unit
from .._ops.marginals import marginals, valid_entries
from .._ops.problem import compute_dtype
from ..reference import deflated_plan

JACOBI_MAX_SIDE = 8
_SMALL = 4  # where all of float32's digits are cheap by squaring, and float64's by Jacobi, exact at any gap
_SMALL_TOL = 1e-7
_SQUARING_MAX_SIDE = 32  # beyond, a few products with vectors cost less than a product of matrices
_MARGIN = 1e-4  # of an upper bound that a Cholesky factor proves
_CHUNK_ENTRIES = 1 << 20
DEFAULT_TOL = 1e-4
_DEFAULT_ITERATIONS = {"jacobi": 16, "squaring": 24, "lanczos": 128, "power": 1000}
Triple = tuple[Tensor, Tensor, Tensor]


def jacobi(M: Tensor, tol: float, max_iters: int) -> Triple:
    """One-sided (Hestenes) Jacobi: rotate pairs of columns until they are orthogonal; batch innermost."""
    if M.shape[1] < M.shape[2]:
        return _swapped(jacobi(M.mT, tol, max_iters))
    columns = list(M.permute(2, 1, 0).contiguous().unbind(0))
    size = len(columns)
    basis = list(torch.eye(size, dtype=M.dtype, device=M.device)[:, :, None].expand(-1, -1, M.shape[0]).unbind(0))
    for _ in range(max_iters):
        worst = torch.zeros((), dtype=M.dtype, device=M.device)
        for i in range(size - 1):
            for j in range(i + 1, size):
                a, b = columns[i], columns[j]
                aa, bb, ab = (a * a).sum(0), (b * b).sum(0), (a * b).sum(0)
                zeta = (bb - aa) / torch.where(ab == 0, 1.0, 2 * ab)
                t = torch.where(zeta < 0, -1.0, 1.0) / (zeta.abs() + (1 + zeta * zeta).sqrt())
                t = torch.where(ab == 0, 0.0, t)
                cos = (1 + t * t).rsqrt()
                sin = cos * t
                columns[i], columns[j] = cos * a - sin * b, sin * a + cos * b
                basis[i], basis[j] = cos * basis[i] - sin * basis[j], sin * basis[i] + cos * basis[j]
                cosine = ab.abs() / (aa * bb).sqrt().clamp(min=torch.finfo(M.dtype).tiny)
                worst = torch.maximum(worst, cosine.nan_to_num(nan=0.0).amax())
        if stop(worst <= torch.finfo(M.dtype).eps * size):
            break
    norms = torch.stack([column.norm(dim=0) for column in columns])
    best = norms.argmax(0).view(1, 1, -1)
    chosen = (torch.stack(x).take_along_dim(best, 0)[0].T for x in (columns, basis))
    left, right = chosen
    return norms.amax(0), unit(left), unit(right * (left.norm(dim=-1, keepdim=True) > 0))


def squaring(M: Tensor, tol: float, max_iters: int) -> Triple:
    """The largest column of (M^T M)^(2^k), k until the power has rank one to ``tol`` or its bound says so."""
    if M.shape[1] < M.shape[2]:
        return _swapped(squaring(M.mT, tol, max_iters))
    power, _ = _squared(M, tol, max_iters)
    return _rayleigh(M, power)


def _squared(M: Tensor, tol: float, max_iters: int) -> tuple[Tensor, Tensor]:
    """G^(2^k) scaled to trace 1, and log ||G^(2^k)||_F^(1 / 2^(k+1)), G = M^T M: an upper bound of log ||M||.

    ||G^p||_F^(1 / 2p) exceeds ||M|| by at most the factor d^(1 / 4p), d the rank; the largest column's Rayleigh quotient
    falls short of ||M|| by at most n^(1 / 4p).
    """
    power = M.mT @ M
    log_scale = torch.zeros(M.shape[0], dtype=M.dtype, device=M.device)
    rank, exponent = max(M.shape[2], 2), 2.0  # power = G^(exponent / 2), up to its scale
    one = 1.0 - max(tol * tol, 4 * torch.finfo(M.dtype).eps)  # rank one, as far as rounding tells
    while True:
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        power = power / torch.where(trace == 0, 1.0, trace)[:, None, None]
        log_scale = log_scale + torch.where(trace == 0, -torch.inf, trace.log()) / exponent
        square = power.square().sum((-2, -1))
        enough = math.log(rank) / (2 * exponent) <= tol
        if enough or exponent >= 2.0**max_iters or stop(((square > one) | ~(square > 0)).all()):
            return power, log_scale + square.log() / (2 * exponent)
        power = power @ power
        exponent *= 2


def _rayleigh(M: Tensor, power: Tensor) -> Triple:
    """value, u, v of the largest column of a power of M^T M."""
    best = power.square().sum(-2).argmax(-1)
    v = unit(power.take_along_dim(best.view(-1, 1, 1), -1).squeeze(-1))
    image = times(M, v)
    return image.norm(dim=-1), unit(image), v


def lanczos(M: Tensor, tol: float, max_iters: int) -> Triple:
    """:func:`lanczos_of` a stored matrix, from a fixed start."""
    found = lanczos_of(partial(times, M), partial(times, M.mT), times(M.mT, times(M, _start(M))), tol, max_iters)
    return found.value, found.u, found.v


def power(M: Tensor, tol: float, max_iters: int, v0: Tensor | None = None) -> Triple:
    """Power iteration on M^T M from ``v0``, until a step changes the value by less than ``tol``."""
    v, value = unit(_start(M) if v0 is None else v0.to(M.dtype)), None
    for _ in range(max_iters):
        image = times(M, v)
        before, value = value, image.norm(dim=-1)
        v = unit(times(M.mT, image))
        if before is not None and stop(((value - before).abs() <= tol * value).nan_to_num(nan=1.0).all()):
            break
    image = times(M, v)
    return image.norm(dim=-1), unit(image), v


def largest_singular_value(M: Tensor) -> Tensor:
    """||M|| by the method that suits the size."""
    return _found(M, "auto", DEFAULT_TOL, 0, None)[0]


def _found(M: Tensor, method: str, tol: float, max_iters: int, v0: Tensor | None) -> Triple:
    if method == "auto":
        method = _suited(M)
        if min(M.shape[1:]) <= _SMALL:
            tol = min(tol, _SMALL_TOL)
    max_iters = max_iters or _DEFAULT_ITERATIONS[method]
    return power(M, tol, max_iters, v0) if method == "power" else _METHODS[method](M, tol, max_iters)


def sigma2(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    v0: Tensor | None,
    method: str,
    tol: float,
    max_iters: int,
    value: Tensor,
    u: Tensor,
    v: Tensor,
) -> None:
    """Fill ``value`` (B,), ``u`` (B, n), ``v`` (B, m); ``max_iters`` 0 is each method's own default."""
    for part in _parts(plan):
        M = _deflated(plan, row_marginal, col_marginal, mask, part).to(compute_dtype(plan.dtype))
        found = _found(M, method, tol, max_iters, None if v0 is None else v0[part])
        for target, x in zip((value, u, v), found, strict=True):
            target[part] = x


def sigma2_bounds(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    lower: Tensor,
    upper: Tensor,
) -> None:
    """Fill ``lower`` and ``upper`` (B,) in float64, widened by the rounding of both arithmetics.

    Forming G errs by at most size * eps relative to ||M||_F^2 <= rank * ||M||^2, and each squaring likewise at half the
    weight of the one before, or a Cholesky factor by rank (size + 1) eps: together less than 2 rank * size * eps of sigma2.
    Forming M errs relative to what it is formed of, N = diag(r)^-1/2 P diag(c)^-1/2, which next to uniform is far larger. With
    u = eps / 2, an entry of N errs by 6 u of itself at most, the n or m entries that a mean or a product with a unit vector
    adds up by n u or m u of ||N||_F in all, these vectors and the subtractions by less than 8 u: together (n + m + 14) u, which
    is below (size + 8) eps, of ||N||_F; twice that is allowed for, as everything else here.
    """
    size, eps = max(plan.shape[1:]), torch.finfo(torch.float64).eps
    slack = 4 * size * size * eps + torch.finfo(lower.dtype).eps
    for part in _parts(plan):
        M = _deflated(plan, row_marginal, col_marginal, mask, part)
        formed = 2 * (size + 8) * eps * _norm(plan, row_marginal, col_marginal, mask, part)
        M = M.mT if M.shape[1] < M.shape[2] else M
        by = _factored_bounds if M.device.type == "cpu" and M.shape[2] > _SQUARING_MAX_SIDE else _squared_bounds
        least, most = by(M)
        lower[part], upper[part] = (least * (1 - slack) - formed).clamp(min=0.0), most * (1 + slack) + formed


def _squared_bounds(M: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of ||M|| but for rounding, from a power of G."""
    matrix, log_upper = _squared(M, DEFAULT_TOL, 24)
    return _rayleigh(M, matrix)[0], log_upper.exp()


def _factored_bounds(M: Tensor) -> tuple[Tensor, Tensor]:
    """The same: the value ||M v|| of Lanczos' v, and a little more if that squared, less G, has a Cholesky factor.

    Only of positive definite matrices does one come to its end, but for rounding (Rump, BIT 46, 2006). Where it does not, the
    value was not the largest: by squaring.
    """
    v = unit(lanczos(M.float(), _MARGIN / 10, _DEFAULT_ITERATIONS["lanczos"])[2].double())
    lower = times(M, v).norm(dim=-1)
    upper = lower * (1 + _MARGIN)
    rest = -(M.mT @ M)
    rest.diagonal(dim1=-2, dim2=-1).add_(upper.square().unsqueeze(-1))
    left = torch.linalg.cholesky_ex(rest)[1] != 0
    if bool(left.any()):
        lower[left], upper[left] = _squared_bounds(M[left])
    return lower, upper


def deflated_uniform(plan: Tensor, mass: float) -> Tensor:
    """M in float64 of plans (B, n, m) whose lines all take part, with constant marginals, r c = ``mass``."""
    M = plan.double() * mass**-0.5
    M -= M.mean(-2, keepdim=True)
    return M.sub_(M.mean(-1, keepdim=True))


def _deflated(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None, part: slice) -> Tensor:
    if row is None and col is None and mask is None:
        return deflated_uniform(plan[part], plan.shape[1] / plan.shape[2])
    return deflated_plan(plan[part].double(), *_cut(row, col, mask, part))


def _norm(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None, part: slice) -> Tensor:
    """||N||_F (B,), of what M is formed of."""
    P = plan[part].double()
    if row is None and col is None and mask is None:
        return P.flatten(1).norm(dim=1) * (plan.shape[1] / plan.shape[2]) ** -0.5
    row, col, mask = _cut(row, col, mask, part)
    valid = valid_entries(mask, P, row, col)
    r, c = marginals(valid, row, col, P.dtype)
    squares = P.square() / (r.unsqueeze(-1) * c.unsqueeze(-2))
    return squares.masked_fill(~valid, 0.0).sum((-2, -1)).sqrt()


def _cut(row: Tensor | None, col: Tensor | None, mask: Tensor | None, part: slice) -> tuple[Tensor | None, ...]:
    """Those of some matrices, marginals in float64."""
    return *(None if x is None else x[part].double() for x in (row, col)), None if mask is None else mask[part]


def _parts(plan: Tensor) -> list[slice]:
    batch, n, m = plan.shape
    size = max(_CHUNK_ENTRIES // (n * m), 1) if plan.device.type == "cpu" else max(batch, 1)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _suited(matrices: Tensor) -> str:
    if matrices.device.type != "cpu":
        return "squaring"  # fixed work: the others look at values, which would stall the host
    if matrices.dtype == torch.float64 and min(matrices.shape[-2:]) <= _SMALL:
        return "jacobi"
    return "squaring" if max(matrices.shape[-2:]) <= _SQUARING_MAX_SIDE else "lanczos"


def _start(M: Tensor) -> Tensor:
    return noise(M.shape[2], M).expand(M.shape[0], -1)


def _swapped(triple: Triple) -> Triple:
    value, u, v = triple
    return value, v, u


_METHODS: dict[str, Callable[[Tensor, float, int], Triple]] = {
    "jacobi": jacobi,
    "squaring": squaring,
    "lanczos": lanczos,
}
METHODS = (*_METHODS, "power")
