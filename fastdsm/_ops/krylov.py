"""The largest singular value of a matrix known by its products, from a Krylov space: what no backend has of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_DOUBLINGS = 36


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
    v = unit(start)
    basis, diagonal, off = [v], [], []
    for step in range(steps):
        w = adjoint(product(v))
        diagonal.append((w * v).sum(-1))
        stacked = torch.stack(basis, 1)
        for _ in range(2):
            w = w - times(stacked.mT, times(stacked, w))
        off.append(w.norm(dim=-1))
        last = step == steps - 1
        if last or (step % 4 == 3 and not w.is_cuda):
            ritz, weights, residual = _top_of_tridiagonal(diagonal, off)
            if last or stop(((residual <= enough * ritz) | (ritz <= 0)).all()):
                break
        # Where the space is exhausted what is left of w is rounding, and where M is, so is the diagonal, of any sign: the next
        # vector is 0, and so are those after it.
        spent = off[-1] <= 8 * torch.finfo(start.dtype).eps * torch.stack(diagonal).abs().amax(0)
        off[-1] = off[-1].masked_fill(spent, 0.0)
        v = (w / off[-1].masked_fill(spent, 1.0)[:, None]).masked_fill(spent[:, None], 0.0)
        basis.append(v)
    v = unit(times(torch.stack(basis, 1).mT, weights))
    image = product(v)
    return Krylov(image.norm(dim=-1), unit(image), v, diagonal, off)


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
            v, moved = (times(x.mT, weights) for x in (basis, images))
            ritz = (v * moved).sum(-1)
            residual = (moved - ritz.unsqueeze(-1) * v).norm(dim=-1)
            if last or stop(~((residual > enough * ritz) & (ritz > 0)).any()):
                break
        rest = image - (image @ basis.mT) @ basis
        block = _orthonormal(rest, 8 * eps * images.norm(dim=-1).amax(-1, keepdim=True))
        # What was rounding in part is not orthogonal to the basis at length 1; what loses half of it was rounding.
        block = _orthonormal(block - (block @ basis.mT) @ basis, 0.5)
    return unit(v)


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
        value = (vector * times(T, vector)).sum(-1)
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
    return unit(power.take_along_dim(best.view(-1, 1, 1), -1).squeeze(-1)).to(T.dtype), bound.to(T.dtype)


def noise(size: int, like: Tensor) -> Tensor:
    """(size,) noise that depends on the index alone, so that no structure is orthogonal to it; dtype and device of ``like``."""
    index = torch.arange(1, size + 1, dtype=torch.float64, device=like.device)
    return ((index * index * 0.6180339887498949).frac() - 0.5).to(like.dtype)


def times(M: Tensor, x: Tensor) -> Tensor:
    """M x for a batch, as the row vector times M^T: on a CPU ten times faster than the column form."""
    return torch.bmm(x.unsqueeze(1), M.mT).squeeze(1)


def unit(x: Tensor) -> Tensor:
    """x / ||x||, 0 for 0; scaled first so that no square underflows."""
    top = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(top == 0, 1.0, top)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=0.5)


def stop(done: Tensor) -> bool:
    """Whether to stop early; on an accelerator never, since looking would stall the host."""
    return done.device.type == "cpu" and bool(done)
