"""M^T M times two vectors, the plan of more than 256 lines being read once; M and the deflation as in ``spectrum/lanczos.py``.

X_ij = P_ij - r_i w_j, w = P^T 1 / R, is formed by a fused multiply-add, so that a plan next to the uniform one keeps its
digits. For a direction y = diag(c)^-1/2 v, v orthogonal to p,

    t = diag(r)^-1 X y,   X^T t = diag(c)^1/2 M^T M v up to a multiple of c,   diag(r)^1/2 t = M v up to a multiple of q:

those multiples are what the rounding of w leaves, and the caller takes them out. As in a sweep, the row sums t of a block are
complete before the same entries, in registers, are added to the column sums; a program leaves one partial sum per column and
vector, and another kernel adds them in one order. More than two vectors at once do not fit into registers beside the rows.

WIDE: a row is walked in chunks of BLOCK_M twice, the second time from L2, and the column sums are added up in memory.
"""

import triton
import triton.language as tl

from ..common.configuration import finite_jit
from ..spectrum.lanczos import less_outer
from ..spectrum.squaring import inverse_or_zero
from .lines import load_block, load_vector, store_vector
from .sweep import column_sums


@triton.jit
def deflated_block(plan, rows, cols, end, r, w, ALIGNED: tl.constexpr):
    """X of whole rows, or of a chunk of their columns."""
    plan_ptr, stride_n, m = plan
    return less_outer(load_block(plan_ptr, stride_n, rows, cols, end, m, 0.0, ALIGNED).to(tl.float32), r, w)


@finite_jit
def _sigma2_stream_gram_fwd_kernel(
    plan_ptr,
    row_ptr,
    means_ptr,
    direction_ptr,
    left_ptr,
    partial_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    n: tl.int32,
    m: tl.int32,
    width: tl.int32,
    lines: tl.int32,
    blocks: tl.int32,
    has_left: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, first = program // blocks, (program % blocks).to(tl.int32) * lines
    end = tl.minimum(first + lines, n)
    plan = (plan_ptr + b * stride_b, stride_n, m)
    means_at = means_ptr + b * width
    first_at = direction_ptr + b * 2 * width
    second_at = first_at + width
    partial_at = partial_ptr + program * 2 * width
    cols = tl.arange(0, BLOCK_M)
    if not WIDE:
        w = load_vector(means_at, cols, width, 0.0)
        y_first = load_vector(first_at, cols, width, 0.0)
        y_second = load_vector(second_at, cols, width, 0.0)
        sums_first = tl.zeros([BLOCK_M], tl.float32)
        sums_second = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        r = tl.load(row_ptr + b * n + rows, mask=rows < end, other=0.0)
        if WIDE:
            t_first = tl.zeros([ROWS], tl.float32)
            t_second = tl.zeros([ROWS], tl.float32)
            for first_col in range(0, m, BLOCK_M):
                chunk = first_col + cols
                x = deflated_block(plan, rows, chunk, end, r, load_vector(means_at, chunk, width, 0.0), ALIGNED)
                t_first += tl.sum(x * load_vector(first_at, chunk, width, 0.0)[None, :], axis=1)
                t_second += tl.sum(x * load_vector(second_at, chunk, width, 0.0)[None, :], axis=1)
        else:
            x = deflated_block(plan, rows, cols, end, r, w, ALIGNED)
            t_first = tl.sum(x * y_first[None, :], axis=1)
            t_second = tl.sum(x * y_second[None, :], axis=1)
        t_first *= inverse_or_zero(r)
        t_second *= inverse_or_zero(r)
        if WIDE:
            for first_col in range(0, m, BLOCK_M):
                chunk = first_col + cols
                x = deflated_block(plan, rows, chunk, end, r, load_vector(means_at, chunk, width, 0.0), ALIGNED)
                before = tl.where(start > first, width, 0)
                sums = load_vector(partial_at, chunk, before, 0.0) + tl.sum(x * t_first[:, None], axis=0)
                store_vector(partial_at, chunk, width, sums)
                sums = load_vector(partial_at + width, chunk, before, 0.0) + tl.sum(x * t_second[:, None], axis=0)
                store_vector(partial_at + width, chunk, width, sums)
        else:
            sums_first += tl.sum(x * t_first[:, None], axis=0)
            sums_second += tl.sum(x * t_second[:, None], axis=0)
        tl.store(left_ptr + b * n + rows, tl.sqrt(r) * t_first, mask=(rows < end) & (has_left != 0))
        if WIDE:
            tl.debug_barrier()
    if not WIDE:
        store_vector(partial_at, cols, width, sums_first)
        store_vector(partial_at + width, cols, width, sums_second)


@finite_jit
def _sigma2_stream_reduce_fwd_kernel(
    partial_ptr,
    product_ptr,
    width: tl.int32,
    blocks: tl.int32,
    chunks: tl.int32,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The sums over partial sums; ``width`` that of both vectors together."""
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, (program % chunks).to(tl.int32)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    sums = column_sums(partial_ptr, b, cols, width, blocks, PARTS)
    tl.store(product_ptr + b * width + cols, sums, mask=cols < width)
