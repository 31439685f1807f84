"""When the host may wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def may_look(x: Tensor) -> bool:
    """Whether values of x may decide what the host does next: not while a graph of a GPU's work is captured."""
    return x.device.type == "cpu" or (x.is_cuda and not torch.cuda.is_current_stream_capturing())
