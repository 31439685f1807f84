"""The exact backward of 8x8 matrices in the register family, one thread a matrix, whose history lies in memory.

As ``registers_backward.py``, with any number of sweeps. These are the first one, in the log domain, and segments of scaling
sweeps, each of which begins with u = v = 1 and a K of its own, as in the forward. Factors are those of their segment: where
one is left for the segment before, what K * W has gathered is put aside, K is made anew from its g, and a = u df takes the u
that the segment before ended with in place of 1.

A program walks over blocks of matrices and uses its history again: lines of BLOCK values, u before and v after each scaling
sweep, then g of each segment. A thread reads what it has written itself, here and where matrices are put aside.
"""

import triton
import triton.language as tl

from .arithmetic import LN_2, quotient, reciprocal
from .configuration import finite_jit
from .memory import load_entries, store_entries
from .registers_backward import add_first_sweep, add_sweep, begin
from .registers_forward import log2_count, log2_factors
from .registers_memory import load_packed, stacked, store_packed, vectors
from .registers_sweeps import (
    SCALINGS_OF_8,
    first_columns,
    ones,
    poison,
    row_step,
    scaled,
    scaling_sweep,
    sums_over_cols,
    valid_lines,
    zeros,
)
from .tile_sweeps import unrelated


@triton.jit
def _lines(ptr, line, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers (COUNT, BLOCK) to lines of a history; the compiler is not to know that threads may change places."""
    return ptr + ((line + tl.arange(0, COUNT))[:, None] * BLOCK + unrelated(tl.arange(0, BLOCK))[None, :])


@triton.jit
def _keep(ptr, line, values, BLOCK: tl.constexpr):
    store_entries(_lines(ptr, line, len(values), BLOCK), stacked(values), tl.full([1, 1], True, tl.int1))


@triton.jit
def _kept(ptr, line, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    return vectors(load_entries(_lines(ptr, line, COUNT, BLOCK), tl.full([1, 1], True, tl.int1), 0.0))


@triton.jit
def _products(x, y):
    values = []
    for e in tl.static_range(len(x)):
        values = values + [x[e] * y[e]]
    return values


@triton.jit
def _sums(x, y):
    values = []
    for e in tl.static_range(len(x)):
        values = values + [x[e] + y[e]]
    return values


@finite_jit
def _sinkhorn_history_bwd_kernel(
    logits_ptr, temperature_ptr, grad_plan_ptr, grad_logits_ptr, history_ptr, aside_ptr,
    batch: tl.int64, n_iters: tl.int32, history_stride: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_temperature: tl.int32, unit_rows: tl.int32,
    BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """grad_logits = dS / temperature; history: ``history_stride`` values to a program, aside: BLOCK matrices."""
    SEGMENT: tl.constexpr = SCALINGS_OF_8
    own = history_ptr + tl.program_id(0).to(tl.int64) * history_stride
    segments = tl.cdiv(n_iters - 1, SEGMENT)
    g_lines = 2 * LINES * (n_iters - 1)
    room = tl.num_programs(0).to(tl.int64) * BLOCK
    blocks = tl.cdiv(batch, BLOCK).to(tl.int32)
    block = tl.program_id(0)
    while block < blocks:
        matrix = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = matrix < batch
        tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
        k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
        x = load_packed(logits_ptr, block, batch, BLOCK, LINES)
        g, spare_col = first_columns(x, k, n_iters, LINES)
        x = load_packed(logits_ptr, block, batch, BLOCK, LINES)
        K, f, total, spare_row = row_step(x, k, g)
        rows = valid_lines(spare_row)
        cols = valid_lines(spare_col)
        r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows)) + poison(total)
        col_halves, col_rest = log2_count(cols, LINES)
        row_halves, row_rest = log2_count(rows, LINES)
        drift = (col_halves - row_halves) + (col_rest - row_rest)
        u = ones(k, LINES)
        v = ones(k, LINES)
        for first in range(0, n_iters - 1, SEGMENT):
            if first > 0:
                g = _sums(g, log2_factors(v, -tl.minimum(n_iters - 1, SEGMENT), drift))
                x_again = load_packed(logits_ptr, block, batch, BLOCK, LINES)
                K, f, _again, _spare = row_step(x_again, k, g)
                u = ones(k, LINES)
                v = ones(k, LINES)
            _keep(own, g_lines + LINES * (first // SEGMENT), g, BLOCK)
            for slot in range(first, tl.minimum(first + SEGMENT, n_iters - 1)):
                past_u = u
                u, v = scaling_sweep(K, u, spare_row, spare_col, False)
                _keep(own, 2 * LINES * slot, past_u + v, BLOCK)

        D = load_packed(grad_plan_ptr, block, batch, BLOCK, LINES)
        used = []
        for e in tl.static_range(LINES * LINES):
            used = used + [tl.where(K[e] == 0.0, 0.0, D[e])]
        W = scaled([-r * value for value in u], used, v)
        a, dg = begin(K, W, u)
        for back in range(segments):
            first = (segments - 1 - back) * SEGMENT
            if back > 0:
                aside = load_packed(aside_ptr, tl.program_id(0), tl.where(back > 1, room, 0), BLOCK, LINES)
                store_packed(aside_ptr, tl.program_id(0), room, _sums(_products(K, W), aside), BLOCK, LINES)
                g_again = _kept(own, g_lines + LINES * (segments - 1 - back), LINES, BLOCK)
                x_then = load_packed(logits_ptr, block, batch, BLOCK, LINES)
                K, f, _then, _spares = row_step(x_then, k, g_again)
                ended = _kept(own, 2 * LINES * (first + SEGMENT) - LINES, LINES, BLOCK)
                a = _products(a, [reciprocal(value) for value in sums_over_cols(K, ended, spare_row)])
                W = zeros(k, LINES * LINES)
            last = tl.minimum(first + SEGMENT, n_iters - 1) - 1
            for past in range(last + 1 - first):
                factors = _kept(own, 2 * LINES * (last - past), 2 * LINES, BLOCK)
                W, a = add_sweep(W, K, a, dg, factors[0:LINES], factors[LINES : 2 * LINES])
                dg = zeros(k, LINES)
        W = add_first_sweep(W, K, f, a, dg, spare_col, n_iters)
        aside = load_packed(aside_ptr, tl.program_id(0), tl.where(segments > 1, room, 0), BLOCK, LINES)
        dS = _sums(_products(K, W), aside)
        store_packed(grad_logits_ptr, block, batch, [k * -LN_2 * value for value in dS], BLOCK, LINES)
        block += tl.num_programs(0)
