"""Changes of the kernels of matrices on chip: registers, tile and panel."""

from ..change import Change

_REGISTERS, _NEWTON = "tests/kernels/test_registers.py", "tests/kernels/test_newton.py"
_TILE, _TILE_NEWTON = "tests/kernels/test_tile.py", "tests/kernels/test_tile_newton.py"
_PANEL, _SEARCH, _HISTORY = "tests/kernels/test_panel.py", "tests/kernels/test_temperature.py", "tests/kernels/test_history.py"
_FIXED_POINT = "tests/ops/test_implicit.py::test_of_a_residual_that_a_newton_step_squares"
_LARGE = "tests/kernels/test_large_logits.py"
_TINY = "test_a_tiny_column_marginal_whose_line_has_one_entry"

REGISTERS = [
    Change(
        "kernels/registers/sweeps.py",
        "tl.constexpr(22), tl.constexpr(15)",
        "tl.constexpr(44), tl.constexpr(15)",
        (f"{_REGISTERS}::test_packed_matrices_without_support[4-100]",),
        "twice the scaling sweeps on one K of 4 lines: two factors leave float32",
    ),
    Change(
        "kernels/registers/sweeps.py",
        "tl.constexpr(22), tl.constexpr(15)",
        "tl.constexpr(22), tl.constexpr(45)",
        (f"{_REGISTERS}::test_packed_matrices_without_support",),
        "three times the scaling sweeps on one K of 5 to 8 lines",
    ),
    Change(
        "kernels/registers/sweeps.py",
        "base = [tl.where(level, value, on_grid(value, q)) for value in base]",
        "base = [tl.where(level, value, value) for value in base]",
        (f"{_LARGE}::test_plans_and_gradients_are_those_of_float64[1000000000.0-both offsets-registers]",),
        "bases of columns off the grid: sums with those of rows are rounded",
    ),
    Change(
        "kernels/registers/sweeps.py",
        "_NEAR = tl.constexpr(2.0**22 / UNIT)",
        "_NEAR = tl.constexpr(2.0**40 / UNIT)",
        (f"{_LARGE}::test_plans_and_gradients_are_those_of_float64[1000000000.0-both offsets-packed]",),
        "far matrices taken for near ones",
    ),
    Change(
        "kernels/registers/sweeps.py",
        'gamma = gamma + [tl.where(level | (above == float("-inf")), 0.0, G[j] * UNIT - above)]',
        'gamma = gamma + [tl.where(level | (above == float("-inf")), 0.0, -above)]',
        (f"{_LARGE}::test_segments_of_sweeps",),
        "far matrices whose columns forget what they have moved",
    ),
    Change(
        "kernels/registers/forward.py",
        "spare_row, spare_col, tl.minimum(n_iters - done, SEGMENT))",
        "spare_row, spare_col, SEGMENT + 0 * n_iters)",
        (f"{_REGISTERS}::test_packed_matrices_without_support[4-100]",),
        "the last segment is never cut short",
    ),
    Change(
        "kernels/registers/forward.py",
        "-0.17807190511263765",
        "0.17807190511263765",
        (f"{_REGISTERS}::test_counts_of_lines[7]",),
        "log2 of 5 valid lines",
    ),
    Change(
        "kernels/registers/forward.py",
        "up = tl.where(unit_rows != 0, n_iters, tl.maximum(n_iters, 1))",
        "up = tl.where(unit_rows != 0, n_iters, n_iters)",
        (f"{_REGISTERS}::test_forward_of_other_shapes",),
        "f without sweeps",
    ),
    Change(
        "kernels/registers/backward.py",
        "z = z + [v[j] * y[j] - dg[j]]",
        "z = z + [v[j] * y[j]]",
        (f"{_REGISTERS}::test_gradient_of_other_shapes",),
        "the cotangent's own column sums",
    ),
    Change(
        "kernels/registers/history.py",
        "products(sums_over_cols(K, factors[0:LINES], spare_row), factors[LINES : 2 * LINES])",
        "sums_over_cols(K, factors[0:LINES], spare_row)",
        (f"{_REGISTERS}::test_gradient_of_segments[32]",),
        "the adjoint across a new K, whose factors begin from another u",
    ),
    Change(
        "kernels/registers/implicit.py",
        "length = tl.where(residual < PURE_BELOW, LOG2_E, 0.0)",
        "length = tl.where(residual < 0.0, LOG2_E, 0.0)",
        (f"{_FIXED_POINT}[triton-shape3]",),
        "no Newton step before the implicit gradient",
    ),
    Change(
        "kernels/registers/implicit.py",
        "factor *= tl.where(unit_rows != 0, 1.0, inverse_c)",
        "factor *= tl.where(unit_rows != 0, 1.0, 1.0 + 0.0 * inverse_c)",
        (f"{_NEWTON}::test_other_shapes",),
        "the unit of marginals whose columns are 1",
    ),
    Change(
        "kernels/registers/newton.py",
        "edge = ground * share[k]",
        "edge = 0.0 * ground * share[k]",
        (f"{_NEWTON}::test_packed_matrices[100.0-4]",),
        "no ground: columns without edges never move",
    ),
    Change(
        "kernels/registers/newton.py",
        "total += tl.where(valid[j], potential[j], 0.0)",
        "total += potential[j]",
        (f"{_NEWTON}::test_potentials_keep_the_mean_of_columns_that_take_part",),
        "the mean of a potential over excluded columns too",
    ),
    Change(
        "kernels/registers/launch.py",
        "4 * max(stride + matrices, 1)",
        "max(stride + matrices, 1)",
        (f"{_HISTORY}::test_bytes_of_a_backward",),
        "a history of four times the bytes",
    ),
]

TILE = [
    Change(
        "kernels/tile/sweeps.py",
        'least = -tl.maximum(vector_max(tl.where(r > 0, -r, -float("inf"))), vector_max(tl.where(c > 0, -c, -float("inf"))))',
        'least = -vector_max(tl.where(r > 0, -r, -float("inf")))',
        (f"{_TILE}::{_TINY}",),
        "sweeps of a segment without regard to the column marginal",
    ),
    Change(
        "kernels/tile/sweeps.py",
        "inverse = inverse * (2.0 - inverse * tau.to(tl.float64))",
        "inverse = inverse * 1.00001",
        (f"{_TILE}::test_options[3-4-20-f0 temperature]",),
        "a temperature to five digits",
    ),
    Change(
        "kernels/tile/sweeps.py",
        "return K * over_rows(r * reciprocal(total)), f, exp(old_f + top) * quotient(total, r)",
        "return K * over_rows(r * reciprocal(total)), f, exp(old_f - f)",
        (f"{_TILE}::test_columns_of_a_gradient_sum_to_zero_whatever_the_potentials",),
        "the backward's factor of a log sweep with the rounding of f",
    ),
    Change(
        "kernels/tile/forward.py",
        "col_at = col_ptr + vector_offsets(b, j, col_stride_b, col_stride_m)",
        "col_at = col_ptr + vector_offsets(b, j, col_stride_b, 1)",
        (f"{_TILE}::test_strides_are_followed",),
        "a column marginal whose entries are apart",
    ),
    Change(
        "kernels/tile/forward.py",
        "u = tl.where(moving, quotient(r, row_sums(K * over_cols(v))), u)",
        "u = quotient(r, row_sums(K * over_cols(v)))",
        (f"{_TILE}::test_each_matrix_stops_by_itself",),
        "a matrix that has stopped moves on",
        equivalent="v is held, and u = r / (K v) of the same v is the same u",
    ),
    Change(
        "kernels/tile/backward.py",
        "everywhere & (t != start + 1), 1.0)",
        "everywhere, 1.0)",
        (f"{_TILE}::test_sizes[3-3-20]",),
        "the first scaling sweep of a segment starts from u = 1",
    ),
    Change(
        "kernels/tile/backward.py",
        "used_df = tl.where(moving, df, 0.0)",
        "used_df = df",
        (f"{_TILE}::test_each_matrix_stops_by_itself",),
        "sweeps that a matrix has not made have an adjoint",
    ),
    Change(
        "kernels/tile/newton.py",
        "tl.store(residual_ptr + b, residual + poison, mask=inside)",
        "tl.store(residual_ptr + b, residual, mask=inside)",
        (f"{_TILE_NEWTON}::test_a_poisoned_matrix_is_marked_after_no_step_and_after_one[0]",),
        "the residual of a NaN matrix before any step",
    ),
    Change(
        "kernels/tile/newton.py",
        "plan = plan * over_rows(over_matrices(unit)) + over_rows(over_matrices(poison))",
        "plan = plan * over_rows(over_matrices(unit))",
        (f"{_TILE_NEWTON}::test_a_poisoned_matrix_is_marked_after_no_step_and_after_one[1]",),
        "the plan of a NaN matrix after one step",
    ),
    Change(
        "kernels/tile/newton.py",
        "refused = (residual >= PURE_BELOW) & ~damped & ~fallen",
        "refused = damped & ~damped",
        (f"{_TILE_NEWTON}::test_a_matrix_that_whole_steps_never_solve",),
        "steps that raise the dual are taken",
    ),
    Change(
        "kernels/tile/newton.py",
        "return sums, residual, vector_sum(r * L) - vector_sum(aim * (base + fine))",
        "return sums, residual, vector_sum(r * L)",
        (f"{_TILE_NEWTON}::test_uneven_marginals_take_no_more_steps_either",),
        "the dual without its linear part",
    ),
    Change(
        "kernels/tile/implicit.py",
        "step = tl.where(over_matrices(residual < PURE_BELOW), step, 0.0)",
        "step = tl.where(over_matrices(residual < 0.0), step, 0.0)",
        (f"{_FIXED_POINT}[triton-shape4]",),
        "no Newton step before the implicit gradient",
    ),
    Change(
        "kernels/tile/implicit.py",
        "    beta -= over_matrices(quotient(vector_sum(c * beta), vector_sum(c)))\n",
        "",
        (f"{_TILE_NEWTON}::test_masks_and_excluded_lines",),
        "the gradients of marginals in another gauge",
    ),
    Change(
        "kernels/tile/laplacian.py",
        "_LEAST_DEGREE = tl.constexpr(2.0**-4)",
        "_LEAST_DEGREE = tl.constexpr(0.0)",
        (f"{_TILE_NEWTON}::test_conjugate_gradients_serve_where_they_are_quick[16-16]",),
        "conjugate gradients where a column has next to no edges",
        equivalent="what H loses to the subtraction is below the ground of four units that either way adds to it; and where "
        "conjugate gradients do not arrive there is elimination: only steps are lost",
    ),
    Change(
        "kernels/tile/laplacian.py",
        "ground += weights * (own_ground * inverse)[:, None]",
        "ground += 0.0 * weights",
        (f"{_TILE_NEWTON}::test_elimination_of_grounded_columns",),
        "the ground of columns that are eliminated",
    ),
    Change(
        "kernels/tile/temperature.py",
        "reached = (refined > 0) & (tl.abs(error) <= _TOL) & (residual <= _RESIDUAL)",
        "reached = (refined > 0) & (tl.abs(error) <= _TOL)",
        (f"{_SEARCH}::test_plans_that_too_few_steps_leave_unconverged_reach_nothing",),
        "a root of plans that have not converged",
    ),
    Change(
        "kernels/tile/temperature.py",
        "crossed = walking & (count > 0) & ((new_error >= 0) != (at_end >= 0))",
        "crossed = walking & (count > 0) & (new_error >= 0)",
        (f"{_SEARCH}::test_a_curve_that_turns",),
        "a curve that starts above its target",
    ),
    Change(
        "kernels/tile/temperature.py",
        "to_end = walking | ((new_error >= 0) == (at_end >= 0))",
        "to_end = walking | (new_error >= 0)",
        (f"{_SEARCH}::test_a_curve_that_turns",),
        "the end of the bracket that a curve which falls replaces",
    ),
    Change(
        "kernels/tile/launch.py",
        "slot * problem.compute_dtype.itemsize",
        "slot",
        (f"{_HISTORY}::test_bytes_of_a_backward",),
        "a history of four times the bytes",
    ),
    Change(
        "kernels/common/configuration.py",
        "HISTORY_BYTES = 1 << 28",
        "HISTORY_BYTES = 1 << 29",
        (f"{_HISTORY}::test_bytes_of_a_backward",),
        "the cap of what a backward keeps",
    ),
]

PANEL = [
    Change(
        "kernels/common/line_sweeps.py",
        "tl.minimum(tl.where(has_row != 0, r_min, r_uniform), c_min)",
        "tl.where(has_row != 0, r_min, r_uniform)",
        (f"{_PANEL}::{_TINY}",),
        "sweeps of a segment without regard to the column marginal",
    ),
    Change(
        "kernels/common/line_sweeps.py",
        "c = load_entries(col_ptr + cols.to(tl.int64) * stride_col,",
        "c = load_entries(col_ptr + cols.to(tl.int64),",
        (f"{_PANEL}::test_strided_marginals_and_starts",),
        "a column marginal whose entries are apart",
    ),
    Change(
        "kernels/common/line_sweeps.py",
        "u = tl.where(total == 0, 1.0, r / total)\n        partial += kernel * u[None, :, None]\n        if HISTORY",
        "u = tl.where(total == 0, 1.0, 1.0)\n        partial += kernel * u[None, :, None]\n        if HISTORY",
        (f"{_PANEL}::test_rows_are_exact_whatever_the_potentials",),
        "row sums with the rounding of large potentials",
    ),
    Change(
        "kernels/panel/forward.py",
        "f0_ptr + b * f0_stride_b + lines * f0_stride_n",
        "f0_ptr + b * f0_stride_b + lines",
        (f"{_PANEL}::test_strided_marginals_and_starts",),
        "a start whose entries are apart",
    ),
    Change(
        "kernels/spectrum/lanczos.py",
        "col_base[None, :]), bits, g[None, :])",
        "col_base[None, :]), BITS, g[None, :])",
        (f"{_PANEL}::test_sigma2_in_float64",),
        "a constant rounded to float32 in float64 arithmetic",
    ),
    Change(
        "kernels/panel/forward.py",
        'residual = tl.where(broken != 0, float("nan"), tl.max(error))',
        "residual = tl.max(error) + 0.0 * broken",
        (f"{_PANEL}::test_poison_stays_in_its_matrix",),
        "NaN among the column sums",
    ),
    Change(
        "kernels/panel/backward.py",
        "dlog_r += tl.where(t > 0, e, 0.0)",
        "dlog_r += e",
        (f"{_PANEL}::test_every_option[row marginal-9]",),
        "f0's part in the gradient of the row marginal",
    ),
    Change(
        "kernels/panel/backward.py",
        "v_before = tl.where(last == 0, 0.0, v * exp2(g - new_g))",
        "v_before = tl.where(last == 0, 0.0, v)",
        (f"{_PANEL}::test_backward_of_every_size[1-33-70-200.0-8]", f"{_PANEL}::test_backward_of_every_size[1-9-130-5.0-9]"),
        "the column factor from one segment to the next",
    ),
    Change(
        "kernels/panel/launch.py",
        "slot * dtype.itemsize",
        "slot",
        (f"{_HISTORY}::test_bytes_of_a_backward",),
        "a history of four times the bytes",
    ),
]

KERNELS = [*REGISTERS, *TILE, *PANEL]
