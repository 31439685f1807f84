"""The implicit gradient in the register family: one thread, one matrix of up to 4x4, from the column potential alone.

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

from .arithmetic import LN_2, LOG2_E, exp2, quotient
from .configuration import finite_jit
from .newton_rules import PURE_BELOW
from .registers_forward import load_logits
from .registers_newton import direction, edges, missing, scaled_plan, shares, solve, ties
from .registers_sweeps import (
    load_packed,
    load_strided,
    log_kernel,
    max4,
    ones,
    store_packed,
    store_strided,
    valid_lines,
)

_ROUNDING = tl.constexpr(2.0**-24)


@triton.jit
def _flow(P, D, j: tl.constexpr, k: tl.constexpr):
    """sum_i P_ij P_ik (D_ij - D_ik)."""
    flow = P[j] * P[k] * (D[j] - D[k])
    for i in tl.static_range(1, 4):
        flow += P[4 * i + j] * P[4 * i + k] * (D[4 * i + j] - D[4 * i + k])
    return flow


@triton.jit
def _flows(P, D):
    """sum_ik P_ij P_ik (D_ij - D_ik): one value for each column."""
    f01 = _flow(P, D, 0, 1)
    f02 = _flow(P, D, 0, 2)
    f03 = _flow(P, D, 0, 3)
    f12 = _flow(P, D, 1, 2)
    f13 = _flow(P, D, 1, 3)
    f23 = _flow(P, D, 2, 3)
    return [f01 + f02 + f03, f12 + f13 - f01, f23 - f02 - f12, -f03 - f13 - f23]


@triton.jit
def _row_gradient(P, Y, i: tl.constexpr):
    """P_ij sum_k P_ik (Y_ij - Y_ik) of row i: four entries."""
    p0, p1, p2, p3 = P[4 * i], P[4 * i + 1], P[4 * i + 2], P[4 * i + 3]
    y0, y1, y2, y3 = Y[4 * i], Y[4 * i + 1], Y[4 * i + 2], Y[4 * i + 3]
    f01 = p0 * p1 * (y0 - y1)
    f02 = p0 * p2 * (y0 - y2)
    f03 = p0 * p3 * (y0 - y3)
    f12 = p1 * p2 * (y1 - y2)
    f13 = p1 * p3 * (y1 - y3)
    f23 = p2 * p3 * (y2 - y3)
    return (f01 + f02 + f03, f12 + f13 - f01, f23 - f02 - f12, -f03 - f13 - f23)


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
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """grad_logits = dS / temperature, at the fixed point near the column potential g."""
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = matrix < batch
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, matrix, live, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, BLOCK,
    )  # fmt: skip
    sound = live
    for e in tl.static_range(16):
        sound &= x[e] * k < float("inf")
    factor = tl.where(sound, LN_2 * k, float("nan"))
    k = tl.where(sound, k, 0.0)
    x = [tl.where(sound, value, 0.0) for value in x]
    spare_col = [tl.where(max4(x[j], x[4 + j], x[8 + j], x[12 + j]) == float("-inf"), 1.0, 0.0) for j in (0, 1, 2, 3)]

    start = g_ptr + matrix * g_stride_b
    g = [tl.load(start + j * g_stride_m, mask=live & (j < m), other=0.0) for j in (0, 1, 2, 3)]
    base = [tl.where(tl.abs(value) < float("inf"), LOG2_E * value, 0.0) for value in g]
    K, _high, spare_row = log_kernel(x, k, base)
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    c = quotient(rows, cols)
    inverse_c = quotient(cols, rows)
    share = shares(c, spare_col)
    tie = ties(spare_col)

    P, _t = scaled_plan(K, ones(x[0]), spare_row)
    b, residual = missing(P, share)
    residual *= inverse_c
    d = direction(P, b, residual, share, rows, tie)
    length = tl.where(residual < PURE_BELOW, LOG2_E, 0.0)
    P, _t = scaled_plan(P, [exp2(length * value) for value in d], spare_row)

    if PACKED:
        D = load_packed(grad_plan_ptr, matrix, live, BLOCK)
    else:
        D = load_strided(grad_plan_ptr, matrix, live, n, m, grad_plan_stride_b, grad_plan_stride_n, grad_plan_stride_m, 0.0)
    D = [
        tl.where(x[e] == float("-inf"), 0.0, D[e].to(tl.float32))
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]
    beta = solve(edges(P, share, _ROUNDING, rows), _flows(P, D), tie)
    Y = [D[e] if e % 4 == 3 else D[e] - beta[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    dS = _row_gradient(P, Y, 0) + _row_gradient(P, Y, 1) + _row_gradient(P, Y, 2) + _row_gradient(P, Y, 3)
    factor *= tl.where(unit_rows != 0, 1.0, inverse_c)
    dS = [factor * value for value in dS]
    if PACKED:
        store_packed(grad_logits_ptr, matrix, live, dS, BLOCK)
    else:
        store_strided(grad_logits_ptr, matrix, live, n, m, grad_logits_stride_b, grad_logits_stride_n, grad_logits_stride_m, dS)
