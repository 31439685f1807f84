"""The operators as compositions of torch's own operations, which its forward mode, and any nesting of modes, pass through.

Where an input carries a tangent a call is the oracle's, in float64: the sweeps one after the other; a fixed point by chord
steps from the potentials that the operator has found; sigma2 as a singular value. That is slow, and needs memory: attention's
matrices are stored, and a reverse pass through the sweeps keeps one matrix for each half sweep.

Tensors are those of the operators; None where a result was not asked for. Residual, sweeps, bounds and singular vectors have no
tangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import masks
from .marginals import lines_taking_part
from .problem import compute_dtype

Results = tuple[Any, ...]


def sinkhorn(*inputs: Any) -> Tensor:
    """The plan of the sweeps."""
    plan: Tensor = sinkhorn_info(*inputs, False)[0]
    return plan


def sinkhorn_info(logits: Tensor, *inputs: Any) -> Results:
    """Plan, residual, sweeps, f, g and sigma2 of the sweeps."""
    *tensors, mask, scale, n_iters, columns_first, tol, _, with_sigma2 = inputs
    temperature, f0, row, col = map(_wide, tensors)
    plan, info = reference.swept(
        _wide(logits),
        temperature=scale if temperature is None else temperature,
        n_iters=n_iters,
        first="col" if columns_first else "row",
        tol=tol if tol >= 0 else None,
        f0=f0,
        row_marginal=row,
        col_marginal=col,
        mask=mask,
    )
    value = _sigma2_of(plan, logits, row, col, mask) if with_sigma2 else None
    dtype = compute_dtype(logits.dtype)
    residual, f, g, value = (x if x is None else x.to(dtype) for x in (info.residual, info.f, info.g, value))
    return plan.to(logits.dtype), residual, info.sweeps, f, g, value


def fixed_point(logits: Tensor, *inputs: Any) -> Results:
    """The same of the fixed point."""
    *tensors, mask, scale, _, columns_first, _, _, _, _, with_sigma2 = inputs
    plan, residual, sweeps, f, g, value = without_tangents("fixed_point", logits, *inputs[:-2], True, with_sigma2)
    temperature, _, row, col = map(_wide, tensors)
    first = "col" if columns_first else "row"
    tau = scale if temperature is None else temperature
    near, *potentials = reference.near_fixed_point(_wide(logits), f, g, tau, first, row, col, mask)
    value = with_tangent(value, _sigma2_of(near, logits, row, col, mask)) if with_sigma2 else None
    plan, f, g = map(with_tangent, (plan, f, g), (near, *potentials))
    return plan, residual, sweeps, f, g, value


def sigma2(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None, *inputs: Any) -> Results:
    """sigma2, u and v."""
    value, u, v = without_tangents("sigma2", plan, row, col, mask, *inputs)
    slope = reference.sigma2(_wide(plan), row_marginal=_wide(row), col_marginal=_wide(col), mask=mask)
    return with_tangent(value, slope), u, v


def sinkhorn_attention(query: Tensor, key: Tensor, value: Tensor, *inputs: Any) -> Results:
    """out, f, g, residual and sweeps, of the potentials the last alone."""
    *tensors, seed, scale, tau, n_iters, columns_first, tol, _, implicit, backend, _, _ = inputs
    if seed is not None:
        raise NotImplementedError(
            "sinkhorn_attention has forward-mode and second derivatives for dropout_p=0 alone, got a call with dropout; "
            'use reverse mode, once, or backend="reference"'
        )
    if query.numel() == 0 or key.numel() == 0:
        return without_tangents("sinkhorn_attention", query, key, value, *inputs)  # zeros
    problem = (*_of_heads(scale, query, key, *tensors), tau, n_iters, columns_first, tol, backend)
    found = fixed_point(*problem, "sinkhorn", True, False) if implicit else sinkhorn_info(*problem, False)
    plan, residual, sweeps, f, g = (x.unflatten(0, query.shape[:2]) for x in found[:5])
    key_padding = tensors[-1]
    met = value if key_padding is None else value.masked_fill(key_padding[:, None, :, None], 0.0)
    out = plan @ _wide(met).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return out.to(value.dtype), f.unsqueeze(2), g.unsqueeze(2), residual.to(compute_dtype(query.dtype)), sweeps


def sinkhorn_attention_sigma2(query: Tensor, key: Tensor, value: Tensor, *inputs: Any) -> Results:
    """sigma2, u, v and the upper bound."""
    found, u, v, upper = without_tangents("sinkhorn_attention_sigma2", query, key, value, *inputs)
    if query.numel() == 0 or key.numel() == 0:
        return found, u, v, upper
    *tensors, _, scale, tau, n_iters, columns_first, tol, _, _, backend, _, _, _ = inputs
    problem = (*_of_heads(scale, query, key, *tensors), tau, n_iters, columns_first, tol, backend)
    slope = sinkhorn_info(*problem, True)[-1]
    return with_tangent(found, slope.unflatten(0, query.shape[:2])), u, v, upper


def _of_heads(
    scale: float,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    query_padding: Tensor | None,
    key_padding: Tensor | None,
) -> Results:
    """The tensors of a projection whose matrices are the heads' logits, in float64."""
    logits, valid = reference.attention_logits(
        _wide(query), _wide(key), masks.joined(_wide(bias), mask), scale, key_padding, query_padding
    )
    logits, valid = logits.flatten(0, 1), valid.flatten(0, 1)
    return logits, None if temperature is None else temperature.flatten(), None, None, None, valid


def _sigma2_of(plan: Tensor, logits: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> Tensor:
    """sigma2 of a projection's plan."""
    lines = lines_taking_part(logits, row, col, mask)
    return reference.sigma2(plan, row_marginal=row, col_marginal=col, mask=lines)


def _wide(x: Any) -> Any:
    return x if x is None else x.double()


def without_tangents(name: str, *inputs: Any) -> Any:
    """The operator's own results, which carry none."""
    return getattr(torch.ops.fastdsm, name)(*(x.detach() if isinstance(x, Tensor) else x for x in inputs))


def with_tangent(value: Tensor, slope: Tensor) -> Tensor:
    """``value`` with the derivatives of ``slope``."""
    return value + (slope - slope.detach()).to(value.dtype)
