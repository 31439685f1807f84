"""What the model has to know of a GPU, and from where. Cycles are of the multiprocessor's clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Constants of one GPU.

    multiprocessors, clock_ghz, l2_bytes: of the data sheet; the clock is what the sheet's float32 rate amounts to. memory,
    l2: bytes per nanosecond, read and written together. memory_latency, l2_latency, shared_latency: cycles from a load to its
    use, of a dependent chain. launch: nanoseconds between kernels of one CUDA graph.
    """

    name: str
    target: str
    multiprocessors: int
    clock_ghz: float
    memory: float
    memory_latency: float
    l2: float
    l2_latency: float
    l2_bytes: float
    l1_latency: float
    l1_bytes: int
    shared_latency: float
    launch: float


H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    target="sm_90",
    multiprocessors=132,
    clock_ghz=1.98,  # 66.9 TFLOP/s = 132 multiprocessors x 128 lanes x 2 x 1.98 GHz
    memory=2800.0,  # clones of 134 MB in cuda.jsonl: 47 to 48 us
    memory_latency=570.0,  # pointer chasing on an H100 SXM5 at 1.98 GHz, published: 570.5, L2 259.9, shared memory 28.6
    l2=3600.0,  # a copy of 16 MB that stays in L2, from the same publication
    l2_latency=260.0,
    l2_bytes=50e6,
    l1_latency=40.0,
    l1_bytes=192 * 1024,  # of 256 KiB, less what is shared memory
    shared_latency=29.0,  # and 29.0 in arXiv 2402.13499
    launch=2000.0,  # what clones of 2 to 17 MB in cuda.jsonl take beyond their bytes: 1.3 to 2.6 us
)
H200 = Device(
    name="NVIDIA H200",
    target="sm_90",
    multiprocessors=132,
    clock_ghz=1.98,
    memory=4300.0,  # a copy of 8.6 GB in 2.0 ms
    memory_latency=570.0,  # this and what follows as of the H100, whose chip it has
    l2=4300.0,  # at least what comes through it from memory
    l2_latency=260.0,
    l2_bytes=50e6,
    l1_latency=40.0,
    l1_bytes=192 * 1024,  # of 256 KiB, less what is shared memory
    shared_latency=29.0,
    launch=2000.0,
)
DEVICES = (H100, H200)

REGISTERS, THREADS, WARPS, PROGRAMS = 65_536, 2_048, 64, 32
"""Of a multiprocessor, and the most resident on it (CUDA programming guide, compute capability 9.0)."""
SHARED, SHARED_OF_A_PROGRAM = 233_472, 1_024
"""Bytes of shared memory for programs together, and what each takes beside its own (the same)."""


def resident(warps: int, registers: int, shared: int) -> int:
    """How many programs run on a multiprocessor at a time. registers: of a thread; they are allotted to warps by 256."""
    of_a_warp = -(-32 * registers // 256) * 256
    by_registers = (REGISTERS // 4 // of_a_warp) * 4 // warps if warps >= 4 else REGISTERS // of_a_warp // warps
    return max(1, min(PROGRAMS, WARPS // warps, by_registers, SHARED // (shared + SHARED_OF_A_PROGRAM)))
