"""The projection of DeepSeek's mHC code, in which ``eps`` is added to the kernel and to every sum that divides.

It is not the Sinkhorn projection with rounding guarded: ``eps`` is a floor under the plan's entries. From it the two differ by
2e-5 at a standard deviation of the logits of 1, 1e-3 at 2 and 0.4 at 5, for eps=1e-6 and 20 sweeps of 4x4.
"""

from __future__ import annotations

from torch import Tensor

from .._ops.problem import compute_dtype


def project_with_eps(logits: Tensor, n_iters: int, first: str, temperature: float | Tensor, eps: float) -> Tensor:
    """softmax of the first side, + eps, divided by the other's sums + eps; n_iters - 1 times both sides so; like logits.

    logits (..., n, m); temperature a float or (...,); n_iters >= 1; differentiable by autograd. first="row": of rows.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None, None]
    side, other = (-1, -2) if first == "row" else (-2, -1)
    x = (logits.to(compute_dtype(logits.dtype)) / temperature).softmax(side) + eps
    x = x / (x.sum(other, keepdim=True) + eps)
    for _ in range(n_iters - 1):
        x = x / (x.sum(side, keepdim=True) + eps)
        x = x / (x.sum(other, keepdim=True) + eps)
    return x.to(logits.dtype)
