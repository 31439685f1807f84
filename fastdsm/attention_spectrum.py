"""sigma2 of an attention's plan without the plan: ``fastdsm.sinkhorn_attention_sigma2``."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import reference
from ._ops import sharded, transforms
from ._ops.attention_call import Checked


class _Options(TypedDict, total=False):
    """What the overloads share."""

    key_padding_mask: Tensor | None
    query_padding_mask: Tensor | None
    temperature: float | Tensor
    n_iters: int
    first: str
    tol: float | None
    accuracy: float
    max_steps: int
    backend: str


@overload
def sinkhorn_attention_sigma2(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_bounds: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def sinkhorn_attention_sigma2(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_bounds: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def sinkhorn_attention_sigma2(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_bounds: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...
@sharded.by_shards("query", key=2, attn_mask=2, key_padding_mask=1, query_padding_mask=1, temperature=0)
def sinkhorn_attention_sigma2(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    n_iters: int = 3,
    first: str = "col",
    tol: float | None = None,
    accuracy: float = 1e-4,
    max_steps: int = 24,
    return_bounds: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Second singular value of every head's plan, as :func:`fastdsm.sigma2` defines it, by products with vectors only.

    Lanczos with full reorthogonalisation on M^T M, M the plan with its trivial singular pair projected out: two passes over
    the logits a step and O(max_steps (N + M)) memory a head; on a CPU a few heads' plans at most are stored instead.

    Args:
        query, key, attn_mask, scale, enable_gqa: of the plan, as for :func:`fastdsm.sinkhorn_attention`.
        key_padding_mask, query_padding_mask, temperature, n_iters, first, tol, backend: likewise.
        accuracy: relative accuracy aimed at, > 0; a CPU stops there, a GPU, which does not look, takes all ``max_steps``.
        max_steps: Lanczos steps at most, >= 1.
        return_bounds: also return a certified interval.

    Returns:
        (..., H), float32 (float64 for float64): ||M v2||, a lower bound up to rounding. Differentiable in what the plan is
        differentiable in, by u2 v2^T; at multiplicity one element of the subdifferential. Forward mode, second derivatives and
        torch.func store every head's matrix and take its full SVD, in float64. With ``return_bounds`` also (lower, upper), not
        differentiable: upper from the Lanczos matrix bordered with the part of ||M||_F^2 it does not
        hold, tight once a few singular values carry the rest, at the price of one more pass.
    """
    sharded.refuse_context_parallel("sinkhorn_attention_sigma2")
    if not accuracy > 0:
        raise ValueError(f"accuracy must be > 0, a relative one such as 1e-4, got {accuracy}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be an int >= 1, got {max_steps!r}")
    call = Checked(
        query, key, key, attn_mask, 0.0, False, scale, enable_gqa,
        key_padding_mask, query_padding_mask, temperature, n_iters, first, tol, None, backend,
    )  # fmt: skip
    if call.backend == "reference":
        query, key, _, mask, _ = call.operands
        value = call.restore(reference.sinkhorn_attention_sigma2(query, key, mask, **call.keywords))
        return (value, value.detach(), value.detach()) if return_bounds else value
    value, _, _, upper = transforms.sinkhorn_attention_sigma2(*call.inputs, accuracy, max_steps, return_bounds)
    if not return_bounds:
        return call.restore(value)
    lower = value.detach()
    return call.restore(value), call.restore(lower * (1 - 64 * torch.finfo(lower.dtype).eps)), call.restore(upper)
