"""What the processes of a group exchange, with gradients: the functional collectives, whose names changed after torch 2.11."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

Group = Any  # a torch.distributed.ProcessGroup, or None for the default one


def group_of(group: Group) -> Any:
    """The group, RuntimeError where there is none."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("this call is one of a group of processes: torch.distributed.init_process_group comes first")
    return dist.group.WORLD if group is None else group


def place_of(group: Any) -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return dist.get_rank(group), dist.get_world_size(group)


def gather(x: Tensor, dim: int, group: Any) -> Tensor:
    """All processes' x along ``dim``; its backward adds up what they have for each part."""
    found = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
    y: Tensor = collectives.wait_tensor(found(_sent(x), dim, group))
    return y.to(x.dtype) if y.dtype != x.dtype else y


def swap(x: Tensor, apart: int, together: int, group: Any) -> Tensor:
    """What every process has a part of along ``together``, whole there, and in its stead a part of ``apart``: all to all."""
    _, size = place_of(group)
    sent = torch.stack(_sent(x).chunk(size, apart))
    found = collectives.all_to_all_single_autograd(sent.flatten(), None, None, group)
    parts: Tensor = collectives.wait_tensor(found).view(sent.shape)
    y = torch.cat(parts.unbind(0), together)
    return y.to(x.dtype) if y.dtype != x.dtype else y


def _sent(x: Tensor) -> Tensor:
    """As a backend takes it: gloo has no bool."""
    return x.to(torch.uint8) if x.dtype == torch.bool else x.contiguous()


def reduced(x: Tensor, operation: str, group: Any) -> Tensor:
    """The sum or the maximum of all processes' x, alike on all; without a gradient."""
    y: Tensor = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), operation, group))
    return y
