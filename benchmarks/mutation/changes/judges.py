"""Changes of what judges: the verification, the oracle's budgets, the benchmark's harness and its promises."""

from ..change import Change

_PLANTED, _CLI, _BENCH = "tests/cli/test_planted_errors.py", "tests/cli/test_cli.py", "tests/static/test_bench.py"

VERIFICATION = [
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'record("forward", "plan", call.plan, truth.plan, plain.plan)',
        'record("forward", "plan", truth.plan, truth.plan, plain.plan)',
        (f"{_PLANTED}::test_an_error_in_one_quantity",),
        "no plan is compared",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'record("forward", "residual", call.info.residual,',
        'record("forward", "residual", truth.info.residual,',
        (f"{_PLANTED}::test_an_error_in_one_quantity",),
        "no residual is compared",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'record("forward", "plan beside sigma2", fused.plan,',
        'record("forward", "plan beside sigma2", call.plan,',
        (f"{_PLANTED}::test_an_error_in_one_quantity",),
        "the plan beside sigma2 is another call's",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'record("gradient", quantity, call.gradients[name], gradient,',
        'record("gradient", quantity, gradient, gradient,',
        (f"{_PLANTED}::test_an_error_in_the_gradient_of_one_operand",),
        "no gradient is compared",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'record("sigma2", "sigma2 of the call", fused.sigma2,',
        'record("sigma2", "sigma2 of the call", expected,',
        (f"{_PLANTED}::test_an_error_in_one_quantity",),
        "no fused sigma2 is compared",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        "outside = torch.maximum(lower - truth, truth - upper).clamp(min=0.0)",
        "outside = (lower - truth).clamp(min=0.0)",
        (f"{_PLANTED}::test_an_upper_bound_below_the_truth",),
        "upper bounds go unseen",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        "case, upper - lower, allowed)",
        "case, lower - lower, allowed)",
        (f"{_PLANTED}::test_an_error_in_one_quantity",),
        "the gap of the bounds goes unseen",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        "for name, gradient in truth.gradients.items():",
        'for name, gradient in [("logits", truth.gradients["logits"])]:',
        (f"{_PLANTED}::test_quantities_of_a_projection",),
        "gradients of marginals, temperature and f0 go unseen",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        "allowed = 2 * error + FLOOR[torch.float32] * size",
        "allowed = 4 * error + FLOOR[torch.float32] * size",
        (f"{_CLI}::test_budget_of_each_dtype",),
        "twice the budget",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        "excess.append(tol - before.residual.item())",
        "excess.append(0.0 * before.residual.item())",
        (f"{_CLI}::test_stopping_early_and_late_are_misses",),
        "stopping late goes unseen",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        "share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf).flatten()",
        "share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=0.0, posinf=torch.inf).flatten()",
        (f"{_PLANTED}::test_nan_in_one_entry",),
        "NaN is the least of errors",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'elif case.option == "f0":\n        options["f0"] = torch.randn(',
        'elif case.option == "f0":\n        options["f0"] = torch.zeros(',
        (f"{_PLANTED}::test_an_option_of_a_projection_is_one",),
        "an f0 that is the default",
    ),
    Change(
        "fastdsm/_verify/sinkhorn.py",
        'elif case.option == "one marginal":',
        'elif case.option == "a marginal":',
        (f"{_PLANTED}::test_an_option_of_a_projection_is_one",),
        "an option that is none",
    ),
    Change(
        "fastdsm/_verify/attention.py",
        'elif case.option == "bias":',
        'elif case.option == "a bias":',
        (f"{_PLANTED}::test_an_option_of_attention_is_one",),
        "an option that is none",
    ),
    Change(
        "fastdsm/_verify/attention.py",
        "keys[0, M // 2 :], queries[-1, : N // 3] = True, True",
        "keys[0, M // 2 :], queries[-1, : N // 3] = True, False",
        (f"{_PLANTED}::test_an_option_of_attention_is_one",),
        "no padded query",
    ),
    Change(
        "fastdsm/_verify/attention.py",
        'record("attention", "sigma2", found.sigma2,',
        'record("attention", "sigma2", truth.sigma2,',
        (f"{_PLANTED}::test_an_error_in_one_quantity_of_attention",),
        "no sigma2 of attention is compared",
    ),
    Change(
        "fastdsm/_verify/attention.py",
        "found.gradients[name], gradient, plain.gradients[name]",
        "gradient, gradient, plain.gradients[name]",
        (f"{_PLANTED}::test_quantities_of_attention",),
        "no gradient of attention is compared",
    ),
    Change(
        "fastdsm/_verify/newton.py",
        'worst(target, "newton", "plan", case, (plan.detach().cpu().double() - truth).abs(), of_plan)',
        'worst(target, "newton", "plan", case, (truth - truth).abs(), of_plan)',
        (f"{_PLANTED}::test_an_error_in_a_converged_plan",),
        "no converged plan is compared",
    ),
]

HARNESS = [
    Change(
        "benchmarks/harness.py",
        "bounds[-1] = case.gradient_tolerance",
        "bounds[-1] = None",
        (f"{_BENCH}::test_a_right_output_with_a_wrong_gradient_is_left_out",),
        "a wrong gradient is timed",
    ),
    Change(
        "benchmarks/harness.py",
        "(case.checked(out).double() - true).abs().nan_to_num(nan=torch.inf)",
        "(case.checked(out).double() - true).abs().nan_to_num(nan=0.0)",
        (f"{_BENCH}::test_a_right_output_with_a_wrong_gradient_is_left_out",),
        "a gradient that is NaN is timed",
    ),
    Change(
        "benchmarks/harness.py",
        'elif implementation.name in ("fastdsm", "eager"):',
        'elif implementation.name in ("eager",):',
        (f"{_BENCH}::test_a_wrong_output_of_our_own_stops_the_measurement",),
        "our own wrong output is left out like a peer's",
    ),
    Change(
        "benchmarks/memory.py",
        "return max(accumulate(changes), default=0)",
        "return max(changes, default=0)",
        (f"{_BENCH}::test_peak_memory_counts_what_lives_at_once",),
        "the largest piece of memory, and not what lives at once",
    ),
    Change(
        "benchmarks/static/report.py",
        'for name in ("stack_bytes", "local_bytes", "spill_instructions") if row[name]]',
        'for name in ("stack_bytes", "local_bytes") if row[name]]',
        ("tests/static/test_static.py::test_a_spill_is_a_fault",),
        "spills without a stack go unseen",
    ),
    Change(
        "fastdsm/_interrupts.py",
        "os._exit(128 + signal.SIGINT)",
        "raise KeyboardInterrupt",
        (f"{_CLI}::test_an_interrupt_while_torch_is_imported",),
        "a traceback of what was being imported",
    ),
]

JUDGES = [*VERIFICATION, *HARNESS]
