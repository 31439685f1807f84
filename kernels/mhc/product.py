"""fn vec X and the sum of squares of each token, in partial sums over parts of k = n C: X is read once.

A program takes BLOCK_T tokens and one part; blocks of BLOCK_K channels do not cross streams. fn is float32 and the product
must be as exact (``exact.py``). Tensor cores cut off what they add to a sum, always towards zero; so each block's sum is begun
anew and added to the others by the rounding of float32.
"""

import triton.language as tl

from ..common.configuration import finite_jit
from .exact import exact_product
from .tiles import Strides, load_tile, partly_summed, tokens_from


@finite_jit
def _mhc_product_fwd_kernel(
    X_ptr, fn_ptr, partials_ptr,
    tokens: tl.int64, streams: tl.int32, channels: tl.int32, rows: tl.int32, width: tl.int32, parts: tl.int32,
    blocks_of_part: tl.int32, X_strides: Strides,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partials (parts, tokens, width): sums over a part for each of the ``rows`` of fn, then that of squares."""
    row_blocks = tl.cdiv(rows, BLOCK_D)
    program = tl.program_id(0)
    first_row = (program % row_blocks) * BLOCK_D
    part = (program // row_blocks) % parts
    token, live = tokens_from((program // (row_blocks * parts)).to(tl.int64) * BLOCK_T, tokens, BLOCK_T)
    row = first_row + tl.arange(0, BLOCK_D)
    fn_row = tl.minimum(row, rows - 1).to(tl.int64)
    everywhere = token >= 0
    blocks_of_stream = tl.cdiv(channels, BLOCK_K)
    last = tl.minimum((part + 1) * blocks_of_part, streams * blocks_of_stream)

    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_K // 8], tl.float32)
    for block in range(part * blocks_of_part, last):
        stream = block // blocks_of_stream
        channel = (block % blocks_of_stream) * BLOCK_K
        X_stream_ptr = X_ptr + stream * X_strides.stream
        x = load_tile(X_stream_ptr, X_strides.token, token, everywhere, channel, channels, BLOCK_K)
        fn_stream_ptr = fn_ptr + stream * channels
        w = load_tile(fn_stream_ptr, streams.to(tl.int64) * channels, fn_row, row >= 0, channel, channels, BLOCK_K)
        squares += partly_summed(x.to(tl.float32) * x.to(tl.float32))
        acc += exact_product(x, w)

    start = partials_ptr + (part * tokens + token) * width
    tl.store(start[:, None] + row[None, :], acc, mask=live[:, None] & (row < rows)[None, :])
    if first_row == 0:
        tl.store(start + rows, tl.sum(squares, 1), mask=live)
