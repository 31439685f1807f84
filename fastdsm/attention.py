"""Sinkhorn attention: ``fastdsm.sinkhorn_attention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

from torch import Tensor

from . import reference, whole_attention
from ._ops import arguments, sharded, transforms
from ._ops.attention_call import Checked, Given
from ._ops.plain import KeptCalls
from .half_steps import count_of as counted
from .results import AttentionInfo, default_tol


class _Options(TypedDict, total=False):
    """What the overloads share."""

    key_padding_mask: Tensor | None
    query_padding_mask: Tensor | None
    temperature: float | Tensor
    n_iters: int | None
    first: str
    tol: float | None
    grad: str | None
    f0: Tensor | None
    half_steps: int | None
    backend: str


@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, AttentionInfo]: ...
@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_info: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, AttentionInfo]: ...
@sharded.by_shards("query", key=2, value=2, attn_mask=2, key_padding_mask=1, query_padding_mask=1, temperature=0, f0=1)
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    n_iters: int | None = None,
    first: str = "col",
    tol: float | None = None,
    grad: str | None = None,
    f0: Tensor | None = None,
    half_steps: int | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionInfo]:
    """Attention with a doubly-stochastic plan: softmax's place in scaled_dot_product_attention taken by Sinkhorn.

    out = P value, P = exp(S + f + g) after ``n_iters`` sweeps on S = (scale query key^T + attn_mask) / temperature. Each
    query line has mass 1, each key line (valid queries) / (valid keys). On a GPU no (N, M) matrix is ever stored, forward or
    backward: memory beside inputs and outputs is O(n_iters (N + M)) per head; on a CPU a few heads' plans at most, or all where
    they have eight million entries.

    Args:
        query: (..., H, N, d), float16, bfloat16, float32 or float64, any strides; 2 and 3 dimensions are without heads. One
            query over several keys has one plan, the uniform one: the mean of the values, whatever it asks for.
        key: (..., G, M, d), value: (..., G, M, e). G = H, or with ``enable_gqa`` a divisor of H: query head h meets key
            head h // (H / G). The arithmetic is float32 (float64 for float64); float32 products follow
            torch.get_float32_matmul_precision() on a GPU.
        attn_mask: broadcastable to (..., H, N, M): bool, True where an entry takes part, or floating, added to
            scale query key^T (differentiable). A floating one takes an entry out where it is -inf or at most half the lowest
            number of its dtype, as finfo(dtype).min is. Larger values are logits: a column of -1e4 is scaled to its mass.
        dropout_p: probability in [0, 1) with which an entry of the plan is dropped, as in scaled_dot_product_attention:
            also in evaluation, unless the caller passes 0.
        is_causal: must be False. A lower-triangular doubly-stochastic matrix is the identity.
        scale: of the logits, a float, default 1 / sqrt(d).
        enable_gqa: allow fewer key and value heads than query heads.
        key_padding_mask: (..., M), query_padding_mask: (..., N): bool, True where a line is padding, or floating, which takes
            a line out as attn_mask does an entry, and is added to the logits of the others (a bool one is the faster). What
            lies on padded lines is never used; padded and fully masked query lines give zeros, in value and gradient.
        temperature: > 0, a float or a tensor broadcastable to (..., H), then differentiable.
        n_iters: sweeps, >= 0, default 3; 0 is scaled_dot_product_attention ("col").
        first: "col": query lines are exact at the end; "row": key lines are.
        tol: None, or a relative residual >= 0 at which each head stops by itself.
        grad: None or "unrolled", the exact gradient of the sweeps done; "implicit", the fixed point's by conjugate gradients
            (at most n_iters steps), right only where the sweeps have converged, wherefore it needs ``tol``.
        f0: potential before the first sweep of the side not updated first, (..., H, N) for "col", (..., H, M) for "row", of
            query heads, in units of logits / temperature; default 0; differentiable; ignored at n_iters = 0. It is an
            addition to attn_mask of its lines, with which a floating attn_mask is stored for every head.
        half_steps: None, or instead of n_iters so many normalisations, >= 1, as for :func:`fastdsm.sinkhorn`. An odd number
            takes a pass of its own for the first.
        return_info: also return an :class:`AttentionInfo`, at the price of one more pass.
        backend: as for :func:`fastdsm.sinkhorn`.

    Returns:
        (..., H, N, e) in value's dtype. Differentiable in query, key, value, a floating attn_mask, temperature and f0, and so
        are f and g of an :class:`AttentionInfo`. Forward mode and second derivatives, for dropout_p=0 alone, store every head's
        matrix in float64, as for :func:`fastdsm.sinkhorn`.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    Source: Sinkformers (Sander et al., arXiv 2110.11773), whose attention this is for "row" and as many half steps.
    """
    sharded.refuse_context_parallel("sinkhorn_attention")
    return attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_padding_mask, query_padding_mask,
        temperature, n_iters, first, tol, grad, f0, half_steps, return_info, backend,
    )  # fmt: skip


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    temperature: float | Tensor,
    n_iters: int | None,
    first: str,
    tol: float | None,
    grad: str | None,
    f0: Tensor | None,
    half_steps: int | None,
    return_info: bool,
    backend: str,
    share: tuple[int, int] = (0, 1),
) -> Any:
    """:func:`sinkhorn_attention` of whole sequences; share as :class:`~fastdsm._ops.attention_call.Checked` has it."""
    beside = (attn_mask, key_padding_mask, query_padding_mask, f0, half_steps)
    if whole_attention.is_bare(query, temperature, dropout_p, beside):
        count = 3 if n_iters is None else n_iters
        options = (is_causal, scale, enable_gqa, count, first, tol, grad, backend, return_info)
        return _bare((query, key, value, temperature), options)

    def called(value: Tensor, dropout_p: float, n_iters: int, first: str, given: Given | None, return_info: bool) -> Any:
        call = Checked(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            key_padding_mask, query_padding_mask, temperature, n_iters, first, tol, grad, backend, given, share,
        )  # fmt: skip
        return _results(call, tol, return_info)

    if half_steps is None:
        n_iters = 3 if n_iters is None else n_iters
        return called(value, dropout_p, n_iters, first, Given.of(f0, first) if n_iters != 0 else None, return_info)
    count = counted(half_steps, n_iters, "sinkhorn", grad)
    arguments.check_choice(first, "first", ("col", "row"))
    n_iters, odd = divmod(count, 2)
    start = Given.of(f0, first)
    if not odd:
        return called(value, dropout_p, n_iters, first, start, return_info)
    other = "row" if first == "col" else "col"
    if n_iters > 0:
        _, info = called(value[..., :1], 0.0, 0, other, start, True)
        start = Given.of(info.g if first == "col" else info.f, other)
    found = called(value, dropout_p, n_iters, other, start, return_info)
    return (found[0], found[1]._replace(sweeps=found[1].sweeps + 1)) if return_info else found


def _results(call: Checked, tol: float | None, return_info: bool) -> Any:
    """What the caller gets."""
    if call.backend == "reference":
        found = reference.sinkhorn_attention(*call.operands, return_info=return_info, **call.keywords)
        if isinstance(found, Tensor):
            return call.restore(found)
        out, info = found
        f, g = call.started(info.f, info.g)
        return call.restore(out), AttentionInfo(*map(call.restore, info._replace(f=f, g=g)))
    if whole_attention.serves(call):
        out, whole = whole_attention.attention(call, tol, return_info)
        out = call.restore(out.to(call.operands[2].dtype))
        if whole is None:
            return out
        f, g = call.started(whole.f, whole.g)
        return out, AttentionInfo(*map(call.restore, whole._replace(f=f, g=g)))
    saving = transforms.backward_may_follow(call.inputs)  # for it the kernels keep every sweep's potentials
    out, f, g, residual, sweeps = transforms.sinkhorn_attention(*call.inputs, return_info, saving)
    if not return_info:
        return call.restore(out)
    converged = residual <= (default_tol(residual.dtype) if tol is None else tol)
    f, g = call.started(*(x[:, :, -1].to(residual.dtype) for x in (f, g)))
    return call.restore(out), AttentionInfo(*map(call.restore, (residual, converged, sweeps, f, g)))


def _looked(tensors: tuple[Any, ...], *options: Any) -> Callable[[tuple[Any, ...], bool], Any]:
    """What serves operands of this form, which nothing stands beside."""
    is_causal, scale, enable_gqa, n_iters, first, tol, grad, backend, return_info = options

    def checked(query: Tensor, key: Tensor, value: Tensor, temperature: float | Tensor) -> Checked:
        shared = (n_iters, first, tol, grad, backend)
        return Checked(query, key, value, None, 0.0, is_causal, scale, enable_gqa, None, None, temperature, *shared)

    def by_operator(tensors: tuple[Any, ...], plain: bool) -> Any:
        return _results(checked(*tensors), tol, return_info)

    call, lead = checked(*tensors), tensors[0].shape[:-2]
    if not whole_attention.Bare.serves(call, lead):
        return by_operator
    return whole_attention.Bare(call, lead, tol, by_operator, return_info)


_bare = KeptCalls(_looked)
