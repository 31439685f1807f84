"""The masks of ``nn.MultiheadAttention``'s call, checked by shape and dtype and never reshaped into place.

Their convention is that module's: True takes out, floating ones are added to the logits. What a floating one takes out is
decided by ``fastdsm._ops.masks``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops.masks import check_kind, met_lines, taken_out

Paddings = tuple[Tensor | None, Tensor | None]
"""Padding masks of query (B, N) and key (B, M), bool or floating."""


def check_operands(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> None:
    """Dense, all batched or none, of one batch, keys and values of one length."""
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor, which a Sinkhorn plan is not made for; pass padded tensors with their masks (in "
                "nn.TransformerEncoder: enable_nested_tensor=False when it is made, encoder.use_nested_tensor = False later)"
            )
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        raise ValueError(f"query, key and value must all be (lines, features) or batches of that, got {shapes}")
    lines, batch = (1, 0) if batch_first and query.dim() == 3 else (0, 1)
    if key.shape[lines] != value.shape[lines]:
        raise ValueError(f"key and value must have the same number of lines, got {shapes}")
    if query.dim() == 3 and not query.shape[batch] == key.shape[batch] == value.shape[batch]:
        order = "(batch, lines, features)" if batch_first else "(lines, batch, features), as batch_first=False"
        raise ValueError(f"query, key and value must be {order} of one batch, got {shapes}")


def padding_of(mask: Tensor | None, name: str, batch: int, lines: int, batched: bool) -> Tensor | None:
    """A padding mask as (B, lines), bool or floating."""
    if mask is None:
        return None
    check_kind(mask, name, "for what is taken out")
    expected = (batch, lines) if batched else (lines,)
    if tuple(mask.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, one entry per line, got {tuple(mask.shape)}")
    return mask if batched else mask.unsqueeze(0)


def entries_of(mask: Tensor | None, batch: int, heads: int, lines: tuple[int, int], batched: bool) -> Tensor | None:
    """``attn_mask`` in sinkhorn_attention's convention, True taking part, as (N, M) or (B, H, N, M)."""
    if mask is None:
        return None
    check_kind(mask, "attn_mask", "for what is taken out")
    expected = (lines, (batch * heads, *lines))
    if tuple(mask.shape) not in expected:
        what = "batch * num_heads, lines of the query and of the key" if batched else "num_heads, lines of query and key"
        raise ValueError(f"attn_mask must have shape {expected[0]} or {expected[1]} ({what}), got {tuple(mask.shape)}")
    if mask.dim() == 3:
        mask = mask.unflatten(0, (batch, heads))
    return ~mask if mask.dtype == torch.bool else mask


def are_one(query: Tensor, key: Tensor) -> bool:
    """Whether query and key are the same lines, as far as that can be told: one tensor, or two views of the same memory."""
    if query is key:
        return True
    if torch.compiler.is_compiling() or type(query) is not type(key) or torch._C._are_functorch_transforms_active():
        return False
    if query.shape != key.shape or query.dtype != key.dtype or query.device != key.device or query.numel() == 0:
        return False
    if query.layout != torch.strided or query.stride() != key.stride() or query.storage_offset() != key.storage_offset():
        return False
    try:
        return query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr() != 0
    except RuntimeError:  # a subclass without memory of its own
        return False


def logits_of(q: Tensor, k: Tensor, bias: Tensor | None, paddings: Paddings) -> tuple[Tensor, Tensor | None]:
    """q k^T / sqrt(d) plus what floating masks add (B, H, N, M), and which entries take part."""
    if bias is not None:
        met = met_lines(bias if bias.dtype == torch.bool else ~taken_out(bias), None, None)
        q, k = (x.masked_fill(~lines.unsqueeze(-1), 0.0) for x, lines in zip((q, k), met, strict=True))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    masks: list[Tensor] = []
    if bias is not None:
        masks.append(bias if bias.dtype == torch.bool else ~taken_out(bias))
        logits = logits if bias.dtype == torch.bool else logits + bias.masked_fill(~masks[-1], 0.0)
    for x, at in zip(paddings, (-1, -2), strict=True):
        if x is not None:
            out = taken_out(x)
            masks.append(~out[:, None].unsqueeze(at))
            logits = logits if x.dtype == torch.bool else logits + x.masked_fill(out, 0.0)[:, None].unsqueeze(at)
    mask = None
    for x in masks:
        mask = x if mask is None else mask & x
    return logits, mask


def used_lines(v: Tensor, mask: Tensor | None) -> Tensor:
    """Values with zeros on lines that no query meets, whatever stands there."""
    return v if mask is None else v.masked_fill(~mask.any(-2).unsqueeze(-1), 0.0)
