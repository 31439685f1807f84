"""sigma2 of given plans of more than 256 lines: a block Krylov space from passes of ``gram.py`` over the plan.

The host never waits: on a GPU every pass is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdsm._ops.krylov import krylov_vector, noise
from fastdsm._ops.marginals import marginals_of_plan

from .launch import MAX_SIZE, aligned, by_rows, programs_of
from .table import CHUNK, ELEMENTS, GRAM, REDUCE_GRAM

_VECTORS = 2  # of a pass
_PASSES = 64
# Entries of a plan times its shorter side from which passes are predicted to be quicker than squaring, whose sixteen products
# of 2^34 multiplications take about as long as the host takes for the launches of 64 passes, 15 ms. No GPU has measured it.
_FROM = 2**34


def supports(plan: Tensor) -> bool:
    """Whether plans (B, n, m) have 16 or 32 bits, at most 32,768 columns (rows are not limited), and on a GPU enough work."""
    least, most = sorted(plan.shape[1:])
    enough = plan.device.type == "cpu" or plan.shape[0] * least**2 * most >= _FROM
    return plan.dtype in ELEMENTS and least >= 1 and plan.shape[2] <= MAX_SIZE and enough


def sigma2(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    value: Tensor,
    u2: Tensor,
    v2: Tensor,
    tol: float,
) -> None:
    """Write sigma2 and its vectors, arguments as for ``spectrum.sigma2``; value = ||M v2||, about tol below sigma2 at most."""
    if plan.shape[0] == 0:
        return
    r, c = (x.contiguous() for x in marginals_of_plan(plan, row_marginal, col_marginal, mask))
    plan = plan if mask is None else plan.masked_fill(~mask, 0.0)
    if plan.stride(2) != 1 and plan.stride(1) == 1 and plan.shape[1] <= MAX_SIZE:
        plan, r, c, u2, v2 = plan.mT, c, r, v2, u2
    q, p, weight = _unit_root(r), _unit_root(c), torch.where(c > 0, c.rsqrt(), 0.0)
    gram = _Gram(by_rows(plan), r)

    def beside(v: Tensor) -> Tensor:
        """The part of each v (B, k, m) that is orthogonal to p."""
        return v - (v @ p.unsqueeze(-1)) * p.unsqueeze(1)

    def product(v: Tensor) -> Tensor:
        return beside(gram(weight.unsqueeze(1) * beside(v)) * weight.unsqueeze(1))

    start = noise(_VECTORS * plan.shape[2], c).view(1, _VECTORS, -1) * (c > 0).unsqueeze(1)
    v2.copy_(beside(krylov_vector(product, beside(start), tol, _PASSES).unsqueeze(1)).squeeze(1))
    left = torch.empty_like(r)
    gram(torch.stack([weight * v2, torch.zeros_like(v2)], 1), left)
    left -= q * (q * left).sum(-1, keepdim=True)
    length = left.double().norm(dim=-1, keepdim=True)
    value.copy_(length.squeeze(-1))
    u2.copy_(left / length.where(length > 0, 1.0))


def _unit_root(masses: Tensor) -> Tensor:
    """sqrt(x / sum x), 0 where there is nothing."""
    return (masses / masses.sum(-1, keepdim=True).clamp(min=torch.finfo(masses.dtype).tiny)).sqrt()


class _Gram:
    """X^T diag(r)^-1 X of plans (B, n, m) by rows, r (B, n), times pairs of directions."""

    def __init__(self, plan: Tensor, r: Tensor) -> None:
        batch, _, m = plan.shape
        block_m, self._lines, self._blocks = programs_of(plan)
        self._plan, self._r, self._configuration = plan, r, GRAM[plan.dtype, block_m, aligned(plan)]
        self._chunks = -(-m // CHUNK)
        self._means, self._directions, self._partial = (
            r.new_zeros((batch, *shape, self._chunks * CHUNK)) for shape in ((), (_VECTORS,), (self._blocks, _VECTORS))
        )
        total = r.sum(-1, keepdim=True)
        torch.div(plan.sum(1, dtype=r.dtype), total.where(total > 0, 1.0), out=self._means[:, :m])

    def __call__(self, directions: Tensor, left: Tensor | None = None) -> Tensor:
        """The product (B, 2, m) with ``directions``, 0 on excluded columns; ``left`` (B, n) receives diag(r)^-1/2 X y of the
        first of them."""
        batch, n, m = self._plan.shape
        self._directions[..., :m] = directions
        self._configuration.launch(
            batch * self._blocks,
            plan_ptr=self._plan,
            row_ptr=self._r,
            means_ptr=self._means,
            direction_ptr=self._directions,
            left_ptr=self._r if left is None else left,
            partial_ptr=self._partial,
            stride_b=self._plan.stride(0),
            stride_n=self._plan.stride(1),
            n=n,
            m=m,
            width=self._means.shape[-1],
            lines=self._lines,
            blocks=self._blocks,
            has_left=int(left is not None),
        )
        product = torch.empty_like(self._directions)
        chunks = _VECTORS * self._chunks
        REDUCE_GRAM.launch(
            batch * chunks,
            partial_ptr=self._partial,
            product_ptr=product,
            width=_VECTORS * self._means.shape[-1],
            blocks=self._blocks,
            chunks=chunks,
        )
        return product[..., :m]
