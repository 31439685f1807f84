"""What the calls return beside the plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def default_tol(dtype: torch.dtype) -> float:
    """Relative residual under which a plan counts as converged when the caller names none."""
    return 1e-12 if dtype == torch.float64 else 1e-6


class SinkhornInfo(NamedTuple):
    """How a projection ended, per matrix. Batch shape (...,); float32, or float64 for float64 logits.

    residual: largest relative error of a column sum (first="col") or row sum (first="row"), the side not exact by
        construction: max over valid j of abs(colsum_j / c_j - 1).
    converged: bool, residual <= tol (1e-6, or 1e-12 in float64, where no tol was given).
    sweeps: int32, sweeps done; steps of solver="newton", the first of which is one sweep or several.
    f, g: row potential (..., n) and column potential (..., m), plan = exp(logits / temperature + f + g); 0 on lines that
        take no part. Differentiable, with the plan's gradient: of the sweeps done, whose gauge is the one f0 sets, or of the
        fixed point, whose potentials are free by a constant (+1, -1): the derivative of least norm, which takes no notice of
        what a cotangent says of that direction. Who keeps them but for a loss should detach them.
    """

    residual: Tensor
    converged: Tensor
    sweeps: Tensor
    f: Tensor
    g: Tensor


class AttentionInfo(NamedTuple):
    """How the plan of an attention ended, per head (B, H), as in :class:`SinkhornInfo`; f (B, H, N) and g (B, H, M)."""

    residual: Tensor
    converged: Tensor
    sweeps: Tensor
    f: Tensor
    g: Tensor


class SinkhornSpectrum(NamedTuple):
    """A plan and its sigma2, both differentiable, with residual, sweeps, f and g as in :class:`SinkhornInfo`."""

    plan: Tensor
    sigma2: Tensor
    residual: Tensor
    sweeps: Tensor
    f: Tensor
    g: Tensor


class MixInfo(NamedTuple):
    """What an mHC layer's mix of streams does, per token, in float32 (float64 for float64); no gradient passes through it.

    sigma2: (...,), that of :func:`fastdsm.sigma2`, which has a gradient; 0 of one stream.
    singular_values: (..., n), in falling order, all of the mix as it is.
    residual: (...,), the largest abs(sum - 1) of a row or column.
    """

    sigma2: Tensor
    singular_values: Tensor
    residual: Tensor
