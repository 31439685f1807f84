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
_ROWS = {"row_marginal": -1, "mask": -2}  # which of an argument's dimensions are rows
_OF_LINES = frozenset(("key_padding_mask", "query_padding_mask"))  # without heads, which are the last of a query's batch


def called(
    function: Callable[..., Any],
    lead: str,
    dims: int,
    rows: bool,
    trailing: Mapping[str, int | None],
    args: Any,
    kwargs: Any,
) -> Any:
    """The call's results, sharded as its leading argument ``lead``."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    whole = given.get(lead)
    if not isinstance(whole, Tensor):
        return function(*args, **kwargs)
    mesh = next(x for x in given.values() if isinstance(x, DTensor)).device_mesh
    if not isinstance(whole, DTensor):
        whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if rows and (over := _mesh_dimension_of_rows(whole)) is not None:
        return _of_rows(function, lead, whole, over, given)
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


def _mesh_dimension_of_rows(x: DTensor) -> int | None:
    """Where rows lie apart, if nothing else does."""
    apart = [i for i, placement in enumerate(x.placements) if not isinstance(placement, Replicate)]
    return apart[0] if len(apart) == 1 and x.placements[apart[0]] == Shard(x.dim() - 2) else None


def _of_rows(function: Callable[..., Any], lead: str, whole: DTensor, over: int, given: dict[str, Any]) -> Any:
    """The call of :mod:`fastdsm.distributed`: what is of rows lies apart as they do, what is of columns is on every process."""
    from .. import distributed

    mesh, matrices = whole.device_mesh, whole.shape[:-2]
    given.pop("backend", None)
    for name, x in given.items():
        if not isinstance(x, Tensor):
            continue
        dim = _ROWS.get(name)
        if name == "f0" and given.get("first", "col") == "col":
            dim = -1
        if name == lead:
            given[name] = whole.to_local()
            continue
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        wanted: list[Any] = [Replicate()] * mesh.ndim
        gradients: list[Any] = list(wanted)
        if dim is not None and x.dim() >= -dim and x.shape[dim] > 1:
            wanted[over] = gradients[over] = Shard(x.dim() + dim)
        else:
            gradients[over] = Partial()
        given[name] = x.redistribute(placements=wanted).to_local(grad_placements=gradients)
    plan = getattr(distributed, function.__name__)(**given, group=mesh.get_group(over))
    lines = whole.shape[-2]

    def joined(x: Tensor, at: int | None) -> DTensor:
        placements: list[Any] = [Replicate()] * mesh.ndim
        shape = list(x.shape)
        if at is not None:
            placements[over], shape[at] = Shard(at), lines
        steps = tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()
        return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=steps)

    if isinstance(plan, Tensor):
        return joined(plan, len(matrices))
    plan, info = plan
    of_rows = len(matrices)
    return joined(plan, of_rows), type(info)(
        *(joined(x, of_rows if name == "f" else None) for name, x in info._asdict().items())
    )


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
