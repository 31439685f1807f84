"""Sinkhorn attention on a CPU by plans that are stored whole: the call of :func:`sinkhorn` between two products.

Nothing is faster there while plans of all heads are a few megabytes: the sweeps are those of few matrices, and leave to the
gradient what it starts from. More is for the operator, which keeps a few heads' plans at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops.attention_call import Checked
from .projection import sinkhorn
from .pytorch import attention as pytorch_attention
from .results import SinkhornInfo

WHOLE_ENTRIES = 1 << 22


def serves(call: Checked) -> bool:
    """Whether this is a call for plans stored whole: without dropout and compilation, by the unrolled gradient.

    Of one line the plan's gradient is exactly 0 for the operator, which alone knows it.
    """
    query, key, *_ = call.inputs
    seed, implicit, backend = call.inputs[8], call.inputs[-2], call.inputs[-1]
    return (
        backend == "torch"
        and query.is_cpu
        and seed is None
        and not implicit
        and not torch.compiler.is_compiling()
        and 1 not in (query.shape[2], key.shape[2])
        and 0 < query.shape[:3].numel() * key.shape[2] <= WHOLE_ENTRIES
        and query.shape[2] * key.shape[2] <= pytorch_attention.DENSE_ENTRIES
    )


def attention(call: Checked, tol: float | None, return_info: bool) -> tuple[Tensor, SinkhornInfo | None]:
    """Output (B, H, N, e), and how the plans ended, (B, H)."""
    query, key, value, bias, mask, temperature, *paddings, _, scale, number, n_iters, columns_first = call.inputs[:13]
    dtype = torch.promote_types(query.dtype, torch.float32)
    (B, H, N, _), (G, M) = query.shape, key.shape[1:3]
    query, key, value = (
        (x if padding is None else x.masked_fill(padding[:, None, :, None], 0.0)).to(dtype)
        for x, padding in ((query, paddings[0]), (key, paddings[1]), (value, paddings[1]))
    )
    query = query * scale
    logits = _by_group(query, G) @ key.unsqueeze(2).mT if G < H else query @ key.mT
    logits = logits.reshape(B, H, N, M)
    if bias is not None:
        logits = logits + bias.to(dtype)
    for padding, at in zip(paddings, (-1, -2), strict=True):
        if padding is not None:
            taking_part = ~padding.unsqueeze(1).unsqueeze(at)
            mask = taking_part if mask is None else mask & taking_part
    options: dict[str, Any] = {"n_iters": n_iters, "first": "col" if columns_first else "row", "tol": tol, "mask": mask}
    tau = number if temperature is None else temperature
    found = sinkhorn(logits, temperature=tau, return_info=return_info, backend="torch", **options)
    plan, info = found if isinstance(found, tuple) else (found, None)
    out = _by_group(plan, G) @ value.unsqueeze(2) if G < H else plan @ value
    return out.reshape(B, H, N, value.shape[-1]), info


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, G, heads of a group, ...) of (B, H, ...)."""
    return x.unflatten(1, (groups, -1))
