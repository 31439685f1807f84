"""The oracle of ``fastdsm.mhc``: the mHC layer in plain PyTorch, a line for each of its formulas, differentiated by autograd.

Streams X (..., n, C), weights fn (D, n C); float16 and bfloat16 compute in float32; results are not rounded back. What is
computed stands in ``fastdsm/_ops/mixing.py``. The definitions are those of DeepSeek's code, of which the others are variants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops.mixing import Mixing
from . import deflated_plan, sinkhorn


def mixes(X: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn vec X over the root mean square of vec X, (..., D)."""
    x = _wide(X).flatten(-2)
    return (x @ fn.to(x.dtype).mT) * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)


def split(mixes: Tensor, scale: Tensor, base: Tensor, n: int, mixing: Mixing) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """pre (..., n), post (..., n) and comb (..., n, n) of mixes (..., D); the last two None where D = n."""
    if mixes.shape[-1] == n:
        return pre_of(mixes, scale, base, n, mixing), None, None
    pre, post, logits = gates(mixes, scale, base, n, mixing)
    plan = project(logits, mixing)
    return pre, post, plan if mixing.transposed else plan.mT


def pre_of(mixes: Tensor, scale: Tensor, base: Tensor, n: int, mixing: Mixing) -> Tensor:
    """pre (..., n), of the first n mixes."""
    mixes = _wide(mixes)
    return torch.sigmoid(scale[0] * mixes[..., :n] + base[:n]) + mixing.pre_eps


def gates(mixes: Tensor, scale: Tensor, base: Tensor, n: int, mixing: Mixing) -> tuple[Tensor, Tensor, Tensor]:
    """pre (..., n), post (..., n) and the logits (..., n, n) of the mix of streams."""
    mixes = _wide(mixes)
    post = mixing.post_mult * torch.sigmoid(scale[1] * mixes[..., n : 2 * n] + base[n : 2 * n])
    logits = (scale[2] * mixes[..., 2 * n :] + base[2 * n :]).unflatten(-1, (n, n))
    return pre_of(mixes, scale, base, n, mixing), post, logits


def project(logits: Tensor, mixing: Mixing) -> Tensor:
    """H (..., n, n)."""
    if mixing.sinkhorn_eps == 0.0:
        plan = sinkhorn(logits, n_iters=mixing.n_iters, first="col" if mixing.columns_first else "row")
        assert isinstance(plan, Tensor)
        return plan
    return sweeps_with_eps(logits, mixing.n_iters, mixing.columns_first, mixing.sinkhorn_eps, mixing.floored)


def sweeps_with_eps(logits: Tensor, n_iters: int, columns_first: bool, eps: float, floored: bool = True) -> Tensor:
    """Softmax of the first side + eps, divided by the other's sums + eps; n_iters - 1 times both sides so.

    Not ``floored``: exponentials relative to the largest of the first side, divided by the sums + eps of it in place of the
    softmax.
    """
    x = _wide(logits)
    side, other = (-2, -1) if columns_first else (-1, -2)
    if floored:
        x = x.softmax(side) + eps
    else:
        x = (x - x.detach().amax(side, keepdim=True)).exp()
        x = x / (x.sum(side, keepdim=True) + eps)
    x = x / (x.sum(other, keepdim=True) + eps)
    for _ in range(n_iters - 1):
        x = x / (x.sum(side, keepdim=True) + eps)
        x = x / (x.sum(other, keepdim=True) + eps)
    return x


def collapse(X: Tensor, weights: Tensor) -> Tensor:
    """h = sum_i weights_i X_i, (..., C)."""
    return (weights.unsqueeze(-1) * _wide(X)).sum(-2)


def post(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor) -> Tensor:
    """X'_new = weights_new x + sum_old comb[old, new] X_old, (..., n, C)."""
    return weights.unsqueeze(-1) * _wide(x).unsqueeze(-2) + comb.mT @ _wide(X)


@torch.no_grad()
def spectrum(comb: Tensor) -> Tensor:
    """(..., n + 2) of the mix (..., n, n): its singular values in falling order, sigma2, the largest |sum - 1| of a line."""
    broken = ~comb.isfinite().flatten(-2).all(-1, keepdim=True)
    plan = comb.masked_fill(broken.unsqueeze(-1), 1.0 / comb.shape[-1])
    values = torch.linalg.svdvals(plan)
    sigma2 = torch.linalg.svdvals(deflated_plan(plan, None, None, None))[..., :1]
    sums = torch.cat([plan.sum(-1), plan.sum(-2)], -1)
    return torch.cat([values, sigma2, (sums - 1).abs().amax(-1, keepdim=True)], -1).masked_fill(broken, torch.nan)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
