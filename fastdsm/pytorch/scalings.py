"""Tame sweeps by batched products and their adjoint, in few calls: what :mod:`.sweeps` and :mod:`.projection` do for larger
batches, without pieces, layouts, marginals and stopping, for matrices of which a few fill no cache.

Tame matrices (:mod:`.sweeps`) need one K for all sweeps. The first leaves K with row sums 1, and each later one is v <- c /
(K^T u), u <- 1 / (K v), c = n / m; r comes last. In the gauge of that K the first sweep too is such a step, from the u_0 whose
K^T u_0 is c. P = r diag(u_T) K diag(v_T).

With D the cotangent of P, E = P * D, w_t = v_t / c, the adjoints of log u_t and log v_t, times u_t and -w_t, are a_t and b_t:

    a_T = u_T * (E 1),  b_T = w_T * (v_T * (K^T a_T) - E^T 1);  a_t = u_t^2 * (K b_(t+1)),  b_t = v_t * w_t * (K^T a_t)
    dS = E + K * (sum over t = 1..T of u_(t-1) b_t^T - a_t v_t^T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .storage import by_columns, home, loaded
from .sweeps import tame_range as reach
from .tape import Recorded

__all__ = ["adjoint", "finish", "forward", "reach", "record"]


def _first_sweep(S: Tensor, turned: bool, K: Tensor) -> tuple[Tensor, Tensor]:
    """K (B, n, m) of the logits S in the memory of ``K``, both as they lie; and u_0 (B, n, 1), the sums that left rows."""
    torch._softmax(S, 2 if turned else 1, False, out=K)
    K = K.mT if turned else K
    before = torch.sum(K, 2, keepdim=True)
    return K.div_(before), before


def forward(logits: Tensor, n_iters: int, temperature: float, row: float, dtype: torch.dtype, plan: Tensor) -> None:
    """Fill ``plan`` (B, n, m), rows of sum ``row``, computed in ``dtype``."""
    turned = by_columns(logits)
    S, target = (logits.mT, plan.mT) if turned else (logits, plan)
    place = home(target, dtype)
    K, before = _first_sweep(loaded(S, dtype, temperature), turned, place)
    product, KT, u, v = torch.bmm, K.mT, before.fill_(1.0).mT, K.new_ones((K.shape[0], 1, K.shape[2]))
    c = K.shape[1] / K.shape[2]
    for _ in range(n_iters - 1):
        product(u, K, out=v)
        v.reciprocal_()
        if c != 1.0:  # else every sweep would multiply u by it, and divide v
            v.mul_(c)
        product(v, KT, out=u)
        u.reciprocal_()
    if n_iters > 1 or row != 1.0:
        K.mul_((u if row == 1.0 else u.mul_(row)).mT).mul_(v)
    if place is not target:
        target.copy_(place)


def record(logits: Tensor, n_iters: int, temperature: float, row: float, dtype: torch.dtype) -> Recorded:
    """K, u_0 to u_T and v_1 to v_T; whether the matrices lie column by column."""
    turned = by_columns(logits)
    S = logits.mT if turned else logits
    K, before = _first_sweep(loaded(S, dtype, temperature), turned, torch.empty(S.shape, dtype=dtype))
    product, KT = torch.bmm, K.mT
    c = K.shape[1] / K.shape[2]
    start = before.mT if c == 1.0 else before.mT * c
    u, v = [start, torch.ones_like(before).mT], [K.new_ones((K.shape[0], 1, K.shape[2]))]
    for _ in range(n_iters - 1):
        v.append(product(u[-1], K).reciprocal_())
        if c != 1.0:
            v[-1].mul_(c)
        u.append(product(v[-1], KT).reciprocal_())
    return Recorded(turned, [K, *u, *v])


def finish(recorded: Recorded, row: float, dtype: torch.dtype, plan: Tensor) -> None:
    """Fill ``plan`` as :func:`forward` does, to the bit, from the record of its sweeps."""
    turned, (K, *vectors) = recorded
    u, v = vectors[len(vectors) // 2], vectors[-1]
    target = plan.mT if turned else plan
    place = home(target, dtype)
    torch.mul(K, (u if row == 1.0 else u * row).mT, out=place.mT if turned else place).mul_(v)
    if place is not target:
        target.copy_(place)


def adjoint(
    recorded: Recorded, temperature: float, row: float, dtype: torch.dtype, grad_plan: Tensor, d_logits: Tensor
) -> None:
    """Fill ``d_logits`` (B, n, m) with the exact adjoint of the sweeps that were recorded."""
    turned, (K, *vectors) = recorded
    T = len(vectors) // 2
    u, v = vectors[: T + 1], vectors[T + 1 :]
    c = K.shape[1] / K.shape[2]
    w = v if c == 1.0 else [x / c for x in v]
    product, KT = torch.bmm, K.mT
    target = d_logits.mT if turned else d_logits
    place = home(target, dtype)
    W = place.mT if turned else place
    E = torch.mul(loaded(grad_plan, dtype), u[-1].mT, out=W).mul_(v[-1]) * K
    a = [E.sum(2).unsqueeze(1).mul_(u[-1])]
    b = [(product(a[0], K).mul_(v[-1]) - E.sum(1, keepdim=True)).mul_(w[-1])]
    for t in range(T - 1, 0, -1):
        a.append(product(b[-1], KT).mul_(u[t]).mul_(u[t]))
        b.append(product(a[-1], K).mul_(v[t - 1]).mul_(w[t - 1]))
    W.baddbmm_(torch.cat(a, 1).mT, torch.cat(v[::-1], 1), alpha=-1)
    W.baddbmm_(torch.cat(u[-2::-1], 1).mT, torch.cat(b, 1)).mul_(K)
    if row != temperature:
        W.mul_(row / temperature)
    if place is not target:
        target.copy_(place)
