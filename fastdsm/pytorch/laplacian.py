"""The linear system of Newton's step and of the implicit gradient, in plain PyTorch: a graph Laplacian over the columns.

For a plan P with row sums r, moving the column potential by d and making the rows exact again moves the column sums by

    H d,   H = diag(P^T 1) - P^T diag(1/r) P,

since df = -diag(1/r) P dg. H 1 = 0 and no entry off the diagonal is positive: H is the Laplacian of the graph whose edge
between columns j and k weighs w_jk = sum_i P_ij P_ik / r_i. It is therefore assembled from the weights alone, the diagonal as
their sum; the subtraction above would lose all digits of a plan close to a permutation. ``ground``, small beside the degrees,
adds an edge from each column to a node held at 0, that is diag(ground) to H: parts of the graph that nothing else connects,
or weights below rounding only, then move by no more than what b tells of them allows.

Lanes (n, m, B), the smallest matrices: elimination of one column after another. Taking out column k, of degree deg_k = sum_j
w_kj over what is left (the ground included), adds w_jk w_kl / deg_k to the edge jl: sums, products and quotients of positive
numbers only, so that each weight keeps its relative accuracy however small it is (Grassmann, Taksar and Heyman 1985). A
column without an edge left (deg_k = 0) stays where it is: its potential is free, as that of the last column is.

Batch first, to ``DIRECT_MAX_SIDE`` columns: Cholesky factors in float64 of I - diag(D)^-1/2 w diag(D)^-1/2 + q q^T, D the
degrees, q = sqrt(D / sum D) the null vector, with a ridge of a few units of rounding: it decides nothing above, and keeps the
factors real where clusters of columns are connected by less than rounding. Beyond: conjugate gradients on the same operator,
never formed, two products with P a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .host import may_look
from .layout import BatchLast, Layout

DIRECT_MAX_SIDE = 192  # measured on one core: factors take 0.5 of conjugate gradients' time at 64, 1 at 128, 2 at 256, 4 at 512
_DIRECT_MAX_SIDE_ELSEWHERE = 1024  # on an accelerator a step of conjugate gradients is a dozen launches and a wait
_RIDGE = 16.0  # units of rounding, times the number of columns
_MOST_STEPS = 300  # of conjugate gradients


def solve(at: Layout, P: Tensor, inverse_r: Tensor, b: Tensor, ground: Tensor, accuracy: Tensor) -> Tensor:
    """The d with (H + diag(ground)) d = b, up to constants; b sums to zero, over each part of the graph if there is no ground.

    ``accuracy`` (B,): relative residual at which conjugate gradients stop; the direct solvers take no notice.
    """
    if at is BatchLast:
        return _eliminate(P, inverse_r, b, ground)
    if P.shape[at.cols] <= (DIRECT_MAX_SIDE if P.device.type == "cpu" else _DIRECT_MAX_SIDE_ELSEWHERE):
        return _factorise(P, inverse_r, b, ground)
    return _iterate(P, inverse_r, b, ground, accuracy)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, 0 where x is (nearly) 0, so that products of it and sums of them stay finite."""
    return torch.where(x > torch.finfo(x.dtype).tiny ** 0.8, x.reciprocal(), 0.0)


def _eliminate(P: Tensor, inverse_r: Tensor, b: Tensor, ground: Tensor) -> Tensor:
    """Elimination on lanes: P (n, m, B), vectors (m, B)."""
    n, m, _ = P.shape
    scaled = P * inverse_r.unsqueeze(1)
    edges = []  # of each column to those after it, and to the ground
    for k in range(m):
        w = P.new_empty((m - k, P.shape[2]))
        w[-1] = ground[k]
        if k < m - 1:
            torch.mul(P[0, k + 1 :], scaled[0, k], out=w[:-1])
            for i in range(1, n):
                w[:-1].addcmul_(P[i, k + 1 :], scaled[i, k])
        edges.append(w)
    b, inverses = b.clone(), []
    for k, w in enumerate(edges):
        inverse = _inverse(BatchLast.sums(w, 0))
        inverses.append(inverse)
        share = w[:-1] * inverse
        b[k + 1 :].addcmul_(share, b[k])
        for j in range(m - k - 1):
            edges[k + 1 + j].addcmul_(w[j + 1 :], share[j])
    d = torch.empty_like(b)
    for k in reversed(range(m)):
        torch.mul(b[k], inverses[k], out=d[k])
        for j in range(k + 1, m):
            d[k].addcmul_(edges[k][j - k - 1] * inverses[k], d[j])
    return d


def _factorise(P: Tensor, inverse_r: Tensor, b: Tensor, ground: Tensor) -> Tensor:
    """Cholesky on (B, n, m) and (B, m)."""
    m = P.shape[-1]
    w = ((P * inverse_r.unsqueeze(-1)).mT @ P).double()
    w.diagonal(dim1=-2, dim2=-1).zero_()
    degree = w.sum(-1) + ground
    scale = _inverse(degree).sqrt()
    q = _null_vector(degree)
    A = torch.addcmul(w.mul_(-scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2)), q.unsqueeze(-1), q.unsqueeze(-2))
    A.diagonal(dim1=-2, dim2=-1).add_(1.0 + _RIDGE * m * torch.finfo(A.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(A)
    y = torch.cholesky_solve((b * scale).unsqueeze(-1), factor).squeeze(-1)
    return (y * scale).to(b.dtype)


def _null_vector(degree: Tensor) -> Tensor:
    """sqrt(D / sum D)."""
    return (degree / degree.sum(-1, keepdim=True).clamp(min=torch.finfo(degree.dtype).tiny)).sqrt()


def _iterate(P: Tensor, inverse_r: Tensor, b: Tensor, ground: Tensor, accuracy: Tensor) -> Tensor:
    """Conjugate gradients on (B, n, m) and (B, m), the degrees taken out on both sides."""

    def product(z: Tensor) -> Tensor:
        image = torch.bmm(P, z.unsqueeze(-1)) * inverse_r.unsqueeze(-1)
        return diagonal * z - torch.bmm(image.mT, P).squeeze(1)

    scaled = P * inverse_r.unsqueeze(-1)
    diagonal = P.sum(-2) + ground
    degree = (P * (1.0 - scaled)).clamp_(min=0.0).sum(-2) + ground
    scale = _inverse(degree).sqrt()
    q = _null_vector(degree)
    rest = b * scale
    rest = rest - q * (q * rest).sum(-1, keepdim=True)
    y, direction, square = torch.zeros_like(rest), rest, rest.square().sum(-1, keepdim=True)
    enough = square * accuracy.square().unsqueeze(-1)
    for _ in range(_MOST_STEPS):
        active = square > enough
        if may_look(active) and not bool(active.any()):
            break
        image = scale * product(scale * direction)
        image = image - q * (q * image).sum(-1, keepdim=True)
        step = torch.where(active, square / (direction * image).sum(-1, keepdim=True), 0.0)
        y, rest = y + step * direction, rest - step * image
        new_square = torch.where(active, rest.square().sum(-1, keepdim=True), square)
        direction = rest + torch.where(active, new_square / square, 0.0) * direction
        square = new_square
    return y * scale
