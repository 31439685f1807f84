"""The exact backward of the register family: the forward rerun with every factor kept, then the sweeps reversed.

With K, u_t, v_t as in ``sweeps.py`` (marginals left out, P = r u_T K v_T), T sweeps, the cotangent D of P,

    W = -(r u_T D v_T),   df = -(K * W) 1,   dg = -(K * W)^T 1      so that dS = -K * W in the end,

each sweep t = T..1 adds the two rank-one terms of its row step and of its column step. With a = u_t df and y = K^T a,

    row step     W += a v_t^T,       dg -= v_t y
    column step  b = v_t dg,         W += u_(t-1) b^T,     df = -u_(t-1) (K b),     dg = 0,

that is, with z = v_t y - dg,   W_ij += v_j (a_i - u_i z_j),   and for the next sweep a = u_(t-1)^2 (K (v_t z)).
The marginals cancel: A_t (df / r) = u_t K v_t df.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, quotient, reciprocal
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from .memory import load_logits, load_strided, store_strided
from .packed import load_packed, store_packed
from .shared import workspace_of
from .sweeps import (
    columns_first,
    excluded_columns,
    first_factors,
    lifted,
    ones,
    poison,
    products,
    scaled,
    scaling_sweep,
    sums_over_cols,
    sums_over_rows,
    valid_lines,
    zeros,
)

MAX_BACKWARD_SWEEPS = 20
_SLOTS = tl.constexpr(MAX_BACKWARD_SWEEPS)


@triton.jit
def begin(K, W, u):
    """a and dg of W."""
    LINES: tl.constexpr = len(u)
    KW = products(K, W)
    df = sums_over_cols(KW, ones(K[0], LINES), zeros(K[0], LINES))
    a = products([-value for value in u], df)
    return a, [-value for value in sums_over_rows(KW, ones(K[0], LINES), zeros(K[0], LINES))]


@triton.jit
def _add_steps(W, a, z, past_u, v):
    """W_ij + v_j (a_i - u_i z_j)."""
    LINES: tl.constexpr = len(v)
    new = []
    for e in tl.static_range(LINES * LINES):
        new = new + [W[e] + v[e % LINES] * (a[e // LINES] - past_u[e // LINES] * z[e % LINES])]
    return new


@triton.jit
def add_sweep(W, K, a, dg, past_u, v):
    """W with the terms of a sweep that made v of ``past_u``, and a of the sweep before."""
    LINES: tl.constexpr = len(v)
    y = sums_over_rows(K, a, zeros(K[0], LINES))
    z = []
    vz = []
    for j in tl.static_range(LINES):
        z = z + [v[j] * y[j] - dg[j]]
        vz = vz + [v[j] * z[j]]
    W = _add_steps(W, a, z, past_u, v)
    Kvz = sums_over_cols(K, vz, zeros(K[0], LINES))
    past_a = []
    for i in tl.static_range(LINES):
        past_a = past_a + [past_u[i] * past_u[i] * Kvz[i]]
    return W, past_a


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
    first = tl.program_id(0).to(tl.int64) * BLOCK
    matrix = first + tl.arange(0, BLOCK)
    live = matrix < batch
    matrix = tl.minimum(matrix, batch - 1)
    workspace = workspace_of(logits_ptr, BLOCK, 4)
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, first, batch, workspace, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, 4,
    )  # fmt: skip
    kappa = k * (1.0 / UNIT)
    kappa_columns = tl.where(n_iters == 0, 0.0, kappa)
    G, _high = columns_first(x, kappa_columns, 4)
    K, phi, G, _near, _all_near, spare_row = lifted(x, kappa, kappa_columns, G, zeros(k, 4))
    spare_col = excluded_columns(G)
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows))

    u, spare_col = first_factors(phi, spare_col, n_iters)
    v = ones(k, 4)
    past_u = []
    past_v = []
    for slot in tl.static_range(_SLOTS):  # the last n_iters of them run, or one
        past_u = past_u + [u]
        if slot >= _SLOTS - tl.maximum(n_iters, 1):
            u, v = scaling_sweep(K, u, spare_row, spare_col, False)
        past_v = past_v + [v]
    r += poison(u)  # without sweeps a NaN has reached its row only

    if PACKED:
        D = load_packed(grad_plan_ptr, first, batch, workspace, 4)
    else:
        D = load_strided(grad_plan_ptr, matrix, live, n, m, grad_plan_stride_b, grad_plan_stride_n, grad_plan_stride_m, 0.0)
        D = [value.to(tl.float32) for value in D]
    W = scaled([-r * value for value in u], D, v)
    a, dg = begin(K, W, u)
    for slot in tl.static_range(_SLOTS - 1, -1, -1):
        if slot >= _SLOTS - tl.maximum(n_iters, 1):
            W, a = add_sweep(W, K, a, dg, past_u[slot], past_v[slot])
            dg = zeros(k, 4)
    dS = [k * -LN_2 * value for value in products(K, W)]
    if PACKED:
        store_packed(grad_logits_ptr, first, batch, dS, workspace, 4)
    else:
        store_strided(grad_logits_ptr, matrix, live, n, m, grad_logits_stride_b, grad_logits_stride_n, grad_logits_stride_m, dS)
