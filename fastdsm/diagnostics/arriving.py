"""Tensors on their way to the host, which is asked whether they are there and need not wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """``_host``: where they arrive; ``_event`` None where they are there already."""

    _host: list[Tensor]
    _event: Any

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Arriving:
        """Start the copy of tensors of one device."""
        if tensors[0].device.type != "cuda":
            return cls(list(tensors), None)
        host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensors[0].device))
        return cls(host, event)

    @property
    def arrived(self) -> bool:
        """Whether the host may read, without waiting."""
        return self._event is None or self._event.query()

    def tensors(self) -> list[Tensor]:
        """On the host; waits for the copy if need be."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
