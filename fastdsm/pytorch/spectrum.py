"""sigma2 of given plans in plain PyTorch: Jacobi, repeated squaring, Lanczos and power iteration on the deflated matrix.

Each method takes M (B, n, m), from which sqrt(r) and sqrt(c) are projected out, and returns (value, u, v): unit vectors and
value = ||M v||, the Rayleigh lower bound. M is formed in float64, so that a plan next to uniform keeps a relative error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .._ops.problem import compute_dtype
from ..reference import deflated_plan

JACOBI_MAX_SIDE = 8
_SMALL = 4  # where all of float32's digits are cheap by squaring, and float64's by Jacobi, exact at any gap
_SMALL_TOL = 1e-7
_SQUARING_MAX_SIDE = 32  # beyond, a few products with vectors cost less than a product of matrices
_MARGIN = 1e-4  # of an upper bound that a Cholesky factor proves
_CHUNK_ENTRIES = 1 << 20
_DOUBLINGS = 36
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
        if _stop(worst <= torch.finfo(M.dtype).eps * size):
            break
    norms = torch.stack([column.norm(dim=0) for column in columns])
    best = norms.argmax(0).view(1, 1, -1)
    chosen = (torch.stack(x).take_along_dim(best, 0)[0].T for x in (columns, basis))
    left, right = chosen
    return norms.amax(0), _unit(left), _unit(right * (left.norm(dim=-1, keepdim=True) > 0))


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
        if enough or exponent >= 2.0**max_iters or _stop(((square > one) | ~(square > 0)).all()):
            return power, log_scale + square.log() / (2 * exponent)
        power = power @ power
        exponent *= 2


def _rayleigh(M: Tensor, power: Tensor) -> Triple:
    """value, u, v of the largest column of a power of M^T M."""
    best = power.square().sum(-2).argmax(-1)
    v = _unit(power.take_along_dim(best.view(-1, 1, 1), -1).squeeze(-1))
    image = _times(M, v)
    return image.norm(dim=-1), _unit(image), v


def lanczos(M: Tensor, tol: float, max_iters: int) -> Triple:
    """:func:`lanczos_of` a stored matrix, from a fixed start."""
    found = lanczos_of(partial(_times, M), partial(_times, M.mT), _times(M.mT, _times(M, _start(M))), tol, max_iters)
    return found.value, found.u, found.v


@dataclass(frozen=True)
class Krylov:
    """value = ||M v||, v and u = M v / ||M v|| unit vectors, and M^T M compressed to a Krylov space, tridiagonal.

    ``border(rest)``: the largest eigenvalue of the compression bordered with ``rest`` >= 0, the trace it leaves out: in a
    basis that goes on from the Krylov space's, M^T M is that compression, one entry that couples it to the next vector, and
    a positive semi-definite block of trace ``rest``, whose norm is no more. So this is an upper bound of ||M||^2.
    """

    value: Tensor
    u: Tensor
    v: Tensor
    diagonal: list[Tensor]
    off: list[Tensor]

    @property
    def trace(self) -> Tensor:
        """Trace of the compression."""
        return torch.stack(self.diagonal).sum(0)

    def border(self, rest: Tensor) -> Tensor:
        """Upper bound of ||M||^2, given the trace that the compression leaves out."""
        T = _tridiagonal([*self.diagonal, rest], self.off).nan_to_num()
        return _top_on_device(T)[1] if T.is_cuda else torch.linalg.eigvalsh(T)[..., -1]


def lanczos_of(
    product: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], start: Tensor, tol: float, max_iters: int
) -> Krylov:
    """Lanczos on M^T M with full reorthogonalisation, until a residual of 2 tol ||M||^2; M is known by its products.

    An eigenvalue lies within a residual of the Ritz value; estimates from gaps stop too early on a dense spectrum. product:
    (B, m) to (B, n), adjoint: the reverse; start: (B, m), in the space that M leaves alone if it has a null space.
    """
    enough = max(2 * tol, 16 * torch.finfo(start.dtype).eps)
    steps = min(max_iters, start.shape[1])
    v = _unit(start)
    basis, diagonal, off = [v], [], []
    for step in range(steps):
        w = adjoint(product(v))
        diagonal.append((w * v).sum(-1))
        stacked = torch.stack(basis, 1)
        for _ in range(2):
            w = w - _times(stacked.mT, _times(stacked, w))
        off.append(w.norm(dim=-1))
        last = step == steps - 1
        if last or (step % 4 == 3 and not w.is_cuda):
            ritz, weights, residual = _top_of_tridiagonal(diagonal, off)
            if last or _stop(((residual <= enough * ritz) | (ritz <= 0)).all()):
                break
        # Where the space is exhausted what is left of w is rounding: the next vector is 0, and so are those after it.
        spent = off[-1] <= 8 * torch.finfo(start.dtype).eps * torch.stack(diagonal).amax(0)
        off[-1] = off[-1].masked_fill(spent, 0.0)
        v = (w / off[-1].masked_fill(spent, 1.0)[:, None]).masked_fill(spent[:, None], 0.0)
        basis.append(v)
    v = _unit(_times(torch.stack(basis, 1).mT, weights))
    image = product(v)
    return Krylov(image.norm(dim=-1), _unit(image), v, diagonal, off)


def krylov_vector(product: Callable[[Tensor], Tensor], start: Tensor, tol: float, max_passes: int) -> Tensor:
    """v (B, m), the unit vector of a block Krylov space where ||M v|| is largest, to a residual of 2 tol ||M||^2.

    product: (B, k, m) to the same, M^T M times k vectors at once; start: (B, k, m), as for :func:`lanczos_of`. k vectors see
    an eigenvalue of multiplicity k, and take fewer passes where a pass costs as much as with one.
    """
    eps = torch.finfo(start.dtype).eps
    enough = max(2 * tol, 16 * eps)
    block = _orthonormal(start, 0.0)
    basis, images = block[:, :0], block[:, :0]
    passes = max(min(max_passes, start.shape[2] // start.shape[1]), 1)
    for step in range(passes):
        image = product(block)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        last = step == passes - 1
        if last or (step % 4 == 3 and not image.is_cuda):
            H = basis @ images.mT
            weights, _ = _top_on_device(((H + H.mT) / 2).nan_to_num())
            v, moved = (_times(x.mT, weights) for x in (basis, images))
            ritz = (v * moved).sum(-1)
            residual = (moved - ritz.unsqueeze(-1) * v).norm(dim=-1)
            if last or _stop(~((residual > enough * ritz) & (ritz > 0)).any()):
                break
        rest = image - (image @ basis.mT) @ basis
        block = _orthonormal(rest, 8 * eps * images.norm(dim=-1).amax(-1, keepdim=True))
        # What was rounding in part is not orthogonal to the basis at length 1; what loses half of it was rounding.
        block = _orthonormal(block - (block @ basis.mT) @ basis, 0.5)
    return _unit(v)


def _orthonormal(vectors: Tensor, least: Tensor | float) -> Tensor:
    """Vectors (B, k, m), each made orthogonal to those before it, of length 1, or 0 where no more than ``least`` is left."""
    found: list[Tensor] = []
    for vector in vectors.unbind(1):
        for _ in range(2):
            for other in found:
                vector = vector - other * (other * vector).sum(-1, keepdim=True)
        length = vector.norm(dim=-1, keepdim=True)
        spent = length <= least
        found.append((vector / length.masked_fill(spent, 1.0)).masked_fill(spent, 0.0))
    return torch.stack(found, 1)


def _tridiagonal(diagonal: list[Tensor], off: list[Tensor]) -> Tensor:
    """The symmetric matrix with this diagonal and these entries beside it."""
    T = torch.diag_embed(torch.stack(diagonal, -1))
    if len(diagonal) > 1:
        between = torch.stack(off[: len(diagonal) - 1], -1)
        T = T + torch.diag_embed(between, 1) + torch.diag_embed(between, -1)
    return T


def _top_of_tridiagonal(diagonal: list[Tensor], off: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Largest eigenvalue, its vector, and its residual in the whole space."""
    T = _tridiagonal(diagonal, off).nan_to_num()
    if T.is_cuda:
        vector, _ = _top_on_device(T)
        value = (vector * _times(T, vector)).sum(-1)
    else:
        values, vectors = torch.linalg.eigh(T)
        value, vector = values[:, -1], vectors[..., -1]
    return value, vector, (off[-1] * vector[:, -1].abs()).nan_to_num()


def _top_on_device(T: Tensor) -> tuple[Tensor, Tensor]:
    """A unit vector on top of the spectrum of T (B, k, k), and an upper bound of the largest eigenvalue.

    T is symmetric, its largest eigenvalue the largest in size. torch.linalg.eigh would have the host wait. Of T^N,
    N = 2^_DOUBLINGS, the Frobenius norm's N-th root is at least that eigenvalue and at most k^(1/2N) as much, and the largest
    column lies in its eigenspace, but for those within a share of 1 / N of it. In float64; zeros give zeros.
    """
    power = T.double()
    log_size = torch.zeros_like(power[:, 0, 0])
    for _ in range(_DOUBLINGS):
        size = torch.linalg.matrix_norm(power)
        log_size = 2 * (log_size + size.log())
        power = power / size.masked_fill(size == 0, 1.0)[:, None, None]
        power = power @ power
    size = torch.linalg.matrix_norm(power)
    bound = ((log_size + size.log()) * 2.0**-_DOUBLINGS).exp()
    best = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    return _unit(power.take_along_dim(best.view(-1, 1, 1), -1).squeeze(-1)).to(T.dtype), bound.to(T.dtype)


def power(M: Tensor, tol: float, max_iters: int, v0: Tensor | None = None) -> Triple:
    """Power iteration on M^T M from ``v0``, until a step changes the value by less than ``tol``."""
    v, value = _unit(_start(M) if v0 is None else v0.to(M.dtype)), None
    for _ in range(max_iters):
        image = _times(M, v)
        before, value = value, image.norm(dim=-1)
        v = _unit(_times(M.mT, image))
        if before is not None and _stop(((value - before).abs() <= tol * value).nan_to_num(nan=1.0).all()):
            break
    image = _times(M, v)
    return image.norm(dim=-1), _unit(image), v


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
    """
    size = max(plan.shape[1:])
    slack = 4 * size * size * torch.finfo(torch.float64).eps + torch.finfo(lower.dtype).eps
    for part in _parts(plan):
        M = _deflated(plan, row_marginal, col_marginal, mask, part)
        M = M.mT if M.shape[1] < M.shape[2] else M
        by = _factored_bounds if M.device.type == "cpu" and M.shape[2] > _SQUARING_MAX_SIDE else _squared_bounds
        least, most = by(M)
        lower[part], upper[part] = least * (1 - slack), most * (1 + slack)


def _squared_bounds(M: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of ||M|| but for rounding, from a power of G."""
    matrix, log_upper = _squared(M, DEFAULT_TOL, 24)
    return _rayleigh(M, matrix)[0], log_upper.exp()


def _factored_bounds(M: Tensor) -> tuple[Tensor, Tensor]:
    """The same: the value ||M v|| of Lanczos' v, and a little more if that squared, less G, has a Cholesky factor.

    Only of positive definite matrices does one come to its end, but for rounding (Rump, BIT 46, 2006). Where it does not, the
    value was not the largest: by squaring.
    """
    v = _unit(lanczos(M.float(), _MARGIN / 10, _DEFAULT_ITERATIONS["lanczos"])[2].double())
    lower = _times(M, v).norm(dim=-1)
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
    cut = (None if x is None else x[part] for x in (row, col, mask))
    row, col, mask = cut
    row, col = (None if x is None else x.double() for x in (row, col))
    return deflated_plan(plan[part].double(), row, col, mask)


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


def _stop(done: Tensor) -> bool:
    """Whether to stop early; on an accelerator never, since looking would stall the host."""
    return done.device.type == "cpu" and bool(done)


def _start(M: Tensor) -> Tensor:
    return noise(M.shape[2], M).expand(M.shape[0], -1)


def noise(size: int, like: Tensor) -> Tensor:
    """(size,) noise that depends on the index alone, so that no structure is orthogonal to it; dtype and device of ``like``."""
    index = torch.arange(1, size + 1, dtype=torch.float64, device=like.device)
    return ((index * index * 0.6180339887498949).frac() - 0.5).to(like.dtype)


def _times(M: Tensor, x: Tensor) -> Tensor:
    """M x for a batch, as the row vector times M^T: on a CPU ten times faster than the column form."""
    return torch.bmm(x.unsqueeze(1), M.mT).squeeze(1)


def _unit(x: Tensor) -> Tensor:
    """x / ||x||, 0 for 0; scaled first so that no square underflows."""
    top = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(top == 0, 1.0, top)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=0.5)


def _swapped(triple: Triple) -> Triple:
    value, u, v = triple
    return value, v, u


_METHODS: dict[str, Callable[[Tensor, float, int], Triple]] = {
    "jacobi": jacobi,
    "squaring": squaring,
    "lanczos": lanczos,
}
METHODS = (*_METHODS, "power")
