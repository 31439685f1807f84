"""What a mask takes out: one rule for masks of every kind. Backends are given -inf wherever a floating one takes out.

A bool mask says so itself. A floating one is added to logits, and takes out where it is -inf or so far down that it can only be
meant to: at or below half the lowest number of its dtype, as ``torch.finfo(dtype).min`` is, which softmax rounds to zero while
a Sinkhorn sweep would scale a line of such entries back up to its mass. Any larger value is a logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import DTYPES


def check_kind(mask: Tensor, name: str, means: str) -> None:
    """A bool tensor, True for what ``means`` says, or a floating-point one."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype in DTYPES):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} must be a bool tensor, True {means}, or a floating-point one that is added to the logits, got {kind}; "
            f"convert with {name}.bool()"
        )


def least_logit(dtype: torch.dtype) -> float:
    """The largest value of a floating mask that takes an entry out."""
    return torch.finfo(dtype).min / 2


def taken_out(mask: Tensor) -> Tensor:
    """True where a mask takes out: itself where it is bool, True for what is out, and by the rule where it is floating."""
    return mask if mask.dtype == torch.bool else mask <= least_logit(mask.dtype)


def lowered(mask: Tensor) -> Tensor:
    """A floating mask with -inf where it takes out, so that it may be added to others and cast to other dtypes."""
    return mask.masked_fill(taken_out(mask), -torch.inf)


def joined(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One mask, floating where there is a bias, for two that hold both."""
    return mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def met_lines(taking_part: Tensor, queries_out: Tensor | None, keys_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which queries meet a key, and which keys a query, under a mask.

    taking_part: bool (B, H, N, M), dimensions of size 1 where it is broadcast. queries_out (B, N), keys_out (B, M): padding, or
    None. Returns (B, H, N) and (B, H, M), likewise.
    """

    def met(entries: Tensor, others_out: Tensor | None) -> Tensor:
        if others_out is None or entries.shape[-1] == 1:
            return entries.any(-1)
        # A product counts them; entries by batch, where the mask is one for all, would be far more memory.
        return (entries.float() @ (~others_out).float()[:, None, :, None]).squeeze(-1) > 0.5

    return met(taking_part, keys_out), met(taking_part.mT, queries_out)
