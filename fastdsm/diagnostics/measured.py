"""From plans kept during a step to rows: measured in batches of one size, copied to the host without waiting, then named."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spectrum import sigma2
from .arriving import Arriving
from .distance import distance_to_identity, distance_to_uniform, residual


class Row(NamedTuple):
    """One head of one layer at one step, over the plans sampled there.

    sigma2: mean, with sigma2_min and sigma2_max. to_uniform: mean distance to the uniform plan (0 there, 1 for a permutation).
    to_identity: mean distance to the identity (0 there, 1 for the uniform plan), NaN where not square. residual: the largest.
    collapse: "uniform", "identity" or "".
    """

    step: int
    layer: str
    head: int
    sigma2: float
    sigma2_min: float
    sigma2_max: float
    to_uniform: float
    to_identity: float
    residual: float
    collapse: str


@dataclass(frozen=True)
class Thresholds:
    """Mean sigma2 up to which a head counts as uniform, mean distance up to which it counts as the identity."""

    uniform: float
    identity: float

    def collapse(self, sigma2: float, to_identity: float, shape: tuple[int, int]) -> str:
        """The name of the collapse, "" for none and for single lines, whose only plan is uniform."""
        if min(shape) < 2:
            return ""
        if sigma2 <= self.uniform:
            return "uniform"
        return "identity" if to_identity <= self.identity else ""


@dataclass(frozen=True)
class Group:
    """Layers whose samples (S, H, n, m) have one shape, stacked: (layers, S, H, n, m)."""

    names: list[str]
    plans: Tensor


def groups_of(kept: dict[str, Tensor]) -> list[Group]:
    """The samples by shape and device, in the order in which they came."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name, plans in kept.items():
        found[plans.shape, plans.device].append(name)
    return [Group(names, torch.stack([kept[name] for name in names])) for names in found.values()]


@torch.no_grad()
def measure(plans: Tensor) -> Tensor:
    """(layers, H, 6): the numbers of :class:`Row` from sigma2 to residual, of plans (layers, S, H, n, m)."""
    used = plans != 0  # lines of zeros are padding
    lines = used.any(-1, keepdim=True) & used.any(-2, keepdim=True)
    value = sigma2(plans, mask=lines, tol=1e-3)
    square = plans.shape[-1] == plans.shape[-2]
    identity = distance_to_identity(plans) if square else torch.full_like(value, math.nan)
    columns = [value.mean(1), value.amin(1), value.amax(1), distance_to_uniform(plans, mask=lines).mean(1), identity.mean(1)]
    return torch.stack([*columns, residual(plans, mask=lines).amax(1)], -1)


def over_processes(numbers: Tensor, group: Any) -> Tensor:
    """What :func:`measure` finds of the samples of all processes of a group: as many on each."""
    least, most = [1], [2, 5]
    means = numbers.clone()
    ends = torch.cat([-numbers[..., least], numbers[..., most]], -1)
    torch.distributed.all_reduce(means, group=group)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=group)
    means /= torch.distributed.get_world_size(group)
    means[..., least], means[..., most] = -ends[..., :1], ends[..., 1:]
    return means


@dataclass(frozen=True)
class Pending:
    """Numbers (layers, H, 6) of one step on their way to the host."""

    step: int
    names: list[str]
    shape: tuple[int, int]
    numbers: Arriving

    @classmethod
    def of(cls, step: int, group: Group, processes: Any = None) -> Pending:
        """Measure, here or over the processes of a group, and start the copy."""
        shape = (group.plans.shape[-2], group.plans.shape[-1])
        numbers = measure(group.plans)
        return cls(
            step, group.names, shape, Arriving.of([numbers if processes is None else over_processes(numbers, processes)])
        )

    @property
    def arrived(self) -> bool:
        """Whether the host may read, without waiting."""
        return self.numbers.arrived

    def rows(self, thresholds: Thresholds) -> list[Row]:
        """The rows; waits for the copy if need be."""
        (numbers,) = self.numbers.tensors()
        return [
            Row._make((self.step, name, head, *values, thresholds.collapse(values[0], values[4], self.shape)))
            for name, heads in zip(self.names, numbers.tolist(), strict=True)
            for head, values in enumerate(heads)
        ]
