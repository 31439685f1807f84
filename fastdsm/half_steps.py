"""Projections counted in half steps: so many normalisations of one side after the other, as Sinkformers count.

An even number are whole sweeps. Of an odd number the first is made by itself, a projection of no sweeps whose potential is
where sweeps that begin with the other side start: the side that began is normalised last, and is the exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import arguments
from ._ops.marginals import excluded_entries
from .results import SinkhornInfo, SinkhornSpectrum


def count_of(half_steps: Any, n_iters: int | None, solver: str, grad: str | None) -> int:
    """The number, checked against the options that it excludes."""
    if n_iters is not None:
        raise ValueError(f"half_steps counts what n_iters counts in pairs; give one of them, got n_iters={n_iters} too")
    if solver != "sinkhorn" or grad not in (None, "unrolled"):
        raise ValueError(
            f'half_steps counts the steps of solver="sinkhorn" with its exact gradient, got solver={solver!r}, grad={grad!r}; '
            "leave half_steps out"
        )
    return arguments.count_of(half_steps, "half_steps", 1)


def project(
    function: Callable[..., Any],
    sinkhorn: Callable[..., Any],
    logits: Tensor,
    half_steps: int,
    *,
    first: str,
    f0: Tensor | None,
    return_info: bool | None = None,
    **options: Any,
) -> Any:
    """What ``function``, :func:`sinkhorn` or one that also measures, returns after ``half_steps``.

    return_info: None for a function without that option.
    """
    sweeps, odd = divmod(half_steps, 2)
    info = {} if return_info is None else {"return_info": return_info}
    arguments.check_choice(first, "first", ("col", "row"))
    if not odd:
        return function(logits, n_iters=sweeps, first=first, f0=f0, **info, **options)
    arguments.check_matrices(logits, "logits", 0)
    other = "row" if first == "col" else "col"
    start, begun = _begun(logits, first, f0, options)
    if sweeps == 0:
        found = function(begun, n_iters=0, first=other, **info, **options)
        return _counted(found, logits.dtype, first, start)
    _, one = sinkhorn(begun, n_iters=0, first=other, return_info=True, **options)
    f0 = one.g if first == "col" else one.f
    return _counted(function(logits, n_iters=sweeps, first=other, f0=f0, **info, **options), logits.dtype)


def _begun(logits: Tensor, first: str, f0: Tensor | None, options: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """f0 in the compute dtype, 0 on lines that take no part, and the logits that it is part of: S + f0."""
    if f0 is None:
        return None, logits
    names = ("temperature", "row_marginal", "col_marginal", "mask")
    temperature, row, col, mask = (options.get(name) for name in names)
    _, temperature, f0, row, col, mask = arguments.of_projection((logits, temperature, f0, row, col, mask), first)
    taking_part = ~excluded_entries(mask, logits, row, col)
    at = -1 if first == "col" else -2
    start = torch.where(taking_part.any(at), f0, 0.0)
    scale = temperature[..., None, None] if isinstance(temperature, Tensor) else temperature
    return start, logits + scale * start.unsqueeze(at)


def _counted(found: Any, dtype: torch.dtype, first: str = "col", start: Tensor | None = None) -> Any:
    """Results with the first half step among the sweeps, a plan like the logits, and ``start`` in its potential."""
    if isinstance(found, Tensor):
        return found.to(dtype)
    info = found if isinstance(found, SinkhornSpectrum) else found[1]
    info = info._replace(sweeps=info.sweeps + 1)
    if start is not None:
        info = info._replace(f=info.f + start) if first == "col" else info._replace(g=info.g + start)
    if isinstance(info, SinkhornInfo):
        return found[0].to(dtype), info
    return info._replace(plan=info.plan.to(dtype))
