"""Which lines a plan is of, where only an attention mask tells: what softmax need not know, and a plan must."""

from __future__ import annotations

import torch
from torch import Tensor

# -1e4 (MarkupLM) and -1e9 (EoMT) are meant as minus infinity in masks of attention modules: e^-9000 is 0 to softmax in every
# dtype, while Sinkhorn would scale a column of them up to its mass. Swin's -100 is a logit.
_OUT = -9000.0


def masked(mask: Tensor | None, bias: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """An attention mask (B, H, N, M), dimensions of 1 where it is broadcast, with a bias added, and the keys that are padding.

    mask: bool, True where an entry takes part, or floating, which takes out at -9000 and below: there the result is -inf. A key
    is padding that no query of any head may see: bool (B, M), or None without a mask.
    """
    if mask is None:
        return bias, None
    if mask.dtype == torch.bool:
        taking_part = mask
        joined = mask if bias is None else bias.masked_fill(~mask, -torch.inf)
    elif mask.is_floating_point():
        taking_part = ~(mask <= _OUT)
        joined = mask.masked_fill(~taking_part, -torch.inf)
        joined = joined if bias is None else joined + bias
    else:
        raise TypeError(f"an attention mask must be bool, True where an entry takes part, or floating-point, got {mask.dtype}")
    four = taking_part[(None,) * (4 - taking_part.dim())]
    return joined, ~four.flatten(1, 2).any(1)


def check_queries(queries: int, keys: int, n_iters: int, where: str, remedy: str) -> None:
    """One query over several keys has one doubly-stochastic plan, the uniform one, whatever it asks for."""
    if n_iters > 0 and queries == 1 < keys:
        raise ValueError(
            f"{where} attends from one query to {keys} keys, and the only plan of one line is the uniform one: its output "
            f"would be the mean of the values, whatever the query is; {remedy}"
        )
