"""What a doubly-stochastic matrix does to the signals it mixes: entropy, and how many layers detail survives.

Let J be the averaging matrix. A doubly-stochastic P keeps the mean and maps the mean-free space to itself, so
P_L ... P_1 - J = (P_L - J) ... (P_1 - J) and

    ||P_L ... P_1 - J||_2 <= sigma2(P_L) ... sigma2(P_1).

What tells one token from another has therefore shrunk below eps after L layers as soon as
sum_l log 1/sigma2(P_l) >= log 1/eps. The bound is one-sided: detail may be gone earlier, and a truncated plan, whose
sigma2 may exceed 1, obeys it only up to its residual. It speaks of pure mixing; a residual connection replaces P by
(1 - a) I + a P and must be measured as such.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# log 1/eps and log 1/sigma2 each carry a few units of rounding: a ratio this close above an integer is that integer.
_RATIO_ROUNDING = 8 * torch.finfo(torch.float64).eps


def entropy(plan: Tensor, order: int = 1, normalized: bool = True) -> Tensor:
    """Mean entropy of the rows of ``plan``, each row taken as a distribution over the columns.

    Args:
        plan: (..., n, m), floating point, entries >= 0. Rows are divided by their sums first, so that a plan of any
            marginals serves; a row of zeros (fully masked) takes no part in the mean.
        order: 1 for Shannon, ``-sum_j p_j log p_j``; 2 for Renyi-2, ``-log sum_j p_j^2``.
        normalized: divide by log m, the entropy of the uniform row, so that the result lies in [0, 1]; m counts all
            columns, and m = 1 gives 1.

    Returns:
        (...,), float32, or float64 for float64; differentiable, with zero gradient where an entry is 0. NaN where every
        row is zero.

    Raises:
        TypeError: ``plan`` is no floating-point tensor.
        ValueError: ``plan`` has fewer than two dimensions, or ``order`` is neither 1 nor 2.

    High entropy is no proxy for a small sigma2: 1 (+) J_(n-1) has normalised entropy near 1 and sigma2 = 1. What does
    hold, for a converged square plan: sum_i exp(-H2(row_i)) = ||P||_F^2 = 1 + sum of sigma_i^2 over i >= 2.
    """
    if not isinstance(plan, Tensor) or not plan.dtype.is_floating_point:
        kind = plan.dtype if isinstance(plan, Tensor) else type(plan).__name__
        raise TypeError(f"plan must be a floating-point tensor, got {kind}; convert it with plan.float()")
    if plan.dim() < 2:
        raise ValueError(f"plan must have shape (..., n, m), got {tuple(plan.shape)}; add the missing dimensions")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (Shannon) or 2 (Renyi-2), got {order!r}; choose one of these")
    plan = plan.to(torch.promote_types(plan.dtype, torch.float32))
    sums = plan.sum(-1, keepdim=True)
    used = sums != 0
    p = plan / sums.where(used, 1.0)
    if order == 1:
        rows = -(p * p.where(p != 0, 1.0).log()).sum(-1, keepdim=True)
    else:
        rows = -p.square().sum(-1, keepdim=True).where(used, 1.0).log()
    mean = rows.where(used, 0.0).sum((-2, -1)) / used.sum((-2, -1))
    if not normalized:
        return mean
    m = plan.shape[-1]
    return mean / math.log(m) if m > 1 else mean + 1.0


def effective_depth(sigma2: float | Tensor, eps: float | Tensor = 2**-9) -> Tensor:
    """Number of equal layers after which detail must be below ``eps``: the least L >= 1 with sigma2^L <= eps.

    Derived in the module's docstring: L = ceil(log(1/eps) / log(1/sigma2)).

    Args:
        sigma2: values >= 0 of any shape, each that of one layer applied again and again.
        eps: in (0, 1), broadcastable; the default 2^-9 is half a unit in the last place of a bfloat16 number near 1.

    Returns:
        Whole numbers as floats, float32, or float64 for float64: 1 where sigma2 <= eps (0 included), inf where
        sigma2 >= 1, NaN for NaN. No gradient.

    Raises:
        ValueError: ``eps`` outside (0, 1), or a negative sigma2, where the value is on the CPU.
    """
    layer, target = _as_float64(sigma2), _log_inverse(eps)
    _require_nonnegative(layer)
    rate = -layer.log()
    depth = (target / rate * (1 - _RATIO_ROUNDING)).ceil().clamp(min=1.0)
    depth = torch.where(layer >= 1, torch.inf, depth)
    return depth.to(_result_dtype(sigma2))


def depth_bound(sigma2_per_layer: Tensor, eps: float | Tensor = 2**-9) -> Tensor:
    """Number of layers of a given stack after which detail must be below ``eps``.

    The least L with sum over l <= L of log 1/sigma2_l >= log 1/eps, derived in the module's docstring.

    Args:
        sigma2_per_layer: (L_max, ...), values >= 0, first layer first; the other dimensions are independent stacks.
        eps: in (0, 1), broadcastable to the other dimensions; 2^-9 is half a bfloat16 unit near 1.

    Returns:
        (...,), whole numbers from 1 to L_max as floats, float32, or float64 for float64; inf where the whole stack does
        not reach eps, NaN where a layer needed to decide is NaN. No gradient.

    Raises:
        ValueError: no layer dimension, ``eps`` outside (0, 1), or a negative sigma2, where the value is on the CPU.
    """
    layers, target = _as_float64(sigma2_per_layer), _log_inverse(eps)
    if layers.dim() == 0 or layers.shape[0] == 0:
        raise ValueError(
            f"sigma2_per_layer must have shape (layers, ...) with at least one layer, got {tuple(layers.shape)}; "
            "stack the layers' values along the first dimension, or use effective_depth for one repeated layer"
        )
    _require_nonnegative(layers)
    gone = (-layers.log()).cumsum(0)
    reached = gone >= target * (1 - _RATIO_ROUNDING)
    first = reached.to(torch.int8).argmax(0)
    depth = torch.where(reached.any(0), (first + 1).to(torch.float64), torch.inf)
    unknown = gone.isnan().any(0) & ~reached.any(0)
    return depth.masked_fill(unknown, torch.nan).to(_result_dtype(sigma2_per_layer))


def _as_float64(value: float | Tensor) -> Tensor:
    """The value as a float64 tensor without a gradient."""
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _result_dtype(value: float | Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything else."""
    return torch.float64 if isinstance(value, Tensor) and value.dtype == torch.float64 else torch.float32


def _require_nonnegative(sigma2: Tensor) -> None:
    """Refuse negative values on the CPU; looking at those on a GPU would wait for it, and the logarithm gives NaN."""
    if sigma2.device.type == "cpu" and bool((sigma2 < 0).any()):
        raise ValueError(f"sigma2 must be >= 0, got {sigma2.min().item()}; pass singular values, not eigenvalues")


def _log_inverse(eps: float | Tensor) -> Tensor:
    """log 1/eps in float64, after checking 0 < eps < 1 where that needs no wait for a GPU."""
    value = _as_float64(eps)
    if value.device.type == "cpu" and not bool(((value > 0) & (value < 1)).all()):
        raise ValueError(f"eps must lie in (0, 1), got {eps}; it is the share of detail that counts as gone")
    return -value.log()
