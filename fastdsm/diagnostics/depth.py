"""How many layers detail survives: bounds from sigma2 of each layer, and sigma2 of the layers' product.

Let J be the averaging matrix. A doubly-stochastic P keeps the mean and maps the mean-free space to itself, so
P_L ... P_1 - J = (P_L - J) ... (P_1 - J) and

    ||P_L ... P_1 - J||_2 <= sigma2(P_L) ... sigma2(P_1).

What tells one token from another has therefore shrunk below eps after L layers as soon as
sum_l log 1/sigma2(P_l) >= log 1/eps. The bound is one-sided: detail may be gone earlier, wherefore the left side is measured
too (:func:`product_sigma2`), and a truncated plan, whose sigma2 may exceed 1, obeys it only up to its residual. It speaks of
pure mixing. A residual connection mixes by R = (1 - a) I + a P instead, and on the mean-free space

    sigma2(R) <= (1 - a) + a sigma2(P)

by the triangle inequality. How much of it comes from P against what merely stands still, a sigma2 / (1 - a), is the
stagnation index: both ends, collapse to J and collapse to I, are failures.

"The Homogeneity Trap" (arXiv 2601.02080) says, by its abstract, that sigma2 bounds the effective depth; what stands here is
derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pytorch.spectrum import lanczos_of, noise
from .checks import as_float64, require, require_nonnegative, result_dtype

# log 1/eps and log 1/sigma2 each carry a few units of rounding: a ratio this close above an integer is that integer.
_RATIO_ROUNDING = 8 * torch.finfo(torch.float64).eps
_PRODUCT_TOL = 1e-6
_PRODUCT_STEPS = 128


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
    layer, target = as_float64(sigma2), _log_inverse(eps)
    require_nonnegative(layer)
    rate = -layer.log()
    depth = (target / rate * (1 - _RATIO_ROUNDING)).ceil().clamp(min=1.0)
    depth = torch.where(layer >= 1, torch.inf, depth)
    return depth.to(result_dtype(sigma2))


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
    layers, target = as_float64(sigma2_per_layer), _log_inverse(eps)
    if layers.dim() == 0 or layers.shape[0] == 0:
        raise ValueError(
            f"sigma2_per_layer must have shape (layers, ...) with at least one layer, got {tuple(layers.shape)}; "
            "stack the layers' values along the first dimension, or use effective_depth for one repeated layer"
        )
    require_nonnegative(layers)
    gone = (-layers.log()).cumsum(0)
    reached = gone >= target * (1 - _RATIO_ROUNDING)
    first = reached.to(torch.int8).argmax(0)
    depth = torch.where(reached.any(0), (first + 1).to(torch.float64), torch.inf)
    unknown = gone.isnan().any(0) & ~reached.any(0)
    return depth.masked_fill(unknown, torch.nan).to(result_dtype(sigma2_per_layer))


def product_sigma2(plans: Tensor | Sequence[Tensor]) -> Tensor:
    """sigma2 of the product P_L ... P_1 of square layers, from products with vectors only: what a whole stack lets through.

    Lanczos on M^T M, M = M_L ... M_1, M_l = (I - J) P_l (I - J), in float64: at most 128 steps of 2 L products each, no matrix
    beside the plans. For converged plans M = P_L ... P_1 - J; for truncated ones what the mean leaks is left out at each layer.

    Args:
        plans: (L, ..., n, n), first layer first, or a sequence of L tensors (..., n, n) of one shape; floating point.

    Returns:
        (...,), float32, or float64 for float64: ||M v||, a lower bound, to 1e-6 relative where 128 steps suffice (always for
        n <= 128). Differentiable in the plans, by its singular vectors; at multiplicity one element of the subdifferential.

    Raises:
        TypeError, ValueError: no layer, or layers that are not square floating-point matrices of one shape.
    """
    layers = list(plans)
    if not layers:
        raise ValueError("plans must hold at least one layer, got none")
    shape = layers[0].shape
    for plan in layers:
        if not plan.dtype.is_floating_point:
            raise TypeError(f"plans must be floating-point tensors, got {plan.dtype}; convert with plan.float()")
        if plan.dim() < 2 or plan.shape != shape or shape[-1] != shape[-2]:
            raise ValueError(
                f"plans must be square matrices (..., n, n) of one shape, got {tuple(shape)} and {tuple(plan.shape)}"
            )
    wide = [plan.double().reshape(-1, *shape[-2:]) for plan in layers]

    def through(x: Tensor, matrices: list[Tensor]) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        for P in matrices:
            x = (P @ x.unsqueeze(-1)).squeeze(-1)
            x = x - x.mean(-1, keepdim=True)
        return x

    with torch.no_grad():
        forward, backward = [P.detach() for P in wide], [P.detach().mT for P in reversed(wide)]
        start = noise(shape[-1], wide[0]).expand(len(wide[0]), -1)
        start = through(through(start, forward), backward)
        found = lanczos_of(lambda x: through(x, forward), lambda x: through(x, backward), start, _PRODUCT_TOL, _PRODUCT_STEPS)
    value = (found.u * through(found.v, wide)).sum(-1)
    return value.reshape(shape[:-2]).to(result_dtype(*layers))


def residual_contraction(sigma2: float | Tensor, weight: float | Tensor) -> Tensor:
    """Upper bound 1 - a + a sigma2 of the contraction of R = (1 - a) I + a P, derived in the module's docstring.

    Args:
        sigma2: values >= 0 of any shape. weight: a in [0, 1], broadcastable.

    Returns:
        float32, or float64 for float64. No gradient. Attained where P's leading mean-free vector is an eigenvector of
        eigenvalue sigma2, as for symmetric positive semi-definite P.

    Raises:
        ValueError: a outside [0, 1], or a negative sigma2, where the value is on the CPU.
    """
    s, a = as_float64(sigma2), _weight(weight)
    require_nonnegative(s)
    return (1 - a + a * s).to(result_dtype(sigma2, weight))


def stagnation_index(sigma2: float | Tensor, weight: float | Tensor) -> Tensor:
    """What P contributes to a residual layer against what stands still: a sigma2 / (1 - a), a the weight of P.

    Near 0 the layer is the identity on the mean-free space, whatever P does; inf at a = 1, pure mixing. Arguments, dtype and
    errors as for :func:`residual_contraction`.
    """
    s, a = as_float64(sigma2), _weight(weight)
    require_nonnegative(s)
    return (a * s / (1 - a)).to(result_dtype(sigma2, weight))


def _weight(weight: float | Tensor) -> Tensor:
    value = as_float64(weight)
    require((value >= 0) & (value <= 1), f"weight must lie in [0, 1], got {weight}; it is the share of P in (1 - a) I + a P")
    return value


def _log_inverse(eps: float | Tensor) -> Tensor:
    """log 1/eps in float64, after checking 0 < eps < 1 where that needs no wait for a GPU."""
    value = as_float64(eps)
    if value.device.type == "cpu" and not bool(((value > 0) & (value < 1)).all()):
        raise ValueError(f"eps must lie in (0, 1), got {eps}; it is the share of detail that counts as gone")
    return -value.log()
