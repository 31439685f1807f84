"""Changes of potentials and what stands on them, gradients, log P, half steps, starts; of large, cold, few, uneven sweeps."""

from ..change import Change

_POTENTIALS, _HALF = "tests/api/test_potentials.py", "tests/api/test_half_steps.py"
_LOG, _LARGE = "tests/api/test_log_sinkhorn.py", "tests/ops/test_large_logits.py"
_ARGUMENTS, _FEW = "tests/api/test_arguments.py", "tests/ops/test_few_sweeps.py"

POTENTIALS = [
    Change(
        "fastdsm/pytorch/projection.py",
        "x.add_(torch.where(marginal == 0, 0.0, more))",
        "x.add_(more)",
        (f"{_POTENTIALS}::test_cotangents_of_lines_that_take_no_part_are_ignored",),
        "cotangents of lines that take no part enter the adjoint",
    ),
    Change(
        "fastdsm/pytorch/implicit.py",
        "return of_f - mean * valid[0], of_g + mean * valid[1]",
        "return of_f, of_g",
        (f"{_POTENTIALS}::test_gradient",),
        "the direction that a fixed point leaves free",
    ),
    Change(
        "fastdsm/_ops/streamed/gradient.py",
        "return torch.where(lines[0], f - mean, 0.0), torch.where(lines[1], g + mean, 0.0)",
        "return f, g",
        (f"{_POTENTIALS}::test_implicit_gradient_of_attentions_potentials",),
        "the same of attention's",
    ),
    Change(
        "fastdsm/_ops/streamed/gradient.py",
        "if of_one_line(problem, sweeps) and given.of_plan_alone:",
        "if of_one_line(problem, sweeps):",
        (f"{_POTENTIALS}::test_attention_from_a_potential",),
        "potentials of one line, whose plan alone does not depend on the logits",
    ),
    Change(
        "fastdsm/_ops/runs.py",
        "pair = (grad_f, grad_g) if self.columns_first else (grad_g, grad_f)",
        "pair = (grad_f, grad_g)",
        (f"{_POTENTIALS}::test_gradient",),
        "f for g where rows come first",
    ),
    Change(
        "fastdsm/_ops/attention_call.py",
        'return (f + x, g) if side == "query" else (f, g + x)',
        "return f, g",
        (f"{_POTENTIALS}::test_attention_from_a_potential",),
        "potentials without the one that they started from",
    ),
    Change(
        "fastdsm/_ops/attention_call.py",
        "bias = _with_lines(bias, start.unsqueeze(-1 - at) * number)",
        "bias = _with_lines(bias, start.unsqueeze(-1 - at))",
        (f"{_POTENTIALS}::test_attention_from_a_potential",),
        "a start in units of logits",
    ),
    Change(
        "fastdsm/half_steps.py",
        "info = info._replace(sweeps=info.sweeps + 1)",
        "info = info._replace(sweeps=info.sweeps)",
        (f"{_HALF}::test_every_operand_and_its_gradient",),
        "the first half step is no sweep",
    ),
    Change(
        "fastdsm/half_steps.py",
        "return start, logits + scale * start.unsqueeze(at)",
        "return start, logits + start.unsqueeze(at)",
        (f"{_HALF}::test_every_operand_and_its_gradient",),
        "a start in units of logits",
    ),
    Change(
        "fastdsm/log_projection.py",
        "better = torch.where(plan > _FROM_PLAN, plan.log(), found.detach())",
        "better = found.detach()",
        (f"{_LOG}::test_entries_near_one_are_better_than_sums_of_large_potentials",),
        "log P near 0 as a difference of large numbers",
    ),
    Change(
        "fastdsm/log_projection.py",
        "better = torch.where(plan > _FROM_PLAN, plan.log(), found.detach())",
        "better = plan.log()",
        (f"{_LOG}::test_where_the_plan_underflows_it_does_not",),
        "the logarithm of a plan that underflows",
    ),
    Change(
        "fastdsm/pytorch/chunk.py",
        "_SINGLE_RANGE = 128.0",
        "_SINGLE_RANGE = 1e5",
        (f"{_LARGE}::test_the_oracles_plan",),
        "large logits in float32",
    ),
    Change(
        "fastdsm/pytorch/chunk.py",
        "least = S.masked_fill(S.isneginf(), torch.inf).amin(dims)  # of those that take part",
        "least = least.masked_fill(least.isneginf(), 0.0)",
        (f"{_LARGE}::test_options_gradients_and_neighbours",),
        "logits far below 0 under a mask in float32",
    ),
    Change(
        "fastdsm/pytorch/newton.py",
        "return (spread / WARM_RANGE).clamp(min=1.0).log2().ceil()",
        "return torch.zeros_like(spread)",
        (f"{_LARGE}::test_newtons_method_on_cold_costs",),
        "cold problems are not warmed",
    ),
    Change(
        "fastdsm/pytorch/newton.py",
        "halvings = torch.where(point.residual > COOLED_BELOW, _halvings(system), 0.0)",
        "halvings = _halvings(system)",
        (f"{_LARGE}::test_newtons_method_takes_a_good_start_as_it_is",),
        "a good start is warmed away",
    ),
    Change(
        "fastdsm/pytorch/implicit.py",
        "lost = g.abs().amax(at.line) * (_LOST * eps) > PURE_BELOW",
        "lost = g.abs().amax(at.line) * (_LOST * eps) > 1e30",
        (f"{_LARGE}::test_options_gradients_and_neighbours",),
        "implicit gradients at potentials that are rounded by 0.1",
    ),
    Change(
        "fastdsm/reference/__init__.py",
        "return col * torch.where(own > 0, total / own.where(own > 0, 1.0), 1.0)",
        "return col",
        ("tests/api/test_reference.py::test_columns_are_scaled_to_the_rows_total",),
        "the oracle's columns with a total of their own",
    ),
    Change(
        "fastdsm/_ops/arguments.py",
        "rows, cols = rows.where(row != 0, 0.0), cols.where(col != 0, 0.0)  # a line that is excluded has no gradient",
        "pass",
        (f"{_ARGUMENTS}::test_lines_without_mass_have_no_gradient",),
        "a gradient of lines without mass",
    ),
    Change(
        "fastdsm/_ops/masks.py",
        "return mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -torch.inf)",
        "return mask if bias is None else bias",
        ("tests/api/test_attention_masks.py::test_a_bool_mask_and_a_floating_padding_mask_hold_both",),
        "a bias in the place of a mask",
    ),
    Change(
        "fastdsm/pytorch/scalings.py",
        "if c != 1.0:  # else every sweep would multiply u by it, and divide v",
        "if False:",
        (f"{_FEW}::test_sides_of_very_different_length",),
        "factors that grow by n / m in every sweep",
    ),
    Change(
        "fastdsm/pytorch/scalings.py",
        "w = v if c == 1.0 else [x / c for x in v]",
        "w = v",
        (f"{_FEW}::test_sides_of_very_different_length",),
        "the adjoint of another column marginal",
    ),
    Change(
        "fastdsm/pytorch/sweeps.py",
        "torch.float32: Reach(20.0, 60.0, 45.0)",
        "torch.float32: Reach(20.0, 180.0, 45.0)",
        ("tests/ops/test_gradients.py::test_sizes_and_scales", "tests/ops/test_few_matrices.py::test_values_and_gradients"),
        "one K for logits whose exponentials underflow",
    ),
]
