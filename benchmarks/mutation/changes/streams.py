"""Changes of the kernels of what does not fit on chip: stream, attention, and sigma2 of plans."""

from ..change import Change

_STREAM, _SPECTRUM, _REGISTERS = (
    "tests/kernels/test_stream.py",
    "tests/kernels/test_spectrum.py",
    "tests/kernels/test_registers.py",
)
_ATTENTION, _APPLY = "tests/kernels/test_attention.py", "tests/kernels/test_attention_apply.py"
_GRADIENT = "tests/kernels/test_attention_gradient.py"
_LARGE = "tests/kernels/test_large_logits.py::test_a_temperature_that_rounds"

STREAM = [
    Change(
        "kernels/stream/sweep.py",
        "given = tl.load(col_ptr + cols.to(tl.int64) * stride_m,",
        "given = tl.load(col_ptr + cols.to(tl.int64),",
        (f"{_STREAM}::test_strided_marginals_and_starts",),
        "a column marginal whose entries are apart",
    ),
    Change(
        "kernels/stream/lines.py",
        "given = tl.load(row_ptr + rows.to(tl.int64) * row_stride,",
        "given = tl.load(row_ptr + rows.to(tl.int64),",
        (f"{_STREAM}::test_strided_marginals_and_starts",),
        "a row marginal whose entries are apart",
    ),
    Change(
        "kernels/stream/start.py",
        "col_at = col_ptr + b * col_stride_b + cols.to(tl.int64) * col_stride_m",
        "col_at = col_ptr + b * col_stride_b + cols.to(tl.int64)",
        (f"{_STREAM}::test_strided_marginals_and_starts",),
        "which columns a strided marginal excludes",
    ),
    Change(
        "kernels/stream/start.py",
        "return tl.load(f0_ptr + rows.to(tl.int64) * stride_n,",
        "return tl.load(f0_ptr + rows.to(tl.int64),",
        (f"{_STREAM}::test_strided_marginals_and_starts[2]",),
        "a start whose entries are apart",
    ),
    Change(
        "kernels/stream/start.py",
        "grid = on_grid(col_top, spacing_of(row_counts_ptr + b * blocks * 3, blocks))",
        "grid = col_top",
        (f"{_LARGE}[stream]",),
        "bases off the grid, whose sums round",
    ),
    Change(
        "kernels/stream/sweep.py",
        'tl.where(broken != 0, float("nan"), tl.max(tl.abs(ratio - 1.0)))',
        "tl.max(tl.abs(ratio - 1.0)) + 0.0 * broken",
        (f"{_STREAM}::test_poison_stays_in_its_matrix",),
        "NaN among the column sums",
    ),
    Change(
        "kernels/stream/adjoint.py",
        "terms = (d - p * e[:, None]) * u[:, None]",
        "terms = d * u[:, None]",
        (f"{_STREAM}::test_every_size[2-3-3-1.0-3]",),
        "the row step's adjoint in the column sums",
    ),
    Change(
        "kernels/stream/lines.py",
        "return fused(fused(x, k, col_base + row_base), BITS, col_fine)",
        "return fused(fused(x, k, col_base) + row_base, BITS, col_fine)",
        (f"{_LARGE}[stream]",),
        "logits rounded at their size, off the grid of their row's base",
    ),
    Change(
        "kernels/common/line_sweeps.py",
        "row_base = -on_grid(tl.load(base_ptr + lines, mask=lines < n, other=0.0), q)",
        "row_base = -tl.load(base_ptr + lines, mask=lines < n, other=0.0)",
        (f"{_LARGE}[panel]",),
        "panels' bases of rows off the grid",
    ),
    Change(
        "kernels/tile/sweeps.py",
        "G, R = -on_grid(col_top, q), -on_grid(row_top, q)",
        "G, R = -col_top, -row_top",
        (f"{_LARGE}[tile]",),
        "tiles' bases off the grid",
    ),
]

ATTENTION = [
    Change(
        "kernels/attention/tile.py",
        "    if STREAM_FIRST:\n        x = (x + base[None, :])",
        "    if STREAM_FIRST == 2:\n        x = (x + base[None, :])",
        (f"{_ATTENTION}::test_potentials_are_added_in_one_order_whichever_side_is_streamed",),
        "large potentials added in another order in one pass than in the other",
    ),
    Change(
        "kernels/attention/tile.py",
        "return tl.where(keep, p * dropout_scale, 0.0)",
        "return tl.where(keep, p, 0.0)",
        (
            f"{_APPLY}::test_dropout_draws_each_entry_alike_in_both_orientations",
            f"{_APPLY}::test_attend_drops_the_product_alone",
        ),
        "dropout without its factor",
    ),
    Change(
        "kernels/attention/tile.py",
        "j = tl.where(line_is_key != 0, lines, streams)",
        "j = streams",
        (f"{_APPLY}::test_dropout_draws_each_entry_alike_in_both_orientations",),
        "entries dropped by another draw where keys are the lines",
    ),
    Change(
        "kernels/attention/tile.py",
        "p -= piece.to(tl.float32)",
        "p -= p",
        (f"{_APPLY}::test_apply_of_16_bits", f"{_APPLY}::test_attend_of_16_bits"),
        "one piece of a plan in 16 bits",
    ),
    Change(
        "kernels/attention/tile.py",
        "acc *= (unit / new_unit)[:, None]",
        "acc *= (new_unit / new_unit)[:, None]",
        (f"{_APPLY}::test_float16_vectors_meet_plans_beyond_its_range",),
        "what was summed before the unit grew",
    ),
    Change(
        "kernels/attention/tile.py",
        "return scales.logits / temperature, scales.bias / temperature",
        "return scales.logits / temperature, scales.bias",
        (f"{_ATTENTION}::test_lse[everything]", f"{_ATTENTION}::test_lse"),
        "a bias that the temperature does not divide",
    ),
    Change(
        "kernels/attention/sweep.py",
        "total = total * exp2(top - shift) + tl.sum(exp2(y - shift[:, None]), axis=1)",
        "total = total + tl.sum(exp2(y - shift[:, None]), axis=1)",
        (f"{_ATTENTION}::test_lse_of_any_size[1-40-20]", f"{_ATTENTION}::test_lse_of_any_size[33-34-8]"),
        "what was summed before the maximum grew",
    ),
    Change(
        "kernels/attention/whole.py",
        'top = tl.where(top == -float("inf"), 0.0, top)',
        "top = top + 0.0",
        (f"{_ATTENTION}::test_a_sweep_in_one_pass",),
        "lines that padding leaves without entries",
    ),
    Change(
        "kernels/attention/tile.py",
        "value = tl.log2(mantissa).to(tl.float64) + ((bits >> 23) - 127).to(tl.float64) + (total - total).to(tl.float64)",
        "value = tl.log2(total).to(tl.float64) + 0 * (bits + mantissa).to(tl.float64)",
        (f"{_ATTENTION}::test_the_logarithm_of_a_sum_is_no_coarser_than_the_sum",),
        "the logarithm of a large sum in float32",
    ),
]

SPECTRUM = [
    Change(
        "kernels/spectrum/jacobi.py",
        "SINGLE_ROUNDS = tl.constexpr(3)",
        "SINGLE_ROUNDS = tl.constexpr(1)",
        (f"{_REGISTERS}::test_sigma2_of_plans", f"{_REGISTERS}::test_forward_of_other_shapes"),
        "one round of rotations",
    ),
    Change(
        "kernels/spectrum/squaring.py",
        "32: 13, 64: 13}",
        "32: 9, 64: 13}",
        (f"{_SPECTRUM}::test_squaring_on_hard_spectra[29-dtype0]",),
        "four squarings fewer",
    ),
    Change(
        "kernels/spectrum/squaring.py",
        "for repeat in tl.static_range(2):",
        "for repeat in tl.static_range(1):",
        (f"{_SPECTRUM}::test_squaring_on_hard_spectra",),
        "means taken out once: what their rounding leaves next to uniform",
    ),
    Change(
        "kernels/spectrum/squaring.py",
        "log_bound += exponent.to(m.dtype) * weight",
        "log_bound += exponent.to(m.dtype) * weight * 0.999",
        (f"{_SPECTRUM}::test_bounds_at_every_share_of_a_binade",),
        "an upper bound a little below",
    ),
    Change(
        "kernels/spectrum/squaring.py",
        "lines = tl.minimum(tl.sum((r != 0).to(tl.int32), axis=1), tl.sum((c != 0).to(tl.int32), axis=1))",
        "lines = tl.minimum(tl.sum((r == r).to(tl.int32), axis=1), tl.sum((c == c).to(tl.int32), axis=1))",
        (f"{_SPECTRUM}::test_one_line_has_no_second_singular_value",),
        "excluded lines are counted",
    ),
]

STREAMS = [*STREAM, *ATTENTION, *SPECTRUM]
