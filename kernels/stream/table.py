"""What the stream family can launch, and the numbers that decide it."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..common.configuration import Configuration
from .adjoint import _sinkhorn_stream_adjoint_bwd_kernel, _sinkhorn_stream_reduce_bwd_kernel
from .apply import _sinkhorn_stream_plan_fwd_kernel
from .gradient import _sinkhorn_stream_gradient_bwd_kernel
from .gram import _sigma2_stream_gram_fwd_kernel, _sigma2_stream_reduce_fwd_kernel
from .start import _sinkhorn_stream_columns_fwd_kernel, _sinkhorn_stream_masses_fwd_kernel, _sinkhorn_stream_start_fwd_kernel
from .sweep import _sinkhorn_stream_reduce_fwd_kernel, _sinkhorn_stream_sweep_fwd_kernel

ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# By the columns that whole rows are padded to: rows held at once and warps, for 16 or 32 logits in the registers of a thread.
# Found by compiling for sm_80, sm_90 and sm_100: none spills, those of 8 warps within the 128 registers that let two of them
# onto an SM.
ROWS = {256: (16, 4), 512: (8, 4), 1024: (4, 4), 2048: (4, 8), 4096: (2, 8), 8192: (1, 16)}
# The longest rows fill an SM: one in registers, and the next two on their way to shared memory while it is added up. That
# takes a sweep on an H100 from 117 to 104 us; shorter ones hide their loads behind those of another program, and lose by it.
PIPELINED, STAGES = {8192: (1, 8)}, 3
# Longer rows are walked in chunks of 2048, four at once: what a program reads twice is still in L2 the second time.
WIDE_ROWS, WIDE_BLOCK_M, WIDE_WARPS = 4, 2048, 8
# Rows that do not start on 16 bytes take an address for each entry: fewer, by share of the rows and columns, where it spills;
# at 4096 columns that alone is not enough, and they take the registers of two programs.
PLAIN_ROWS = {(1, 4096): 1, (2, 0): 1}
# Of aligned rows only these, on sm_90: kernel, element, columns.
SPILLING = {(_sinkhorn_stream_sweep_fwd_kernel, element, 4096) for element in ("fp16", "bf16")}
# Of the longest rows a program of these takes the registers of a whole SM, pipelined or not: two vectors and two sums for each
# column; a sweep of rows that do not start on 16 bytes, which spills otherwise.
ALONE = {_sigma2_stream_gram_fwd_kernel, _sinkhorn_stream_sweep_fwd_kernel}
# The first column step needs no whole rows.
START_ROWS, START_BLOCK_M, START_WARPS = 8, 512, 4
# A program of a reduction adds CHUNK columns, PARTS partial sums at once; there are at most MAX_PARTS of each.
CHUNK, PARTS, MAX_PARTS = 128, 32, 256
# A tile of what is done entry by entry: 128 entries along the contiguous axis are what one warp loads at once. The gradient
# keeps the cotangent and a weight beside the logits, in half as many rows.
PLAN_BLOCK_0, GRADIENT_BLOCK_0, BLOCK_1, TILE_WARPS = 32, 16, 128, 8
_MATRICES = ("logits_ptr", "plan_ptr", "grad_plan_ptr", "grad_logits_ptr")


def _configuration(kernel: Any, element: str, num_warps: int, maxnreg: int, label: str, **constants: Any) -> Configuration:
    """The one way to run ``kernel`` on matrices of ``element``."""
    types = {"sweeps_ptr": "i32", "done_ptr": "i32"} | dict.fromkeys(_MATRICES, element)
    pointers = {name: types.get(name, "fp32") for name in kernel.arg_names if name.endswith("_ptr")}
    return Configuration(kernel, pointers, constants, num_warps, matrices=1, maxnreg=maxnreg, label=label)


def _lines(
    kernel: Any, share: int = 1, beside: str = "", **constants: Any
) -> dict[tuple[torch.dtype, int, bool], Configuration]:
    """``kernel`` on whole rows by dtype, padded columns (0: any number) and alignment; 1 / ``share`` as many rows at once,
    ``beside`` something else."""
    found = {}
    for (dtype, element), aligned in itertools.product(ELEMENTS.items(), (True, False)):
        alone = PIPELINED if aligned or kernel in ALONE else {}
        for block_m, (rows, warps) in {**ROWS, **alone, 0: (WIDE_ROWS, WIDE_WARPS)}.items():
            found[dtype, block_m, aligned] = _configuration(
                kernel,
                element,
                warps,
                255 if warps == 4 or block_m in alone or (not aligned and block_m == 4096) else 128,
                f"{element} {block_m or 'wide'} {'aligned' if aligned else 'plain'}{beside}",
                ROWS=_rows(kernel, element, share, block_m, rows, aligned),
                BLOCK_M=block_m or WIDE_BLOCK_M,
                WIDE=block_m == 0,
                ALIGNED=aligned,
                STAGES=STAGES if aligned and block_m in alone else 1,
                **constants,
            )
    return found


def _rows(kernel: Any, element: str, share: int, block_m: int, rows: int, aligned: bool) -> int:
    """Rows that a program holds at once."""
    if aligned:
        return 1 if (kernel, element, block_m) in SPILLING else max(rows // share, 1)
    return PLAIN_ROWS.get((share, block_m), max(rows // share, 1))


def _tiles(kernel: Any, block_0: int) -> dict[tuple[torch.dtype, bool, bool], Configuration]:
    """``kernel`` entry by entry, by dtype, alignment and whether the contiguous axis is that of the rows."""
    return {
        (dtype, aligned, transposed): _configuration(
            kernel,
            element,
            TILE_WARPS,
            128 if aligned else 255,
            f"{element} {'aligned' if aligned else 'strided'}{' transposed' * transposed}",
            BLOCK_0=block_0,
            BLOCK_1=BLOCK_1,
            ALIGNED=aligned,
            TRANSPOSED=transposed,
        )
        for (dtype, element), aligned, transposed in itertools.product(ELEMENTS.items(), (True, False), (True, False))
    }


START = {
    (dtype, aligned): _configuration(
        _sinkhorn_stream_start_fwd_kernel,
        element,
        START_WARPS,
        255,
        f"{element} {'aligned' if aligned else 'plain'}",
        ROWS=START_ROWS,
        BLOCK_M=START_BLOCK_M,
        ALIGNED=aligned,
    )
    for (dtype, element), aligned in itertools.product(ELEMENTS.items(), (True, False))
}
COLUMNS = _configuration(_sinkhorn_stream_columns_fwd_kernel, "fp32", 4, 255, "", PARTS=PARTS, CHUNK=CHUNK)
MASSES = _configuration(_sinkhorn_stream_masses_fwd_kernel, "fp32", 4, 255, "", CHUNK=CHUNK)
SWEEP = _lines(_sinkhorn_stream_sweep_fwd_kernel)
REDUCE = _configuration(_sinkhorn_stream_reduce_fwd_kernel, "fp32", 4, 255, "", PARTS=PARTS, CHUNK=CHUNK)
PLAN = _tiles(_sinkhorn_stream_plan_fwd_kernel, PLAN_BLOCK_0)
# Beside the cotangent, or a second vector, there is room for half as many entries.
COTANGENT = _lines(_sinkhorn_stream_adjoint_bwd_kernel, 2, " cotangent", COTANGENT=True)
ADJOINT = _lines(_sinkhorn_stream_adjoint_bwd_kernel, COTANGENT=False)
REDUCE_ADJOINT = _configuration(_sinkhorn_stream_reduce_bwd_kernel, "fp32", 4, 255, "", PARTS=PARTS, CHUNK=CHUNK)
GRAM = _lines(_sigma2_stream_gram_fwd_kernel, 2)
REDUCE_GRAM = _configuration(_sigma2_stream_reduce_fwd_kernel, "fp32", 4, 255, "", PARTS=PARTS, CHUNK=CHUNK)
GRADIENT = _tiles(_sinkhorn_stream_gradient_bwd_kernel, GRADIENT_BLOCK_0)


def configurations() -> list[Configuration]:
    """Every kernel of this family that can be launched."""
    tables = (START, SWEEP, PLAN, COTANGENT, ADJOINT, GRADIENT, GRAM)
    return [COLUMNS, MASSES, REDUCE, REDUCE_ADJOINT, REDUCE_GRAM, *(x for table in tables for x in table.values())]
