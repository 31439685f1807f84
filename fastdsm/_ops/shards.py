"""A public call of DTensors: every process makes the ordinary call of what it has.

The batch of the leading argument stays as it is sharded; other arguments are brought to match it. What is replicated where the
batch is sharded has on each process the gradient of that part alone: their sum is taken once, by the placement Partial.
Partial inputs are reduced. Matrices themselves are not taken apart, but for rows that ``fastdsm.distributed`` serves.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
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
    whole = _on_mesh(whole, lead, mesh)
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
    return pytree.tree_map_only(Tensor, lambda x: _global(x, mesh, placements, (*batch, *x.shape[len(batch) :])), found)


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
        x = _on_mesh(x, name, mesh)
        wanted: list[Any] = [Replicate()] * mesh.ndim
        gradients: list[Any] = list(wanted)
        if dim is not None and x.dim() >= -dim and x.shape[dim] > 1:
            wanted[over] = gradients[over] = Shard(x.dim() + dim)
        else:
            gradients[over] = Partial()
        given[name] = x.redistribute(placements=wanted).to_local(grad_placements=gradients)
    plan = getattr(distributed, function.__name__)(**given, group=mesh.get_group(over))
    lines = len(matrices)

    def joined(x: Tensor, of_rows: bool) -> DTensor:
        shape = (*x.shape[:lines], whole.shape[lines], *x.shape[lines + 1 :]) if of_rows else x.shape
        return _global(x, mesh, [Shard(lines) if of_rows and i == over else Replicate() for i in range(mesh.ndim)], shape)

    if isinstance(plan, Tensor):
        return joined(plan, True)
    plan, info = plan
    return joined(plan, True), info._replace(**{name: joined(x, name == "f") for name, x in info._asdict().items()})


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
    x = _on_mesh(x, name, mesh)
    behind = 0 if name in _OF_LINES else x.dim() - trailing - len(batch)
    wanted: list[Any] = []
    gradients: list[Any] = []
    for placement in placements:
        dim = placement.dim + behind if isinstance(placement, Shard) else -1
        apart = 0 <= dim < x.dim() - trailing and x.shape[dim] > 1
        wanted.append(Shard(dim) if apart else Replicate())
        gradients.append(wanted[-1] if apart or not isinstance(placement, Shard) else Partial())
    return x.redistribute(placements=wanted).to_local(grad_placements=gradients)


def _on_mesh(x: Tensor, name: str, mesh: Any) -> DTensor:
    """A plain tensor is one that every process has."""
    if not isinstance(x, DTensor):
        return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if x.device_mesh != mesh:
        raise ValueError(f"{name} must be on the mesh of the other DTensors, {mesh}, got {x.device_mesh}")
    return x


def _global(x: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> DTensor:
    """What every process has a part of, of a shape in all; parts may be of different sizes."""
    steps = tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()
    return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=steps)
