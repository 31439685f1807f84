"""Changes of forward mode, of what calls are composed of there, and of numbers under torch.compile."""

from ..change import Change

_MODES, _OPERATORS = "tests/ops/test_forward_mode.py", "tests/ops/test_operators.py"
_TEMPERATURE = "tests/api/test_temperature.py::test_derivatives_in_either_mode_and_of_second_order"
_TANGENTS, _SECOND = f"{_MODES}::test_tangents", f"{_MODES}::test_second_derivatives_by_any_nesting"

_IMPLICIT, _GRADIENTS = "tests/ops/test_implicit.py", "tests/ops/test_gradients.py"

MODES = [
    Change(
        "fastdsm/reference/__init__.py",
        "for _ in range(3):",
        "for _ in range(1):",
        (f"{_IMPLICIT}::test_double_backward_of_a_mixed_loss",),
        "a second derivative of one chord step",
    ),
    Change(
        "fastdsm/reference/__init__.py",
        "aim = at.aim + (reached - at.aim).detach()",
        "aim = at.aim",
        (f"{_IMPLICIT}::test_second_derivatives_of_what_has_not_converged",),
        "derivatives on the way to marginals that a plan has not",
    ),
    Change(
        "fastdsm/projection.py",
        "tensors = (tensors[0].float(), *tensors[1:])",
        "tensors = (tensors[0], *tensors[1:])",
        (f"{_GRADIENTS}::test_of_sigma2_in_16_bits",),
        "singular vectors of a rounded plan",
    ),
    Change(
        "fastdsm/pytorch/spectrum_gradient.py",
        "(image / root + root * image.sum(-1, keepdim=True) / total)",
        "(image / root)",
        ("tests/api/test_spectrum.py::test_gradients_of_marginals",),
        "a total that does not change with its marginal",
    ),
    Change(
        "fastdsm/_ops/gradients.py",
        "return tuple(x + (y - z) for",
        "return tuple(x for",
        (f"{_MODES}::test_a_cotangent_with_a_tangent",),
        "a cotangent's tangent by vectors other than those found",
    ),
    Change(
        "fastdsm/_ops/plain.py",
        "if torch.compiler.is_compiling() or _C._are_functorch_transforms_active():",
        "if _C._are_functorch_transforms_active():",
        (f"{_MODES}::test_compiled",),
        "tangents inside a compiler are not looked for",
    ),
    Change(
        "fastdsm/_ops/composed.py",
        "return value + (slope - slope.detach()).to(value.dtype)",
        "return value + (slope.detach() - slope.detach()).to(value.dtype)",
        (f"{_TANGENTS}[newton]",),
        "a fixed point whose tangent is zero",
    ),
    Change(
        "fastdsm/_ops/composed.py",
        "tol=tol if tol >= 0 else None,",
        "tol=None,",
        (f"{_TANGENTS}[tol]",),
        "sweeps past the tolerance where there are tangents",
    ),
    Change(
        "fastdsm/_ops/composed.py",
        "met = value if key_padding is None else value.masked_fill(key_padding[:, None, :, None], 0.0)",
        "met = value",
        (f"{_MODES}::test_what_lies_on_padded_lines_is_never_used",),
        "padded values where there are tangents",
    ),
    Change(
        "fastdsm/_ops/attention_gradients.py",
        "options, stored = inputs[TENSORS:], torch.is_grad_enabled()",
        "options, stored = inputs[TENSORS:], False",
        (f"{_SECOND}[attention's sigma2]",),
        "second derivatives of attention's sigma2 by vectors that stay",
    ),
    Change(
        "fastdsm/_ops/temperature_search.py",
        "    for _ in range(2):\n        tau = tau - ",
        "    for _ in range(1):\n        tau = tau - ",
        (_TEMPERATURE,),
        "one chord step, whose second derivative is wrong",
    ),
    Change(
        "fastdsm/_ops/attention_gradients.py",
        "return (gradient * x.nan_to_num(0.0, 0.0, 0.0)).sum(",
        "return torch.where(gradient == 0, 0.0, gradient * x).sum(",
        (f"{_MODES}::test_a_cotangent_with_a_tangent[attention]",),
        "a temperature's gradient that is cut where the cotangent is zero",
    ),
    Change(
        "fastdsm/_ops/arguments.py",
        "return torch.ones(shape, dtype=compute_dtype(like.dtype), device=like.device) * number",
        "return torch.full(shape, number, dtype=compute_dtype(like.dtype), device=like.device)",
        (f"{_OPERATORS}::test_float_temperatures_do_not_compile_anew",),
        "a fill with a number that torch.compile has as a symbol",
    ),
]  # fmt: skip
