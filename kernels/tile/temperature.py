"""The temperature of a wanted sigma2 on tiles: the whole search of ``fastdsm/_ops/temperature_search.py`` in one launch.

There are its reasons; here log tau is in base 2, every matrix of a program is at its own temperature, and all of them take
their next plan together, one converged plan by Newton's method and its sigma2 by squaring, until the last has its root. The
state of a matrix: ends a and b of the interval, b the one last moved while it walks down, and sigma2 - target at both.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LOG2_E, exp2
from ..common.configuration import finite_jit
from ..common.memory import load_entries
from ..spectrum.squaring import tile_sigma2
from .newton import newton, ones_of, plan_at, swept, system
from .sweeps import (
    as_lines,
    as_matrices,
    lifted,
    log,
    log_col_step,
    over_cols,
    over_matrices,
    over_rows,
    places,
    tile_offsets,
    vector_offsets,
)

# As in ``temperature_search.py``, but for what float32 does not resolve.
_STEP = tl.constexpr(0.25)
_SCAN = tl.constexpr(48)
_REFINEMENTS = tl.constexpr(40)
_TOL = tl.constexpr(1e-4)
_SIGMA2_TOL = tl.constexpr(2e-6)
_NARROW = tl.constexpr(2e-6)
_RESIDUAL = tl.constexpr(1e-6)


@triton.jit
def _between(a, b, at_a, at_b, refined):
    """Where to look next: the secant's root, each third time the middle."""
    share = at_a / (at_a - at_b)
    usable = (share >= 0.0) & (share <= 1.0) & (refined % 3 != 2)
    return a + (b - a) * tl.where(usable, share, 0.5)


@finite_jit
def _temperature_tile_fwd_kernel(
    logits_ptr,
    row_ptr,
    col_ptr,
    target_ptr,
    start_ptr,
    temperature_ptr,
    reached_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    n_iters: tl.int32,
    uniform_scalings: tl.int32,
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    has_row: tl.int32,
    has_col: tl.int32,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SQUARINGS: tl.constexpr,
):
    """``start``: log2 of the temperature to walk down from, NaN where there is nothing to search; logits -inf where masked."""
    dtype: tl.constexpr = temperature_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    r = load_entries(row_ptr + vector_offsets(b, i, row_stride_b, row_stride_n), inside_row & (has_row != 0), 1.0)
    c = load_entries(col_ptr + vector_offsets(b, j, col_stride_b, col_stride_m), inside_col & (has_col != 0), 1.0)
    used = over_rows(inside_row & (r != 0)) & over_cols(inside_col & (c != 0))
    x = load_entries(logits_ptr + tile_offsets(b, i, j, stride_b, stride_n, stride_m), used, -float("inf")).to(dtype)
    target = tl.load(target_ptr + b, mask=inside, other=0.5)
    here = tl.load(start_ptr + b, mask=inside, other=float("nan"))
    active = here == here
    here = tl.where(active, here, 0.0)
    one, none = ones_of(c), tl.zeros([P // ROWS, BLOCK_B, ROWS], dtype)
    _y, _G, _R, potential, r, c, aim, _unit, scalings, poison = system(
        x, one, none, r, c, 1, has_row, has_col, 1, uniform_scalings
    )
    active = active & (poison == 0.0)

    a, end, at_a, at_end = here, here, here * 0.0, here * 0.0
    found, error, residual = here, here * 0.0 + 1.0, here * 0.0 + 1.0
    walking, moved_a, moved_end = active, active & (a != a), active & (a != a)
    refined = tl.zeros([BLOCK_B], tl.int32)
    count = 0
    while tl.max(active.to(tl.int32), axis=0) > 0:
        k = exp2(-here)
        # Read anew for each plan: held on, it would be in registers that sigma2 needs.
        b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
        sound = over_rows((r != 0) & over_matrices(poison == 0.0)) & over_cols(c != 0)
        x = load_entries(logits_ptr + tile_offsets(b, i, j, stride_b, stride_n, stride_m), sound, -float("inf")).to(dtype)
        y, _G, _R, _f = lifted(x, one, none, r, 1)
        y *= over_rows(over_matrices(k))
        base = log_col_step(y, potential * over_matrices(k), c)
        base = swept(y, base, r, c, aim, active, scalings, _RESIDUAL, SEGMENTS)
        base, fine, new_residual, _steps = newton(y, base, r, c, aim, active, n_iters, _RESIDUAL, m, COLS, WARMS=False)
        plan, L = plan_at(y, one, base, fine, r)
        new = tl.where(r != 0, log(r, r != 0) - L, 0.0) * over_matrices(exp2(here))
        potential = tl.where(over_matrices(active) & (new == new), new, potential)
        value, _u, _v = tile_sigma2(as_matrices(plan), as_lines(r), as_lines(c), SQUARINGS)
        new_error = value - target

        found, error = tl.where(active, here, found), tl.where(active, new_error, error)
        residual = tl.where(active, new_residual, residual)
        crossed = walking & (count > 0) & ((new_error >= 0) != (at_end >= 0))
        to_end = walking | ((new_error >= 0) == (at_end >= 0))
        # Illinois: an end that stays twice counts half, lest the other alone move.
        stays_a = tl.where(walking, at_end, tl.where(moved_end, 0.5 * at_a, at_a))
        stays_end = tl.where(moved_a, 0.5 * at_end, at_end)
        a = tl.where(walking, end, tl.where(to_end, a, here))
        at_a = tl.where(to_end, stays_a, new_error)
        end = tl.where(to_end, here, end)
        at_end = tl.where(to_end, new_error, stays_end)
        moved_end, moved_a = to_end & ~walking, ~to_end
        done = ~walking & ((tl.abs(new_error) <= _SIGMA2_TOL) | (tl.abs(a - end) <= _NARROW) | (refined >= _REFINEMENTS))
        refined += (~walking | crossed).to(tl.int32)
        walking = walking & ~crossed
        active = active & ~done & ~(walking & (count >= _SCAN))
        count += 1
        here = tl.where(walking, here - _STEP * LOG2_E, _between(a, end, at_a, at_end, refined - 1))

    reached = (refined > 0) & (tl.abs(error) <= _TOL) & (residual <= _RESIDUAL)
    tl.store(temperature_ptr + b, tl.where(reached, exp2(found), float("nan")), mask=inside)
    tl.store(reached_ptr + b, reached.to(tl.int8), mask=inside)
