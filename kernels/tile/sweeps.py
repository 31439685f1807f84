"""Sweeps over padded tiles on chip: what the forward and the backward of the tile family share.

A program holds BLOCK_B matrices, rows and columns padded to the power of two P in code, as a tile [i1, j1, b, i0, j0] with
i = i1 ROWS + i0 and j = j1 COLS + j0: the compiler deals the last axes out to lanes and warps first, so i1 and j1 count the
entries of one thread, and sums over them cost no exchange. Vectors over rows are [i1, b, i0], over columns [j1, b, j0].
x are the logits, -inf where excluded, k = 1 / temperature; r and c the marginals, 0 on excluded lines. k x is first brought
near 0, by bases of its columns and rows, which lie on a grid so that no sum of them is rounded (``common/bases.py``):

    t_j = max_i (k x_ij + f0_i),  T_i = max_j (k x_ij - t_j),  G ~ -t,  R ~ -T,    y_ij = k x_ij + (G_j + R_i),

rounded once, at its own size. Whole numbers, as large logits of 16 bits are, stay whole, since only distances from a top are
brought to base 2. f and g are the potentials of y, f0 - R at the start; those of x are f + R and g + G. All of these are in
units of 2^16 nats.

    K_ij = exp(y_ij + f_i + g_j),     P_ij = u_i K_ij v_j.

A segment begins with a log sweep,
    g_j = log c_j - top_j - log sum_i exp(y_ij + f_i - top_j),
    K_ij = (r_i / total_i) exp(y_ij + g_j - top_i),  total_i its sum over j,   f_i = log r_i - top_i - log total_i,
so that the row sums of K are r up to one rounding, u = v = 1, and K depends on g alone. Scaling sweeps follow:
    v_j = c_j / s_j,  s = K^T u;      u_i = r_i / (K v)_i.
Each multiplies u and v by factors within [1/b, b], b = max(n, m) for uniform marginals and max(total / min r,
total / min c, 2) otherwise, so floor(45 / log2 b) of them (one less when not uniform) keep what underflows in K below
2^-36 of a row. Then f += log u, g += log v and the next segment begins. The matrices of one program share the smallest
number.

A matrix that has stopped keeps g, u and v; its K, rebuilt from the same g, is the same to the last bit.
A NaN or +inf in a used entry makes one row of K NaN, hence every column sum.
"""

import triton
import triton.language as tl

from ..common.arithmetic import INTERPRET, LN_2, LOG2_E, exp2, log2, reciprocal
from ..common.bases import UNIT, fused, on_grid, spacing
from ..common.memory import load_entries

_PER_UNIT = tl.constexpr(1.0 / UNIT.value)


@triton.jit
def over_rows(vector):
    """A vector over rows as a factor of a tile."""
    return vector[:, None, :, :, None]


@triton.jit
def over_cols(vector):
    """A vector over columns as a factor of a tile."""
    return vector[None, :, :, None, :]


@triton.jit
def over_matrices(value):
    """(BLOCK_B,) as a factor of a vector."""
    return value[None, :, None]


@triton.jit
def row_sums(tile):
    """sum_j."""
    return tl.sum(tl.sum(tile, axis=1), axis=3)


@triton.jit
def col_sums(tile):
    """sum_i."""
    return tl.sum(tl.sum(tile, axis=0), axis=2)


@triton.jit
def row_maxima(tile):
    """max_j."""
    return tl.max(tl.max(tile, axis=1), axis=3)


@triton.jit
def col_maxima(tile):
    """max_i."""
    return tl.max(tl.max(tile, axis=0), axis=2)


@triton.jit
def vector_sum(vector):
    """(BLOCK_B,): sum over a line."""
    return tl.sum(tl.sum(vector, axis=0), axis=1)


@triton.jit
def vector_max(vector):
    """(BLOCK_B,): largest of a line."""
    return tl.max(tl.max(vector, axis=0), axis=1)


@triton.jit
def as_matrices(tile):
    """(BLOCK_B, P, P)."""
    i1: tl.constexpr = tile.shape[0]
    j1: tl.constexpr = tile.shape[1]
    BLOCK_B: tl.constexpr = tile.shape[2]
    i0: tl.constexpr = tile.shape[3]
    j0: tl.constexpr = tile.shape[4]
    return tl.reshape(tl.permute(tile, (2, 0, 3, 1, 4)), (BLOCK_B, i1 * i0, j1 * j0))


@triton.jit
def as_lines(vector):
    """(BLOCK_B, P)."""
    i1: tl.constexpr = vector.shape[0]
    BLOCK_B: tl.constexpr = vector.shape[1]
    i0: tl.constexpr = vector.shape[2]
    return tl.reshape(tl.permute(vector, (1, 0, 2)), (BLOCK_B, i1 * i0))


@triton.jit
def unrelated(index):
    """``index`` int32, such that the compiler may not tell that two calls agree.

    Otherwise it would keep addresses and masks from the load of the logits to the store of the plan, across all sweeps,
    in registers that the sweeps need.
    """
    if not INTERPRET:
        index = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1)
    return index


@triton.jit
def line_index(P: tl.constexpr, LANES: tl.constexpr):
    """The rows or columns (P / LANES, 1, LANES) that a vector's elements stand for."""
    return unrelated(tl.arange(0, P // LANES)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :])


@triton.jit
def places(block, batch, n, m, BLOCK_B: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Matrices b (BLOCK_B,) int64 of a block, rows i, columns j, and which of b, i and j exist."""
    b = block * BLOCK_B + unrelated(tl.arange(0, BLOCK_B)).to(tl.int64)
    i, j = line_index(P, ROWS), line_index(P, COLS)
    inside = b < batch
    return b, i, j, inside, over_matrices(inside) & (i < n), over_matrices(inside) & (j < m)


@triton.jit
def vector_offsets(b, line, stride_b, stride):
    """Offsets into one vector for each matrix of b (BLOCK_B,) int64."""
    return over_matrices(b) * stride_b + line.to(tl.int64) * stride


@triton.jit
def tile_offsets(b, i, j, stride_b, stride_n, stride_m):
    """Offsets of the entries of matrices b (BLOCK_B,) int64."""
    return over_rows(vector_offsets(b, i, stride_b, stride_n)) + over_cols(j.to(tl.int64) * stride_m)


@triton.jit
def inverse_temperatures(temperature_ptr, stride, b, inside, has_temperature, inverse_temperature):
    """1 / temperature (BLOCK_B,), float64 so that k is rounded once, from those in memory or the one of all matrices."""
    tau = tl.load(temperature_ptr + b * stride, mask=inside & (has_temperature != 0), other=1.0)
    # A Newton step on the float32 reciprocal: 40 bits, without the code of a float64 division.
    inverse = reciprocal(tau).to(tl.float64)
    inverse = inverse * (2.0 - inverse * tau.to(tl.float64))
    return tl.where(has_temperature != 0, inverse, tl.full([1], inverse_temperature, tl.float64))


@triton.jit
def load_logits(
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
    used,
    DTYPE: tl.constexpr,
):
    """x in DTYPE: the logits where ``used`` and not masked, else -inf."""
    mask_at = mask_ptr + tile_offsets(b, i, j, mask_stride_b, mask_stride_n, mask_stride_m)
    used = used & (load_entries(mask_at, used & (has_mask != 0), 1) != 0)
    return load_entries(logits_ptr + tile_offsets(b, i, j, stride_b, stride_n, stride_m), used, -float("inf")).to(DTYPE)


@triton.jit
def marginals(x, r, c, has_row, has_col, unit_rows, uniform_scalings):
    """r, c as used, from those given (anything but 0 where uniform), and the scaling sweeps of a segment."""
    entries = (x != -float("inf")).to(tl.int32)
    rows, cols = row_maxima(entries) != 0, col_maxima(entries) != 0
    r, c = tl.where(rows, r, 0.0), tl.where(cols, c, 0.0)
    n_rows = tl.maximum(vector_sum(rows.to(x.dtype)), 1.0)
    n_cols = tl.maximum(vector_sum(cols.to(x.dtype)), 1.0)
    given = tl.where(has_row != 0, vector_sum(r), vector_sum(c))
    total = tl.where((has_row != 0) | (has_col != 0), given, tl.where(unit_rows != 0, n_rows, n_cols))
    r = tl.where((has_row != 0) | (rows == 0), r, over_matrices(total / n_rows))
    c = tl.where((has_col != 0) | (cols == 0), c, over_matrices(total / n_cols))
    least = -tl.maximum(vector_max(tl.where(r > 0, -r, -float("inf"))), vector_max(tl.where(c > 0, -c, -float("inf"))))
    scalings = tl.floor(45.0 / tl.log2(tl.maximum(total / least, 2.0))) - 1.0
    fewest = tl.min(tl.where(scalings > 0, scalings, 0.0), axis=0).to(tl.int32)
    return r, c, tl.where((has_row != 0) | (has_col != 0), fewest, uniform_scalings)


@triton.jit
def in_units(x):
    """x nats in units of UNIT."""
    return x * _PER_UNIT


@triton.jit
def in_nats(x):
    """x units of UNIT in nats."""
    return x * UNIT


@triton.jit
def relative(x, k, G, R):
    """y of x and its bases; k (BLOCK_B,)."""
    return fused(x, over_rows(over_matrices(in_units(k))), over_cols(G) + over_rows(R))


@triton.jit
def lifted(x, k, f, r, col_first):
    """y, its bases G and R, and the start f, given in nats, relative to them; k (BLOCK_B,). G is 0 unless ``col_first``.

    The grid is fit for the largest |t| and the largest |T| together, so that sums G + R are on it, too.
    """
    f = tl.where(r != 0, in_units(f), 0.0)
    kappa = over_rows(over_matrices(in_units(k)))
    col_top = col_maxima(fused(x, kappa, over_rows(f)))
    col_top = tl.where((col_top == -float("inf")) | (col_first == 0), 0.0, col_top)
    row_top = row_maxima(fused(x, kappa, -over_cols(col_top)))
    row_top = tl.where(row_top == -float("inf"), 0.0, row_top)
    q = over_matrices(spacing(vector_max(tl.abs(col_top)) + vector_max(tl.abs(row_top))))
    G, R = -on_grid(col_top, q), -on_grid(row_top, q)
    return relative(x, k, G, R), G, R, f - R


@triton.jit
def store_on_base(pointers, values, mask):
    """Store in nats what ``values`` and the bases that wait there come to; bases are added as they are loaded, as a vector."""
    pointers = tl.reshape(pointers, (pointers.numel,))
    mask = tl.reshape(tl.broadcast_to(mask, values.shape), (values.numel,))
    base = tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, in_nats(tl.reshape(values, (values.numel,)) + base), mask=mask)


@triton.jit
def exp(y):
    """e^(y UNIT)."""
    return exp2(y * (LOG2_E * UNIT))


@triton.jit
def log(x, used):
    """log x in units of UNIT, 0 where not ``used``."""
    return log2(tl.where(used, x, 1.0)) * (LN_2 * _PER_UNIT)


@triton.jit
def log_col_step(y, f, c):
    """g from f."""
    exponent = y + over_rows(f)
    top = col_maxima(exponent)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = col_sums(exp(exponent - over_cols(top)))
    return tl.where(c != 0, log(c, c != 0) - top - log(total, c != 0), 0.0)


@triton.jit
def quotient(marginal, total):
    """marginal / total, 0 on excluded lines, where both are 0; adding the smallest normal number changes no other total."""
    tiny: tl.constexpr = 2.0**-1022 if total.dtype == tl.float64 else 2.0**-126
    return marginal * reciprocal(total + tiny)


@triton.jit
def log_row_step(y, g, r, old_f):
    """K, f and exp(old_f - f) from g. The last is formed without f, whose rounding K does not share."""
    exponent = y + over_cols(g)
    top = row_maxima(exponent)
    top = tl.where(top == -float("inf"), 0.0, top)
    K = exp(exponent - over_rows(top))
    total = tl.where(r != 0, row_sums(K), 1.0)
    f = tl.where(r != 0, log(r, r != 0) - top - log(total, r != 0), 0.0)
    return K * over_rows(r * reciprocal(total)), f, exp(old_f + top) * quotient(total, r)


@triton.jit
def shifted(f, u, r):
    """f + log u, 0 on excluded lines."""
    return tl.where(r != 0, f + log(u, r != 0), 0.0)


@triton.jit
def residuals(s, v, c):
    """max_j |v_j s_j / c_j - 1| (BLOCK_B,), inf where a sum is NaN."""
    error = tl.abs(quotient(v * s, c) - 1.0)
    error = tl.where(error < float("inf"), error, float("inf"))
    return vector_max(tl.where(c != 0, error, 0.0))
