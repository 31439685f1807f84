"""From the sums fn vec X and vec X ^2 of tokens to pre, post and comb, and back; formulas in ``fastdsm/_ops/mixing.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ops.mixing import Mixing
from ..._ops.problem import Gradients, Outputs, Problem
from ..projection import sinkhorn_backward, sinkhorn_forward
from .sweeps import sweeps_with_eps, sweeps_with_eps_backward


class Mixes(NamedTuple):
    """pre (T, n), post (T, n), comb (T, n, n) as [old, new]; the last two None of a head."""

    pre: Tensor
    post: Tensor | None
    comb: Tensor | None


class Slopes(NamedTuple):
    """Gradients in fn vec X (T, D), in vec X through its square, as a factor of it (T, 1), in scale and base."""

    sums: Tensor
    factor: Tensor
    scale: Tensor
    base: Tensor


def mixes(sums: Tensor, scale: Tensor, base: Tensor, width: int, n: int, mixing: Mixing) -> Mixes:
    """Of ``sums`` (T, D + 1), whose last column is of squares, of tokens of ``width`` values."""
    z = torch.addcmul(base, _normalised(sums, width, mixing)[1], _per_mix(scale, n))
    pre = z[:, :n].sigmoid().add_(mixing.pre_eps)
    if len(base) == n:
        return Mixes(pre, None, None)
    post = z[:, n : 2 * n].sigmoid().mul_(mixing.post_mult)
    plan = _project(z[:, 2 * n :].reshape(-1, n, n), mixing)
    return Mixes(pre, post, plan if mixing.transposed else plan.mT.contiguous())


def mixes_backward(
    d_pre: Tensor | None, d_post: Tensor | None, d_comb: Tensor | None,
    sums: Tensor, scale: Tensor, base: Tensor, width: int, n: int, mixing: Mixing,
) -> Slopes:  # fmt: skip
    """None of ``d_pre``, ``d_post``, ``d_comb``: zero."""
    q, raw = _normalised(sums, width, mixing)
    scales = _per_mix(scale, n)
    z = torch.addcmul(base, raw, scales)
    dz = torch.zeros_like(z)
    for begin, grad, size in ((0, d_pre, 1.0), (n, d_post, mixing.post_mult)):
        if grad is not None:
            s = z[:, begin : begin + n].sigmoid()
            torch.mul(grad, (1.0 - s).mul_(s).mul_(size), out=dz[:, begin : begin + n])
    if d_comb is not None:
        d_plan = d_comb if mixing.transposed else d_comb.mT
        dz[:, 2 * n :] = _project_backward(d_plan, z[:, 2 * n :].reshape(-1, n, n), mixing).flatten(1)
    of_mixes = (dz * raw).sum(0)
    d_scale = torch.stack([part.sum() for part in of_mixes.split([n, n, n * n][: len(scale)])])
    d_base = dz.sum(0)
    dz *= scales
    factor = (dz * raw).sum(1, keepdim=True).mul_(q * q).div_(-width)  # the sum is q times the gradient in q
    return Slopes(dz.mul_(q), factor, d_scale, d_base)


def pre_alone(sums: Tensor, scale: Tensor, base: Tensor, width: int, n: int, mixing: Mixing) -> Tensor:
    """The first of :func:`mixes`."""
    head = torch.cat([sums[:, :n], sums[:, -1:]], 1)
    return mixes(head, scale[:1], base[:n], width, n, mixing).pre


def _per_mix(scale: Tensor, n: int) -> Tensor:
    """``scale`` (3,) or (1,) as (D,)."""
    return torch.cat([x.expand(count) for x, count in zip(scale.split(1), (n, n, n * n), strict=False)])


def _normalised(sums: Tensor, width: int, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """q (T, 1) and the mixes (T, D)."""
    q = sums[:, -1:].div(width).add_(mixing.norm_eps).rsqrt_()
    return q, sums[:, :-1] * q


def _problem(logits: Tensor, mixing: Mixing) -> Problem:
    """The projection without eps."""
    return Problem(logits if mixing.columns_first else logits.mT, mixing.n_iters)


def _project(logits: Tensor, mixing: Mixing) -> Tensor:
    if mixing.sinkhorn_eps > 0.0:
        return sweeps_with_eps(logits, mixing.n_iters, mixing.columns_first, mixing.sinkhorn_eps, mixing.floored)
    plan = torch.empty_like(logits)
    sinkhorn_forward(_problem(logits, mixing), Outputs(plan if mixing.columns_first else plan.mT))
    return plan


def _project_backward(d_plan: Tensor, logits: Tensor, mixing: Mixing) -> Tensor:
    if mixing.sinkhorn_eps > 0.0:
        return sweeps_with_eps_backward(
            d_plan, logits, mixing.n_iters, mixing.columns_first, mixing.sinkhorn_eps, mixing.floored
        )
    grad = torch.empty_like(logits)
    turned = (d_plan, grad) if mixing.columns_first else (d_plan.mT, grad.mT)
    sinkhorn_backward(_problem(logits, mixing), turned[0], Gradients(turned[1]), None)
    return grad
