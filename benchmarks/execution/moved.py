"""Bytes that the compiled kernels of an mHC layer move, counted as they run: python -m benchmarks.execution.moved [tokens]

bfloat16 streams, n = 4, C = 4096, by default 8,192 tokens (a quarter of an hour on one core), shared out as on an H100. Streams
are counted by what a warp has from L2 in one instruction, sectors of 32 bytes, other tensors by the sectors that a program
reads at all, as it keeps these in L1; stores by their bytes. Streams and their gradients stand beside the least bytes, what is
not theirs (fn, mixes, partial sums, history, fn's gradient) beside these as well. Rows of 8,192 tokens replace
benchmarks/results/moved.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock, patch

os.environ["TRITON_INTERPRET"] = "0"  # while kernels are imported

import numpy as np
import torch

from fastdsm._ops.mixing import Mixing
from fastdsm.kernels.mhc import launch, launch_post, launch_pre

from ..rows import RESULTS
from ..static.devices import H100
from ..static.layer import ALLOWED, TOKENS, C, N, least_bytes
from .elements import SIZE
from .global_memory import GlobalMemory
from .hook import Execution
from .regions import Region

_SECTOR = 32
_STREAMS = {
    "X_ptr", "h_ptr", "dh_ptr", "dX_ptr", "add_ptr", "branch_ptr", "streams_ptr", "new_streams_ptr", "grad_new_streams_ptr",
    "grad_branch_ptr", "grad_streams_ptr",
}  # fmt: skip


class Moved:
    """Bytes by pointer since the last :meth:`clear`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._held: dict[str, list[np.ndarray]] = {}

    def clear(self) -> None:
        """Begin anew."""
        self._counts.clear()
        self._held.clear()

    def read(self, name: str, launch: int, ctas: np.ndarray, warps: np.ndarray, a: np.ndarray, width: int) -> None:
        """Lanes read ``width`` bytes at ``a``."""
        sectors = np.concatenate([a // _SECTOR, (a + width - 1) // _SECTOR])
        who = np.concatenate([warps, warps] if name in _STREAMS else [ctas, ctas]).astype(np.int64)
        found = np.unique((who << 44) + sectors % (1 << 44))
        if name in _STREAMS:
            self._counts[name] += _SECTOR * len(found)
        else:
            self._held.setdefault(f"{name} {launch}", []).append(found)

    def written(self, name: str, a: np.ndarray, width: int) -> None:
        """Lanes write ``width`` bytes at ``a``."""
        self._counts[name] += width * len(np.unique(a))

    def totals(self) -> Counter[str]:
        """By pointer."""
        totals = self._counts.copy()
        for key, arrays in self._held.items():
            totals[key.split()[0]] += _SECTOR * len(np.unique(np.concatenate(arrays)))
        return totals


@contextmanager
def counting(moved: Moved, execution: Execution) -> Iterator[None]:
    """Count within this."""
    read, store = GlobalMemory.check_read, GlobalMemory._store

    def counted_read(memory: GlobalMemory, region: Region, a: np.ndarray, lanes: np.ndarray, width: int, i: Any) -> None:
        ctas = (memory.lanes.ids[lanes] - 1) // memory.lanes.threads
        moved.read(region.name, execution.report.launches, ctas, lanes // 32, a, width)
        read(memory, region, a, lanes, width, i)

    def counted_store(
        memory: GlobalMemory, region: Region, a: np.ndarray, lanes: np.ndarray, kind: str, values: list[Any], i: Any
    ) -> None:
        moved.written(region.name, a, SIZE[kind] * len(values))
        store(memory, region, a, lanes, kind, values, i)

    with patch.object(GlobalMemory, "check_read", counted_read), patch.object(GlobalMemory, "_store", counted_store):
        yield


def main() -> None:
    """Run each call once, print and record."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS
    execution, moved = Execution("sm_90"), Moved()
    execution.install()
    torch.manual_seed(0)
    rows = N * (N + 2)
    X, mixed, add = torch.randn(3, tokens, N, C).bfloat16().unbind()
    x, dh = torch.randn(2, tokens, C).bfloat16().unbind()
    fn, scale, base = torch.randn(rows, N * C) / 128, torch.ones(3), torch.randn(rows)
    layer, mixing = (fn, scale, base), Mixing()
    _, pre, post, comb, _, sums = launch.pre(X, *layer, mixing)
    assert post is not None
    assert comb is not None
    written = x, X, post, comb
    cotangents = dh, None, post, comb
    calls: dict[str, Callable[[], Any]] = {
        "pre": lambda: launch.pre(X, *layer, mixing),
        "post": lambda: launch.post(*written),
        "post_pre": lambda: launch.post_pre(*written, *layer, mixing),
        "post_pre, shifted": lambda: launch.post_pre(*written, *layer, mixing, pre),
        "post_backward": lambda: launch.post_backward(mixed, *written),
        "pre_backward": lambda: launch.pre_backward(*cotangents, X, *layer, sums, mixing),
        "pre_backward, added": lambda: launch.pre_backward(*cotangents, X, *layer, sums, mixing, add=add),
    }
    found, multiprocessors = [], Mock(return_value=H100.multiprocessors)
    print(f"{tokens} tokens, n = {N}, C = {C}, bfloat16, sm_90; KB a token")
    print(f"{'':22}{'streams':>9}{'least':>8}{'ratio':>8}{'allowed':>9}{'others':>8}{'share':>8}")
    for name, call in calls.items():
        moved.clear()
        with (
            patch.object(launch_pre, "multiprocessors", multiprocessors),
            patch.object(launch_post, "multiprocessors", multiprocessors),
            counting(moved, execution),
        ):
            call()
        totals = moved.totals()
        of_streams = sum(count for pointer, count in totals.items() if pointer in _STREAMS) / tokens
        others = totals.total() / tokens - of_streams
        allowed, least = ALLOWED[name], least_bytes(name)
        row = {"call": name, "tokens": tokens, "streams": of_streams, "least": least, "ratio": of_streams / least}
        found.append(row | {"allowed": allowed, "others": others, "share": others / least, "by_pointer": dict(totals)})
        print(
            f"{name:22}{of_streams / 1024:9.1f}{least / 1024:8.1f}{of_streams / least:8.3f}{allowed:9.2f}"
            f"{others / 1024:8.1f}{others / least:8.3f}",
            flush=True,
        )
    if tokens == TOKENS:
        (RESULTS / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    print(f"issues: {sum(not issue.benign for issue in execution.report.issues.values())}")


if __name__ == "__main__":
    main()
