"""Sinkhorn attention on a CPU by plans that are stored whole: the call of :func:`sinkhorn` between two products.

Nothing is faster there while plans of all heads are a few megabytes: the sweeps are those of few matrices, and leave to the
gradient what it starts from. More is for the operator, which keeps a few heads' plans at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops.attention_call import Checked
from .projection import looked, sinkhorn
from .pytorch import attention as pytorch_attention
from .results import AttentionInfo, SinkhornInfo

WHOLE_ENTRIES = 1 << 23


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


def is_bare(query: Any, temperature: float | Tensor, dropout_p: Any, beside: tuple[Any, ...]) -> bool:
    """Whether a call may be one of query, key and value alone on a CPU, with nothing beside them."""
    return (
        type(temperature) is float
        and type(dropout_p) is float
        and dropout_p == 0.0
        and all(x is None for x in beside)
        and isinstance(query, Tensor)
        and query.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )


class Bare:
    """Calls of query, key and value alone, as many heads of each, of one form: three operations on batches of matrices.

    The scale is a part of the temperature, and matrices have one dimension before them: host time counts here.
    """

    def __init__(self, call: Checked, lead: torch.Size, tol: float | None, other: Callable[..., Any], with_info: bool) -> None:
        scale, n_iters, columns_first = (call.inputs[k] for k in (9, 11, 12))
        dtype = call.operands[0].dtype
        self.scale, self.lead, self.other = scale, lead, other
        self.narrow = None if dtype in (torch.float32, torch.float64) else dtype
        self.options = (n_iters, "col" if columns_first else "row", tol, "sinkhorn", None, with_info, "torch", False)
        self.projection: Callable[[tuple[Any, ...], bool], Any] | None = None

    @staticmethod
    def serves(call: Checked, lead: torch.Size) -> bool:
        """Whether ``call``, one of query, key and value alone, is such a call."""
        query, key, *_ = call.operands
        return len(lead) > 0 and serves(call) and query.shape[1] == key.shape[1] and call.inputs[9] > 0

    def __call__(self, tensors: tuple[Any, ...], plain: bool) -> Any:
        """Output, with an AttentionInfo where that is asked for."""
        *operands, temperature = tensors
        tau = temperature / self.scale
        if not 0.0 < tau < torch.inf:
            return self.other(tensors, plain)
        if len(self.lead) > 1:
            operands = [x.flatten(0, -3) for x in operands]
        query, key, value = operands if self.narrow is None else (x.float() for x in operands)
        problem = (torch.bmm(query, key.mT), tau, None, None, None, None)
        if self.projection is None:
            self.projection = looked(problem, *self.options)
        found = self.projection(problem, plain)
        plan, info = found if isinstance(found, tuple) else (found, None)
        out = torch.bmm(plan, value)
        if self.narrow is not None:
            out = out.to(self.narrow)
        if len(self.lead) > 1:
            out = out.unflatten(0, self.lead)
            info = None if info is None else AttentionInfo(*(x.unflatten(0, self.lead) for x in info))
        return out if info is None else (out, AttentionInfo(*info))


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
