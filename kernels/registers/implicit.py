"""The implicit gradient in the register family: one thread, one matrix of up to 8x8, from the column potential.

As ``fastdsm/pytorch/implicit.py``: a Newton step from g where its residual is below PURE_BELOW, then the adjoint at that
plan. With row sums 1, c = R / C and the cotangent D (the plan's factor r is put in the end) it reads

    (H + diag(ground)) beta = b,   b_j = sum_i P_ij (D_ij - sum_k P_ik D_ik),   Y = D - 1 beta^T,
    dS_ij = P_ij (Y_ij - sum_k P_ik Y_ik).

Both differences are taken pair by pair, as the rows sum to 1:

    b_j = sum_ik P_ij P_ik (D_ij - D_ik),   dS_ij = sum_k P_ij P_ik (Y_ij - Y_ik).

What a pair gives to j it takes from k: rows of dS sum to 0 to the rounding of dS, not of D, which close to a permutation is
far larger. Where an edge w_jk is below rounding, beta_j - beta_k would be some rounding of b over w_jk: harmless across the
edge, times P_ij P_ik <= w_jk, but as large a beta on both ends of another edge drowns their difference. A ground of one
rounding of c keeps beta at the size of b, and moves what is known by no more than rounding does.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, LOG2_E, exp2, quotient, reciprocal
from ..common.bases import UNIT, fused
from ..common.configuration import finite_jit
from ..common.newton_rules import PURE_BELOW
from .memory import load_line, load_logits, load_strided, store_strided
from .newton import direction, edges, missing, scaled_plan, shares, solve, ties
from .packed import load_packed, store_packed
from .shared import workspace_of
from .sweeps import columns_first, excluded_columns, lifted, nearest, plus, valid_lines

_ROUNDING = tl.constexpr(2.0**-24)


@triton.jit
def _net(flow):
    """What each column gains by flow[j][k - j - 1] from k to j, j < k."""
    LAST: tl.constexpr = len(flow)
    net = []
    for j in tl.static_range(LAST):
        total = flow[j][0]
        for k in tl.static_range(1, LAST - j):
            total += flow[j][k]
        for i in tl.static_range(j):
            total -= flow[i][j - i - 1]
        net = net + [total]
    total = -flow[0][LAST - 1]
    for i in tl.static_range(1, LAST):
        total -= flow[i][LAST - i - 1]
    return net + [total]


@triton.jit
def _flows(P, D, FIRST: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr):
    """sum_k P_ij P_ik (D_ij - D_ik), summed over the rows from FIRST to before LAST: one value for each column."""
    flow = []
    for j in tl.static_range(LINES - 1):
        from_later = []
        for k in tl.static_range(j + 1, LINES):
            pair = (D[LINES * FIRST + j] - D[LINES * FIRST + k]) * P[LINES * FIRST + j] * P[LINES * FIRST + k]
            for i in tl.static_range(FIRST + 1, LAST):
                pair += (D[LINES * i + j] - D[LINES * i + k]) * P[LINES * i + j] * P[LINES * i + k]
            from_later = from_later + [pair]
        flow = flow + [from_later]
    return _net(flow)


@triton.jit
def _beside(g, G):
    """What a column potential has beside its base: integers, in units, and factors as a share of the last one."""
    shift = []
    v = []
    for j in tl.static_range(len(g)):
        moved = fused(tl.where(tl.abs(g[j]) < float("inf"), g[j], 0.0), LOG2_E / UNIT, -G[j]) * UNIT
        integer = nearest(moved)
        shift = shift + [integer * (1.0 / UNIT)]
        v = v + [exp2(moved - integer)]
    last = reciprocal(v[len(g) - 1])
    return shift, [value * last for value in v[0 : len(g) - 1]]


@finite_jit
def _implicit_bwd_kernel(
    logits_ptr, mask_ptr, temperature_ptr, g_ptr, grad_plan_ptr, grad_logits_ptr,
    batch: tl.int64, n: tl.int32, m: tl.int32,
    logits_stride_b: tl.int64, logits_stride_n: tl.int64, logits_stride_m: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, mask_stride_m: tl.int64,
    grad_plan_stride_b: tl.int64, grad_plan_stride_n: tl.int64, grad_plan_stride_m: tl.int64,
    grad_logits_stride_b: tl.int64, grad_logits_stride_n: tl.int64, grad_logits_stride_m: tl.int64,
    g_stride_b: tl.int64, g_stride_m: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_mask: tl.int32, has_temperature: tl.int32, unit_rows: tl.int32,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """grad_logits = dS / temperature, at the fixed point near the column potential g."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    matrix = first + tl.arange(0, BLOCK)
    live = matrix < batch
    matrix = tl.minimum(matrix, batch - 1)
    workspace = workspace_of(logits_ptr, BLOCK, LINES)
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, first, batch, workspace, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, LINES,
    )  # fmt: skip
    sound = live
    for e in tl.static_range(LINES * LINES):
        sound &= x[e] < float("inf")
    factor = tl.where(sound, LN_2 * k, float("nan"))
    k = tl.where(sound, k, 0.0)
    x = [tl.where(sound, value, 0.0) for value in x]
    kappa = k * (1.0 / UNIT)

    g = load_line(g_ptr + matrix * g_stride_b, g_stride_m, live, m, LINES)
    G, _high = columns_first(x, kappa, LINES)
    spare_col = excluded_columns(G)
    shift, v = _beside(g, G)
    K, _phi, _G, _near, _all_near, spare_row = lifted(x, kappa, kappa, plus(G, shift), shift)
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    c = quotient(rows, cols)
    inverse_c = quotient(cols, rows)
    share = shares(c, spare_col)
    tie = ties(spare_col)

    P, _t = scaled_plan(K, v, spare_row)
    b, residual = missing(P, share)
    residual *= inverse_c
    d = direction(P, b, residual, share, rows, tie)
    length = tl.where(residual < PURE_BELOW, LOG2_E, 0.0)
    P, _t = scaled_plan(P, [exp2(length * value) for value in d], spare_row)

    if PACKED:
        D = load_packed(grad_plan_ptr, first, batch, workspace, LINES)
        if LINES > 4:  # read again, as there are no registers to keep it in
            x = load_packed(logits_ptr, first, batch, workspace, LINES)
    else:
        D = load_strided(grad_plan_ptr, matrix, live, n, m, grad_plan_stride_b, grad_plan_stride_n, grad_plan_stride_m, 0.0)
    used = []
    for e in tl.static_range(LINES * LINES):
        used = used + [tl.where(x[e] == float("-inf"), 0.0, D[e].to(tl.float32))]
    D = used
    beta = solve(edges(P, share, _ROUNDING, rows), _flows(P, D, 0, LINES, LINES), tie)
    Y = []
    for e in tl.static_range(LINES * LINES):
        if e % LINES == LINES - 1:
            Y = Y + [D[e]]
        else:
            Y = Y + [D[e] - beta[e % LINES]]
    factor *= tl.where(unit_rows != 0, 1.0, inverse_c)
    dS = []
    for i in tl.static_range(LINES):
        dS = dS + [factor * value for value in _flows(P, Y, i, i + 1, LINES)]
    if PACKED:
        store_packed(grad_logits_ptr, first, batch, dS, workspace, LINES)
    else:
        store_strided(grad_logits_ptr, matrix, live, n, m, grad_logits_stride_b, grad_logits_stride_n, grad_logits_stride_m, dS)
