"""A public call of DTensors: every process makes the ordinary call of what it has.

The batch of the leading argument stays as it is sharded; other arguments are brought to match it. What is replicated where the
batch is sharded has on each process the gradient of that part alone: their sum is taken once, by the placement Partial.
Partial inputs are reduced. Matrices themselves are not taken apart.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils import _pytree as pytree

from .sharded import unread

Placements = tuple[Any, ...]
_OF_LINES = frozenset(("key_padding_mask", "query_padding_mask"))  # without heads, which are the last of a query's batch


def called(
    function: Callable[..., Any], lead: str, dims: int, trailing: Mapping[str, int | None], args: Any, kwargs: Any
) -> Any:
    """The call's results, sharded as its leading argument ``lead``."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    whole = given.get(lead)
    if not isinstance(whole, Tensor):
        return function(*args, **kwargs)
    mesh = next(x for x in given.values() if isinstance(x, DTensor)).device_mesh
    if not isinstance(whole, DTensor):
        whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    batch = whole.shape[: whole.dim() - dims] if whole.dim() > dims else torch.Size()
    placements = _of_batch(whole, lead, len(batch))
    for name, x in given.items():
        if not isinstance(x, Tensor):
            continue
        if name == lead:
            given[name] = whole.redistribute(placements=placements).to_local()
        else:
            own = x.dim() if name not in trailing else trailing[name]
            given[name] = _argument(x, name, x.dim() - len(batch) if own is None else own, mesh, placements, batch)
    apart = any(isinstance(x, Shard) for x in placements) and not torch.compiler.is_compiling()
    with unread() if apart else nullcontext():
        found = function(**given)
    return pytree.tree_map_only(Tensor, lambda x: _joined(x, mesh, placements, batch), found)


def _of_batch(x: DTensor, name: str, batch: int) -> Placements:
    """Placements that leave matrices whole; what is Partial is reduced."""
    found = []
    for placement in x.placements:
        if isinstance(placement, Partial):
            placement = Replicate()
        elif not isinstance(placement, Replicate) and not (type(placement) is Shard and placement.dim < batch):
            raise NotImplementedError(
                f"{name} of shape {tuple(x.shape)} must be sharded in its batch, dimensions 0 to {batch - 1}, or replicated, "
                f"got {placement!r}; redistribute it, or see fastdsm.distributed for calls whose matrices are shared"
            )
        found.append(placement)
    return tuple(found)


def _argument(x: Tensor, name: str, trailing: int, mesh: Any, placements: Placements, batch: torch.Size) -> Tensor:
    """This process's part of an argument that is broadcast to the batch with ``trailing`` dimensions behind."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif x.device_mesh != mesh:
        raise ValueError(f"{name} must be on the mesh of the other DTensors, {mesh}, got {x.device_mesh}")
    behind = 0 if name in _OF_LINES else x.dim() - trailing - len(batch)
    wanted: list[Any] = []
    gradients: list[Any] = []
    for placement in placements:
        dim = placement.dim + behind if isinstance(placement, Shard) else -1
        apart = 0 <= dim < x.dim() - trailing and x.shape[dim] > 1
        wanted.append(Shard(dim) if apart else Replicate())
        gradients.append(wanted[-1] if apart or not isinstance(placement, Shard) else Partial())
    return x.redistribute(placements=wanted).to_local(grad_placements=gradients)


def _joined(x: Tensor, mesh: Any, placements: Placements, batch: torch.Size) -> DTensor:
    """A result of the batch's part as one of the batch; parts may be of different sizes."""
    shape = torch.Size((*batch, *x.shape[len(batch) :]))
    steps = tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]
    return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=shape, stride=steps)
