"""grad="implicit" on tiles: the gradient of the fixed point near a column potential, for matrices of up to 64 lines.

As ``fastdsm/pytorch/implicit.py``, in float32: one Newton step first, after sweeps where the potential is so large that its
rounding is felt, then, with D the cotangent of the plan P,

    dS = P * (D - alpha 1^T - 1 beta^T),   alpha = diag(1/r) ((P * D) 1 - P beta),
    (diag(c) - P^T diag(1/r) P) beta = P^T * (D - diag(1/r) (P * D) 1 1^T)^T 1,

the last solved as ``laplacian.py`` says. Close to a permutation dS is small beside D, and alpha_i + beta_j is near
D_ij where P_ij is large: in each row D and beta are therefore taken relative to their values at the row's largest entry.
"""

import triton.language as tl

from ..common.arithmetic import narrow
from ..common.configuration import finite_jit
from ..common.memory import load_entries, store_entries
from ..common.newton_rules import PURE_BELOW, ROUNDING
from .laplacian import inverse_rows, solved
from .newton import direction, folded, judged, ones_of, plan_at, swept, system
from .sweeps import (
    col_sums,
    in_units,
    inverse_temperatures,
    load_logits,
    over_cols,
    over_matrices,
    over_rows,
    places,
    quotient,
    row_maxima,
    row_sums,
    tile_offsets,
    vector_max,
    vector_offsets,
    vector_sum,
)

_LARGE = tl.constexpr(2.0**13)  # nats: potentials are known to a two-thousandth there
_ACCURACY = tl.constexpr(2.0**-21)  # to which conjugate gradients are taken: a few units


@finite_jit
def _implicit_tile_bwd_kernel(
    logits_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    temperature_ptr,
    g_ptr,
    grad_plan_ptr,
    grad_logits_ptr,
    grad_f0_ptr,
    grad_row_ptr,
    grad_col_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    uniform_scalings: tl.int32,
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_m: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_n: tl.int64,
    mask_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    temperature_stride: tl.int64,
    g_stride_b: tl.int64,
    g_stride_m: tl.int64,
    grad_plan_stride_b: tl.int64,
    grad_plan_stride_n: tl.int64,
    grad_plan_stride_m: tl.int64,
    grad_logits_stride_b: tl.int64,
    grad_logits_stride_n: tl.int64,
    grad_logits_stride_m: tl.int64,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_temperature: tl.int32,
    has_vectors: tl.int32,
    unit_rows: tl.int32,
    inverse_temperature: tl.float64,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """BLOCK_B matrices."""
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    r = load_entries(row_ptr + vector_offsets(b, i, row_stride_b, row_stride_n), inside_row & (has_row != 0), 1.0)
    c = load_entries(col_ptr + vector_offsets(b, j, col_stride_b, col_stride_m), inside_col & (has_col != 0), 1.0)
    g = load_entries(g_ptr + vector_offsets(b, j, g_stride_b, g_stride_m), inside_col, 0.0)
    k = inverse_temperatures(temperature_ptr, temperature_stride, b, inside, has_temperature, inverse_temperature).to(dtype)
    x = load_logits(
        logits_ptr,
        stride_b,
        stride_n,
        stride_m,
        mask_ptr,
        mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        has_mask,
        b,
        i,
        j,
        over_rows(inside_row & (r != 0)) & over_cols(inside_col & (c != 0)),
        dtype,
    )
    start = tl.zeros([P // ROWS, BLOCK_B, ROWS], dtype)
    y, G, _, _, r, c, aim, unit, scalings, poison = system(x, k, start, r, c, 1, has_row, has_col, unit_rows, uniform_scalings)
    inverse_r = inverse_rows(r)

    one = ones_of(c)
    base = tl.where(tl.abs(g) < float("inf"), in_units(g) - G, 0.0)
    fine = tl.zeros_like(base)
    rounded = inside & (poison == 0.0) & (vector_max(tl.abs(g)) > _LARGE)
    base = swept(y, base, r, c, aim, rounded, scalings, PURE_BELOW * PURE_BELOW, SEGMENTS)
    plan, L = plan_at(y, one, base, fine, r)
    sums, residual, _ = judged(plan, L, base, fine, r, c, aim)
    step = direction(plan, sums, residual, r, c, aim, m, COLS)
    step = tl.where(over_matrices(residual < PURE_BELOW), step, 0.0)
    base, fine = folded(base, in_units(step))
    plan, _ = plan_at(y, one, base, fine, r)

    used = over_rows(inside_row) & over_cols(inside_col) & (y != -float("inf"))
    grad_plan_at = grad_plan_ptr + tile_offsets(b, i, j, grad_plan_stride_b, grad_plan_stride_n, grad_plan_stride_m)
    D = load_entries(grad_plan_at, used, 0.0).to(dtype)
    largest = plan == over_rows(row_maxima(plan))
    origin = row_maxima(tl.where(largest, D, -float("inf")))
    D -= over_rows(origin)
    alpha = row_sums(plan * D) * inverse_r
    D -= over_rows(alpha)
    beta = solved(plan, col_sums(plan * D), c * ROUNDING, r, c, m, _ACCURACY, COLS)
    beta -= over_matrices(quotient(vector_sum(c * beta), vector_sum(c)))
    own = row_maxima(tl.where(largest, over_cols(beta), -float("inf")))
    apart = over_cols(beta) - over_rows(own)
    lower = row_sums(plan * apart) * inverse_r
    grad = plan * (D + (over_rows(lower) - apart))
    grad = grad * over_rows(over_matrices(unit * k)) + over_rows(over_matrices(poison))

    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    grad_logits_at = grad_logits_ptr + tile_offsets(b, i, j, grad_logits_stride_b, grad_logits_stride_n, grad_logits_stride_m)
    within = over_rows(inside_row) & over_cols(inside_col)
    store_entries(grad_logits_at, narrow(grad, grad_logits_ptr.dtype.element_ty), within)
    if has_vectors != 0:
        at_row, at_col = vector_offsets(b, i, n, 1), vector_offsets(b, j, m, 1)
        marked = over_matrices(unit + poison)
        store_entries(grad_f0_ptr + at_row, tl.zeros_like(r), inside_row)
        store_entries(grad_row_ptr + at_row, r * marked * ((origin + alpha) - (own + lower)), inside_row)
        store_entries(grad_col_ptr + at_col, c * marked * beta, inside_col)
