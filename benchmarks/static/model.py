"""A time predicted from counted instructions, for an H200: a bound by throughput alone; ``prediction`` says what it takes."""

from __future__ import annotations

from collections.abc import Mapping

from .devices import H200

CLOCK_GHZ = 1.755
"""Hopper, SXM: sustained boost clock."""
# Threads served per clock by one multiprocessor: CUDA programming guide, throughput of native arithmetic instructions.
_ISSUED, _MUFU, _FMA, _FP64 = 128, 16, 128, 64


def predicted_time(counts: Mapping[str, int], threads: int, matrices: int, bytes_per_matrix: int) -> dict[str, float | str]:
    """Nanoseconds per matrix on the whole chip, each resource by itself, and the slowest one.

    counts: instructions that one warp issues, by class. threads, matrices: of one program. Assumes a batch that fills
    the chip and enough warps to hide every latency, so it is a lower bound.
    """
    scale = threads / matrices / H200.multiprocessors / CLOCK_GHZ
    times = {
        "predicted_issue_ns": sum(counts.values()) * scale / _ISSUED,
        "predicted_mufu_ns": counts.get("MUFU", 0) * scale / _MUFU,
        "predicted_fma_ns": sum(counts.get(kind, 0) for kind in ("FFMA", "FMUL", "FADD")) * scale / _FMA,
        "predicted_fp64_ns": counts.get("FP64", 0) * scale / _FP64,
        "predicted_copy_ns": bytes_per_matrix / H200.memory,
    }
    bound = max(times, key=lambda name: times[name])
    rounded: dict[str, float | str] = {name: round(value, 4) for name, value in times.items()}
    return {**rounded, "predicted_ns": rounded[bound], "predicted_bound": bound.split("_")[1]}
