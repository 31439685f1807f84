"""``mhc_mixes``, ``hc_split_sinkhorn`` and ``sinkhorn_normalize``: the layer's parts, for code that has them apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._ops import mhc_calls, sharded
from .._ops.arguments import check_floating, check_matrices, count_of, resolve_backend
from .._ops.mixing import MOST_STREAMS, Mixing
from .._ops.problem import compute_dtype
from ..projection import sinkhorn
from ..reference import mhc as oracle
from .arguments import parameter, streams_of, weighted

_MOST_LINES = 16  # beyond, operations on whole matrices serve as well as lanes of them


@sharded.by_shards("residual")
def mhc_mixes(residual: Tensor, fn: Tensor, *, norm_weight: Tensor | None = None, norm_eps: float = 1e-6) -> Tensor:
    """fn (D, n C) times the normalised streams (..., n, C): the mixes (..., D) that :func:`hc_split_sinkhorn` takes.

    In float32 (float64 for float64); arguments and errors as for :func:`mhc_pre`.
    """
    n, channels = streams_of(residual)
    check_floating(fn, "fn", "(D, n C)")
    fn = parameter(fn, "fn", (*fn.shape[:1], n * channels), residual, f"(D, n C) for n={n}, C={channels}")
    return oracle.mixes(residual, weighted(fn, norm_weight, residual), norm_eps)


@sharded.by_shards("mixes", 1)
def hc_split_sinkhorn(
    mixes: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int = 4,
    sinkhorn_iters: int = 20,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """pre (..., n), post (..., n) and comb (..., n, n) as [old, new] of mixes (..., n (n + 2)), as DeepSeek's code does.

    Args:
        mixes: in the order pre, post, comb; results are float32 (float64 for float64).
        hc_scale: (3,). hc_base: (n (n + 2),). hc_mult: n, to 16.
        sinkhorn_iters: sweeps, >= 1, without eps >= 0.
        eps: of the softmax and every sum, and what is added to pre; 0 for ``fastdsm.sinkhorn(first="row")``.
        backend: "auto", "triton", "torch" or "reference".
    """
    n = hc_mult
    check_floating(mixes, "mixes", f"(..., {n * (n + 2)})")
    if not 1 <= n <= MOST_STREAMS or mixes.dim() < 1 or mixes.shape[-1] != n * (n + 2):
        raise ValueError(
            f"mixes must have shape (..., n (n + 2)) for hc_mult = n from 1 to {MOST_STREAMS}, got {tuple(mixes.shape)}, n={n}"
        )
    wide = mixes.to(compute_dtype(mixes.dtype))
    scale = parameter(hc_scale, "hc_scale", (3,), wide, "of pre, post and comb")
    base = parameter(hc_base, "hc_base", (n * (n + 2),), wide, f"for n={n}")
    pre, post, logits = oracle.gates(wide, scale, base, n, Mixing(pre_eps=eps))
    return pre, post, sinkhorn_normalize(logits, sinkhorn_iters, eps, backend=backend)


@sharded.by_shards("x")
def sinkhorn_normalize(x: Tensor, repeat: int = 10, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """DeepSeek's projection of logits x (..., n, m): softmax of rows + eps, columns over their sums + eps, then both so.

    ``repeat`` normalisations of the columns in all, >= 1; the result is like x. eps=0 is ``fastdsm.sinkhorn(x, n_iters=repeat,
    first="row")``.
    """
    return project_with_eps(x, repeat, "row", eps, backend=backend)


def project_with_eps(
    logits: Tensor, n_iters: Any, first: str, eps: float, *, floored: bool = True, backend: str = "auto"
) -> Tensor:
    """The same with either side first; not ``floored``: without eps in the softmax (:class:`fastdsm._ops.mixing.Mixing`)."""
    check_matrices(logits, "logits", 0)
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    n_iters = count_of(n_iters, "n_iters", 1 if eps > 0.0 else 0)
    resolve_backend(backend, logits)
    if eps == 0.0:
        return sinkhorn(logits, n_iters=n_iters, first=first, backend=backend)
    if max(logits.shape[-2:]) > _MOST_LINES:
        return oracle.sweeps_with_eps(logits, n_iters, first == "col", eps, floored).to(logits.dtype)
    wide = logits.to(compute_dtype(logits.dtype))
    flat = wide.reshape(-1, *logits.shape[-2:])
    return mhc_calls.sweeps_with_eps(flat, n_iters, first == "col", float(eps), floored).reshape(logits.shape).to(logits.dtype)
