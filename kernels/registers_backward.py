"""The exact backward of the register family: the forward rerun with every factor kept, then the sweeps reversed.

With K, u_t, v_t as in ``registers_sweeps.py`` (marginals left out, P = r u_T K v_T), T sweeps, the cotangent D of P,

    W = -(r u_T D v_T),   df = -(K * W) 1,   dg = -(K * W)^T 1      so that dS = -K * W in the end,

each sweep t = T..1 adds the two rank-one terms of its row step and of its column step. With a = u_t df and y = K^T a,

    row step     W += a v_t^T,       dg -= v_t y
    column step  b = v_t dg,         W += u_(t-1) b^T,     df = -u_(t-1) (K b),     dg = 0,

that is, with z = v_t y - dg,   W_ij += v_j (a_i - u_i z_j),   and for the next sweep a = u_(t-1)^2 (K (v_t z)).
The marginals cancel: A_t (df / r) = u_t K v_t df. For t = 1, v_1 = 1 and u_0 = exp(f_0 - f_1), so that K^T u_0 = 1.
"""

import triton
import triton.language as tl

from .arithmetic import LN_2, exp2, quotient, reciprocal
from .configuration import finite_jit
from .registers_forward import load_logits
from .registers_sweeps import (
    load_packed,
    load_strided,
    log_sweep,
    ones,
    scaling_sweep,
    store_packed,
    store_strided,
    sums_over_cols,
    sums_over_rows,
    valid_lines,
    zeros,
)

MAX_BACKWARD_SWEEPS = 20
_SLOTS = tl.constexpr(MAX_BACKWARD_SWEEPS - 1)


@triton.jit
def _add_steps(W, a, z, past_u, v):
    """W_ij + v_j (a_i - u_i z_j)."""
    return [
        W[e] + v[e % 4] * (a[e // 4] - past_u[e // 4] * z[e % 4])
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]


@finite_jit
def _sinkhorn_bwd_kernel(
    logits_ptr, mask_ptr, temperature_ptr, grad_plan_ptr, grad_logits_ptr,
    batch: tl.int64, n: tl.int32, m: tl.int32, n_iters: tl.int32,
    logits_stride_b: tl.int64, logits_stride_n: tl.int64, logits_stride_m: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, mask_stride_m: tl.int64,
    grad_plan_stride_b: tl.int64, grad_plan_stride_n: tl.int64, grad_plan_stride_m: tl.int64,
    grad_logits_stride_b: tl.int64, grad_logits_stride_n: tl.int64, grad_logits_stride_m: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_mask: tl.int32, has_temperature: tl.int32, unit_rows: tl.int32,
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """grad_logits = dS / temperature."""
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = matrix < batch
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, matrix, live, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, BLOCK,
    )  # fmt: skip
    K, f, _, total, spare_row, spare_col = log_sweep(x, k, x, n_iters, True)
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows)) + 0.0 * (total[0] + total[1] + total[2] + total[3])

    u = ones(K[0])
    v = ones(K[0])
    past_u = []
    past_v = []
    for slot in tl.static_range(_SLOTS):  # the last n_iters - 1 of them run
        past_u = past_u + u
        if slot >= _SLOTS + 1 - n_iters:
            u, v = scaling_sweep(K, u, spare_row, spare_col, False)
        past_v = past_v + v

    if PACKED:
        D = load_packed(grad_plan_ptr, matrix, live, BLOCK)
    else:
        D = load_strided(grad_plan_ptr, matrix, live, n, m, grad_plan_stride_b, grad_plan_stride_n, grad_plan_stride_m, 0.0)
        D = [value.to(tl.float32) for value in D]
    left = [-r * u[i] for i in (0, 1, 2, 3)]
    W = [left[e // 4] * D[e] * v[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    KW = [K[e] * W[e] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    df = sums_over_cols(KW, ones(K[0]), zeros(K[0]))
    a = [-u[i] * df[i] for i in (0, 1, 2, 3)]
    dg = [-value for value in sums_over_rows(KW, ones(K[0]), zeros(K[0]))]
    for slot in tl.static_range(_SLOTS - 1, -1, -1):
        if slot >= _SLOTS + 1 - n_iters:
            u = [past_u[4 * slot + i] for i in (0, 1, 2, 3)]
            v = [past_v[4 * slot + j] for j in (0, 1, 2, 3)]
            y = sums_over_rows(K, a, zeros(K[0]))
            z = [v[j] * y[j] - dg[j] for j in (0, 1, 2, 3)]
            W = _add_steps(W, a, z, u, v)
            Kvz = sums_over_cols(K, [v[j] * z[j] for j in (0, 1, 2, 3)], zeros(K[0]))
            a = [u[i] * u[i] * Kvz[i] for i in (0, 1, 2, 3)]
            dg = zeros(K[0])

    # The log-domain sweep; without sweeps u_0 = 0 leaves its row step alone. Its g may be off by the rounding of large
    # logits, which K with its row sums has forgotten but columns of u_0 K have not: w makes them sum to 1.
    u = [tl.where(n_iters == 0, 0.0, exp2(-f[i])) for i in (0, 1, 2, 3)]
    start = [tl.where(n_iters == 0, 1.0, spare_col[j]) for j in (0, 1, 2, 3)]
    w = [reciprocal(value) for value in sums_over_rows(K, u, start)]
    y = sums_over_rows(K, a, zeros(K[0]))
    z = [w[j] * (y[j] - dg[j]) for j in (0, 1, 2, 3)]
    W = _add_steps(W, a, z, u, ones(K[0]))

    factor = -LN_2 * k
    dS = [factor * K[e] * W[e] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    if PACKED:
        store_packed(grad_logits_ptr, matrix, live, dS, BLOCK)
    else:
        store_strided(grad_logits_ptr, matrix, live, n, m, grad_logits_stride_b, grad_logits_stride_n, grad_logits_stride_m, dS)
