"""Sinkhorn attention over a sequence of which every process has a part: context parallelism.

By exchange of heads (Ulysses) where the processes divide them: lines are traded for heads before the call, which is then an
ordinary one of whole sequences, exact whatever its options, and back behind it: four exchanges of a process's own query, key,
value and output. Else keys and values are gathered (``gathered.py``). Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._ops.attention_call import Checked
from ..attention import attend
from .collectives import Group, gather, group_of, place_of, swap
from .gathered import attention

_HEADS, _LINES = 1, 2


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
    group: Group = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    n_iters: int | None = None,
    first: str = "col",
    tol: float | None = None,
    grad: str | None = None,
    half_steps: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`fastdsm.sinkhorn_attention` of the sequence whose parts the processes of ``group`` hold in order of rank.

    Args:
        query: (B, H, N / W, d), key, value: (B, G, M / W, ...): this process's lines, as many on each of the W. Where H and G
            are multiples of W heads are exchanged, at the price of once through each tensor. Else keys and values are gathered
            on every process, and column sums reduced, (B, H, M) float64 numbers a sweep, forward and backward.
        attn_mask: broadcastable to (B, H, N / W, M): the rows of this process's queries, over all keys.
        key_padding_mask: (B, M / W), query_padding_mask: (B, N / W), of this process's lines.
        temperature: the same on every process, a float or broadcastable to (B, H).
        dropout_p: ranks that draw alike drop other entries, as their heads are others.
        group: a ProcessGroup, None for the default one; ``mesh.get_group()`` inside torch's ``context_parallel``.
        others: as there, the same on every process. Where keys are gathered a temperature has no gradient, half_steps are not
            served, and the implicit gradient is that of first="col".

    Returns:
        (B, H, N / W, e), this process's lines. Gradients of query, key, value and masks are of the sum of all processes'
        losses; that of a temperature that all share is, as of any such parameter, this process's share, to be added up.

    Raises:
        TypeError, ValueError: as there; NotImplementedError for what gathered keys do not serve; RuntimeError without a group.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    group = group_of(group)
    rank, size = place_of(group)
    _check(query, key, value)
    heads, lines = query.shape[_HEADS], query.shape[_LINES]
    if heads % size or key.shape[_HEADS] % size:
        if half_steps is not None:
            raise NotImplementedError(f"half_steps takes heads that are a multiple of the {size} processes, got {heads}")
        if key_padding_mask is not None:
            key_padding_mask = gather(key_padding_mask, 1, group)
        call = Checked(
            query, gather(key, _LINES, group), gather(value, _LINES, group), attn_mask, dropout_p, is_causal, scale, enable_gqa,
            key_padding_mask, query_padding_mask, temperature, 3 if n_iters is None else n_iters, first, tol, grad, backend,
            None, (rank, size),
        )  # fmt: skip
        return attention(call, group)
    query, key, value = (swap(x, _HEADS, _LINES, group) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = _rows(attn_mask, heads, lines, group)
    key_padding_mask, query_padding_mask = (
        None if x is None else gather(x, x.dim() - 1, group) for x in (key_padding_mask, query_padding_mask)
    )
    if isinstance(temperature, Tensor) and temperature.dim() > 0 and temperature.shape[-1] > 1:
        temperature = temperature.chunk(size, -1)[rank]
    out = attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_padding_mask, query_padding_mask,
        temperature, n_iters, first, tol, grad, None, half_steps, False, backend, (rank, size),
    )  # fmt: skip
    return swap(out, _LINES, _HEADS, group)


def _check(query: Any, key: Any, value: Any) -> None:
    """What the exchange needs, which every process sees alike."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor (B, heads, lines, features), got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, heads, lines, features), got {tuple(x.shape)}")


def _rows(mask: Tensor, heads: int, lines: int, group: Any) -> Tensor:
    """The rows of all queries, where they differ; of this process's heads, where these do."""
    mask = mask[(None,) * (4 - mask.dim())]
    of_heads, of_lines = mask.shape[_HEADS] == heads > 1, mask.shape[_LINES] == lines
    if of_heads and of_lines:
        return swap(mask, _HEADS, _LINES, group)
    if of_lines:
        return gather(mask, _LINES, group)
    rank, size = place_of(group)
    return mask.chunk(size, _HEADS)[rank] if of_heads else mask
