"""The exact backward of 5x5 to 8x8 matrices in the register family, one thread a matrix, whose history lies in memory.

As ``backward.py``, with any number of sweeps, in segments with a K of their own, as in the forward. Factors are those of their
segment: where one is left for the segment before, what K * W has gathered is put aside, K is made anew from its G, and a
= u df takes the u that the segment before ended with in place of the one that this one began with.

A program walks over blocks of matrices and uses its history again: lines of BLOCK values, u before and v after each sweep,
then G of each segment. A thread reads what it has written itself, here and where matrices are put aside.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, quotient, reciprocal
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from .backward import add_sweep, begin
from .memory import load_line, store_line
from .packed import load_again, load_packed, store_packed
from .shared import workspace_of
from .sweeps import (
    SWEEPS_OF_8,
    columns_first,
    excluded_columns,
    first_factors,
    lifted,
    lifted_again,
    ones,
    plus,
    poison,
    products,
    rebased,
    row_factors,
    scaled,
    scaling_sweep,
    sums_over_cols,
    valid_lines,
    zeros,
)


@finite_jit
def _sinkhorn_history_bwd_kernel(
    logits_ptr, temperature_ptr, grad_plan_ptr, grad_logits_ptr, history_ptr, aside_ptr,
    batch: tl.int64, n_iters: tl.int32, history_stride: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_temperature: tl.int32, unit_rows: tl.int32,
    BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """grad_logits = dS / temperature; history: ``history_stride`` values to a program, aside: BLOCK matrices."""
    SEGMENT: tl.constexpr = SWEEPS_OF_8
    own = history_ptr + (tl.program_id(0).to(tl.int64) * history_stride + tl.arange(0, BLOCK))
    sweeps = tl.maximum(n_iters, 1)  # without any, one from u = 0
    segments = tl.cdiv(sweeps, SEGMENT)
    bases = own + BLOCK * (2 * LINES * sweeps)
    aside = aside_ptr + (tl.program_id(0).to(tl.int64) * (BLOCK * LINES * LINES) + tl.arange(0, BLOCK))
    everywhere = tl.full([BLOCK], 1, tl.int1)
    workspace = workspace_of(logits_ptr, BLOCK, LINES)
    blocks = tl.cdiv(batch, BLOCK).to(tl.int32)
    block = tl.program_id(0)
    while block < blocks:
        start = block.to(tl.int64) * BLOCK
        matrix = start + tl.arange(0, BLOCK)
        live = matrix < batch
        matrix = tl.minimum(matrix, batch - 1)
        tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
        k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
        x = load_packed(logits_ptr, start, batch, workspace, LINES)
        kappa = k * (1.0 / UNIT)
        kappa_columns = tl.where(n_iters == 0, 0.0, kappa)
        G, _high = columns_first(x, kappa_columns, LINES)
        K, phi, G, near, all_near, spare_row = lifted(x, kappa, kappa_columns, G, zeros(k, LINES))
        spare_col = excluded_columns(G)
        rows = valid_lines(spare_row)
        cols = valid_lines(spare_col)
        r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows))
        u, spare_col = first_factors(phi, spare_col, n_iters)
        v = ones(k, LINES)
        for first in range(0, sweeps, SEGMENT):
            if first > 0:
                G, v = rebased(G, v)
                x_again = load_again(logits_ptr, start, batch, workspace, LINES)
                K, _phi, _spare_row = lifted_again(x_again, kappa, kappa, G, near, all_near)
                u = row_factors(K, v, spare_row)
            store_line(bases + BLOCK * (LINES * (first // SEGMENT)), BLOCK, everywhere, LINES, G)
            for slot in range(first, tl.minimum(first + SEGMENT, sweeps)):
                past_u = u
                u, v = scaling_sweep(K, u, spare_row, spare_col, False)
                store_line(own + BLOCK * (2 * LINES * slot), BLOCK, everywhere, 2 * LINES, past_u + v)
        r += poison(u)  # without sweeps a NaN has reached its row only

        D = load_packed(grad_plan_ptr, start, batch, workspace, LINES)
        used = []  # excluded entries may hold anything
        for e in tl.static_range(LINES * LINES):
            used = used + [tl.where(K[e] == 0.0, 0.0, D[e])]
        W = scaled([-r * value for value in u], used, v)
        a, dg = begin(K, W, u)
        for back in range(segments):
            first = (segments - 1 - back) * SEGMENT
            if back > 0:
                gathered = products(K, W)
                if back > 1:
                    gathered = plus(gathered, load_line(aside, BLOCK, everywhere, LINES * LINES, LINES * LINES))
                store_line(aside, BLOCK, everywhere, LINES * LINES, gathered)
                x_then = load_packed(logits_ptr, start, batch, workspace, LINES)
                G_then = load_line(bases + BLOCK * (LINES * (segments - 1 - back)), BLOCK, everywhere, LINES, LINES)
                K, _phi, _spare_row = lifted_again(x_then, kappa, kappa_columns, G_then, near, all_near)
                border = own + BLOCK * (2 * LINES * (first + SEGMENT) - LINES)
                factors = load_line(border, BLOCK, everywhere, 2 * LINES, 2 * LINES)  # v before, u behind
                inverse_u = products(sums_over_cols(K, factors[0:LINES], spare_row), factors[LINES : 2 * LINES])
                a = products(a, [reciprocal(value) for value in inverse_u])
                W = zeros(k, LINES * LINES)
            last = tl.minimum(first + SEGMENT, sweeps) - 1
            for past in range(last + 1 - first):
                factors = load_line(own + BLOCK * (2 * LINES * (last - past)), BLOCK, everywhere, 2 * LINES, 2 * LINES)
                W, a = add_sweep(W, K, a, dg, factors[0:LINES], factors[LINES : 2 * LINES])
                dg = zeros(k, LINES)
        dS = products(K, W)
        if segments > 1:
            dS = plus(dS, load_line(aside, BLOCK, everywhere, LINES * LINES, LINES * LINES))
        store_packed(grad_logits_ptr, start, batch, [k * -LN_2 * value for value in dS], workspace, LINES)
        block += tl.num_programs(0)
