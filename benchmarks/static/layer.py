"""``python -m benchmarks.static.layer [TOKENS]``: an mHC layer's calls by the model of a GPU, beside the least they can take.

bfloat16 streams, n = 4, C = 4096, 8,192 tokens unless told; predictions, in microseconds. The floor is what the least bytes of
streams and their gradients take at the rate of a copy. fn, which all programs read, comes from L2. Mixes alone are a launch of
their own of what the pre does beside its product and its collapse. Rows of 8,192 tokens replace benchmarks/results/layer.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

import torch

from fastdsm._ops.mixing import Mixing
from fastdsm.kernels.common.configuration import Launch
from fastdsm.kernels.mhc import launch, launch_post, launch_pre

from ..rows import RESULTS
from .compilation import kernel_name, source
from .devices import DEVICES, Device
from .launches import ALIGNMENT, recorded
from .prediction import launch_time

LAYER = RESULTS / "layer.jsonl"
N, C, TOKENS = 4, 4096, 8192
MIXES = "mixes alone"
# Least bytes a token are so many of X, n C, and of F, h and their like, C; the bytes that are moved may be so many times these.
_LEAST = {
    "pre": (2, 1),
    "post": (2, 1),
    "post_pre": (3, 2),
    "post_pre, shifted": (2, 2),
    "post_backward": (3, 2),
    "pre_backward": (3, 2),
    "pre_backward, added": (4, 2),
}
ALLOWED = {"pre": 1.15, "post": 1.05, "post_pre": 1.1, "post_pre, shifted": 1.1} | dict.fromkeys(
    ("post_backward", "pre_backward", "pre_backward, added"), 1.25
)


def least_bytes(name: str) -> int:
    """Of a token, bfloat16."""
    whole, lines = _LEAST[name]
    return 2 * C * (whole * N + lines)


def rows(tokens: int = TOKENS, devices: tuple[Device, ...] = DEVICES) -> Iterator[dict[str, Any]]:
    """Each call on each device."""
    for device in devices:
        for name, (launches, fn) in _launches(tokens, device).items():
            times = [launch_time(x, x.programs, (fn,), device) for x in launches]
            known = [time for time in times if time is not None]
            yield {
                "device": device.name,
                "call": name,
                "tokens": tokens,
                "kernels": [kernel_name(x.configuration) for x in launches],
                "sources": [source(x.configuration) for x in launches],
                "predicted": [None if time is None else round(time / 1000, 2) for time in times],
                "whole": round(sum(known) / 1000, 2) if len(known) == len(times) else None,
                "floor": round(tokens * least_bytes(name) / device.memory / 1000, 2) if name in _LEAST else None,
            }


def _launches(tokens: int, device: Device) -> dict[str, tuple[list[Launch], range]]:
    """What each call launches, and where its fn lies."""
    X, mixed, add = torch.empty(3, tokens, N, C, dtype=torch.bfloat16).unbind()
    x, dh = torch.empty(2, tokens, C, dtype=torch.bfloat16).unbind()
    count = N * (N + 2)
    fn, scale, base, sums = torch.empty(count, N * C), torch.empty(3), torch.empty(count), torch.empty(tokens, count + 1)
    pre, post, comb = torch.empty(tokens, N), torch.empty(tokens, N), torch.empty(tokens, N, N)
    layer, mixing, written, cotangents = (fn, scale, base), Mixing(), (x, X, post, comb), (dh, None, post, comb)
    calls: dict[str, Callable[[], Any]] = {
        "pre": lambda: launch.pre(X, *layer, mixing),
        MIXES: lambda: launch_pre.mix(launch_pre.product(X, fn), X, scale, base, mixing, collapse=False),
        "post": lambda: launch.post(*written),
        "post_pre": lambda: launch.post_pre(*written, *layer, mixing),
        "post_pre, shifted": lambda: launch.post_pre(*written, *layer, mixing, pre),
        "post_backward": lambda: launch.post_backward(mixed, *written),
        "pre_backward": lambda: launch.pre_backward(*cotangents, X, *layer, sums, mixing),
        "pre_backward, added": lambda: launch.pre_backward(*cotangents, X, *layer, sums, mixing, add=add),
    }
    found = {}
    multiprocessors = mock.Mock(return_value=device.multiprocessors)
    for name, call in calls.items():
        with (
            mock.patch.object(launch_pre, "multiprocessors", multiprocessors),
            mock.patch.object(launch_post, "multiprocessors", multiprocessors),
            recorded() as launches,
        ):
            call()
        begin = -(-fn.data_ptr() // ALIGNMENT) * ALIGNMENT & 0xFFFFFFFF
        found[name] = (launches[name == MIXES :], range(begin, begin + fn.nbytes))
    return found


def section(rows: list[dict[str, Any]], current: Collection[str]) -> str:
    """What the model says of each call, launch by launch; current: sources of the kernels of today."""
    lines = ["| predicted | | launches, µs | floor, µs | of the floor |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        parts = " + ".join("?" if time is None else f"{time:.0f}" for time in row["predicted"])
        floor, whole = row["floor"], row["whole"]
        ratio = f"{whole / floor:.2f}" if whole and floor else ""
        lines.append(f"| {row['device']} | {row['call']} | {parts} | {'' if floor is None else f'{floor:.0f}'} | {ratio} |")
    old = sum(not set(row["sources"]) <= set(current) for row in rows)
    shares = []
    for device in DEVICES:
        mine = {row["call"]: row["whole"] for row in rows if row["device"] == device.name}
        if mine.get(MIXES) and mine.get("pre"):
            shares.append(f"{(mine[MIXES] - device.launch / 1000) / mine['pre']:.1%} ({device.name})")
    return (
        f"bfloat16, n = {N}, C = {C}, {rows[0]['tokens']:,} tokens; the floor is what the least bytes of streams and their "
        f"gradients take at the rate of a copy. The mixes with 20 sweeps, alone, are {' and '.join(shares)} of the pre. Since "
        f"then the kernels of {old} of these {len(rows)} have changed.\n\n" + "\n".join(lines)
    )


def read(path: Path = LAYER) -> list[dict[str, Any]]:
    """The committed rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Print and record."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS
    found = []
    for row in rows(tokens):
        found.append(row)
        parts = " + ".join("?" if time is None else f"{time:.1f}" for time in row["predicted"])
        ratio = f", {row['whole'] / row['floor']:.2f} of the floor {row['floor']:.1f}" if row["whole"] and row["floor"] else ""
        print(f"{row['device']}, {tokens} tokens, {row['call']}: {parts}{ratio}", flush=True)
    if tokens == TOKENS:
        LAYER.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
