"""Peak extra memory of a call: the most bytes that it holds at once beyond what was there before.

Outputs and gradients of the call count, its inputs and cotangents do not. Counted are requests to PyTorch's allocators,
whatever the operating system makes of them: on CUDA by the caching allocator's own statistics, on the CPU by adding up
every allocation and release in order of time. Buffers that a library takes elsewhere (a BLAS's packing space, the stack
of a thread) are not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.autograd.profiler import profile


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """Run ``call`` once and return its peak extra memory in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(use_cpu=True, profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)
