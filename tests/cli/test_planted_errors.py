"""What ``fastdsm verify`` compares: every quantity is there, an error planted in one is a miss of that one alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdsm._verify import attention as attention_verification
from fastdsm._verify import mhc as mhc_verification
from fastdsm._verify import newton as newton_verification
from fastdsm._verify import sinkhorn as verification
from fastdsm._verify.attention import AttentionCase, verify_attention_case
from fastdsm._verify.mhc import MhcCase, verify_mhc_case
from fastdsm._verify.newton import NewtonCase, verify_newton_case
from fastdsm._verify.sinkhorn import Case, Target, verify_case

CPU = Target("torch", "cpu")
OFF = 1.001  # a thousandth
Call = Callable[..., Any]

FOUND = {
    "plan", "residual", "gradient of logits", "plan beside sigma2", "sigma2 of the call", "sigma2 of a plan",
    "sigma2 outside its bounds", "gap of the bounds",
}  # fmt: skip
OF_OPTIONS = {
    "": set(),
    "row first": set(),
    "temperature": {"gradient of temperature"},
    "marginals": {"gradient of row_marginal", "gradient of col_marginal"},
    "one marginal": {"gradient of col_marginal"},
    "mask": set(),
    "f0": {"gradient of f0"},
    "tol": {"stopping at tol"},
}
OF_ATTENTION = {
    "": set(),
    "row first": set(),
    "bias": {"gradient of attn_mask"},
    "mask": set(),
    "padding": set(),
    "temperature": {"gradient of temperature"},
}
ATTENDED = {"output", "residual", "sigma2", "gradient of query", "gradient of key", "gradient of value"}


def case_of(option: str) -> Case:
    return Case((3, 4, 6), torch.float32, 1.0, 12 if option == "tol" else 2, option)


def attention_case_of(option: str) -> AttentionCase:
    return AttentionCase((2, 2, 1, 5, 4, 3, 2), torch.float32, 1.0, 2, option)


def amplified(x: Tensor) -> Tensor:
    """The same value with a gradient that is a thousandth too large."""
    return OFF * x - (OFF - 1) * x.detach()


def with_gradient_off(call: Call, name: str) -> Call:
    """``call`` whose gradient in the operand ``name`` alone is off; of the first, ``logits`` or ``query``, by position."""

    def wrong(*leading: Tensor, **options: Any) -> Any:
        leading = tuple(amplified(x) if name == "logits" else x for x in leading)
        return call(*leading, **{key: amplified(x) if key == name else x for key, x in options.items()})

    return wrong


def with_value_off(call: Call, change: Callable[[Any], Any]) -> Call:
    return lambda *tensors, **options: change(call(*tensors, **options))


def shifted(x: Tensor) -> Tensor:
    """Off by a thousandth of the largest entry, everywhere; the gradient as it was."""
    return x + (OFF - 1) * x.detach().abs().amax()


PLANTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "plan": ("sinkhorn", lambda found: (shifted(found[0]), found[1])),
    "residual": ("sinkhorn", lambda found: (found[0], found[1]._replace(residual=OFF * found[1].residual))),
    "plan beside sigma2": ("sinkhorn_sigma2", lambda found: found._replace(plan=shifted(found.plan))),
    "sigma2 of the call": ("sinkhorn_sigma2", lambda found: found._replace(sigma2=OFF * found.sigma2)),
    "sigma2 of a plan": ("sigma2", lambda found: OFF * found),
    "sigma2 outside its bounds": ("sigma2_bounds", lambda found: (OFF * found[0], OFF * found[1])),
    "gap of the bounds": ("sigma2_bounds", lambda found: (found[0], (1 + 2 * (OFF - 1)) * found[1])),
}


def missed(records: list[verification.Record]) -> set[str]:
    return {record.quantity for record in records if not record.ok}


@pytest.mark.parametrize("option", OF_OPTIONS)
def test_quantities_of_a_projection(option: str) -> None:
    records = verify_case(case_of(option), CPU)
    assert missed(records) == set()
    assert {record.quantity for record in records} == FOUND | OF_OPTIONS[option]
    assert len(records) == len(FOUND | OF_OPTIONS[option])


@pytest.mark.parametrize("quantity", PLANTED)
def test_an_error_in_one_quantity(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = PLANTED[quantity]
    monkeypatch.setattr(verification, name, with_value_off(getattr(verification, name), change))
    assert missed(verify_case(case_of(""), CPU)) == {quantity}


def test_nan_in_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside entries whose errors are within their budgets."""

    def spoilt(found: Any) -> Any:
        hole = torch.zeros_like(found[0])
        hole[1, 2, 3] = torch.nan
        return found[0] + hole, found[1]

    monkeypatch.setattr(verification, "sinkhorn", with_value_off(verification.sinkhorn, spoilt))
    assert "plan" in missed(verify_case(case_of(""), CPU))


def test_an_upper_bound_below_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted below in both bounds; above, :data:`PLANTED` has it."""
    lowered = with_value_off(verification.sigma2_bounds, lambda found: (found[0] / OFF, found[1] / OFF))
    monkeypatch.setattr(verification, "sigma2_bounds", lowered)
    assert missed(verify_case(case_of(""), CPU)) == {"sigma2 outside its bounds"}


@pytest.mark.parametrize("option", OF_OPTIONS)
@pytest.mark.parametrize("name", ["logits", "temperature", "row_marginal", "col_marginal", "f0"])
def test_an_error_in_the_gradient_of_one_operand(option: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the option has no such operand, nothing is missed. What stops too early or late, ``test_cli`` plants."""
    monkeypatch.setattr(verification, "sinkhorn", with_gradient_off(verification.sinkhorn, name))
    assert missed(verify_case(case_of(option), CPU)) == {f"gradient of {name}"} & (FOUND | OF_OPTIONS[option])


def test_every_quantity_has_an_error_planted() -> None:
    assert {"gradient of logits", *PLANTED} == FOUND
    assert set(verification.OPTIONS) | {""} == set(OF_OPTIONS)
    assert set(attention_verification._OPTIONS) | {""} == set(OF_ATTENTION)


@pytest.mark.parametrize("option", OF_ATTENTION)
def test_quantities_of_attention(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, attention = attention_case_of(option), attention_verification.sinkhorn_attention
    records = verify_attention_case(case, CPU)
    quantities = ATTENDED | OF_ATTENTION[option]
    assert missed(records) == set()
    assert {record.quantity for record in records} == quantities
    for quantity in quantities - {"output", "residual", "sigma2"}:
        wrong = with_gradient_off(attention, quantity.removeprefix("gradient of "))
        monkeypatch.setattr(attention_verification, "sinkhorn_attention", wrong)
        assert missed(verify_attention_case(case, CPU)) == {quantity}


@pytest.mark.parametrize(
    ("quantity", "name", "change"),
    [
        ("output", "sinkhorn_attention", lambda found: (shifted(found[0]), found[1])),
        ("residual", "sinkhorn_attention", lambda found: (found[0], found[1]._replace(residual=OFF * found[1].residual))),
        ("sigma2", "sinkhorn_attention_sigma2", lambda found: OFF * found),
    ],
)
def test_an_error_in_one_quantity_of_attention(
    quantity: str, name: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_verification, name, with_value_off(getattr(attention_verification, name), change))
    assert missed(verify_attention_case(attention_case_of(""), CPU)) == {quantity}


def test_an_error_in_a_converged_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    case = NewtonCase((2, 4, 4), torch.float32, 1.0, 30)
    wrong = with_value_off(newton_verification.sinkhorn, PLANTED["plan"][1])
    monkeypatch.setattr(newton_verification, "sinkhorn", wrong)
    assert missed(verify_newton_case(case, CPU)) == {"plan"}


def test_an_option_of_a_projection_is_one() -> None:
    """Beside the plain case the same logits and cotangent, and the operands that the option names, none of them its default."""
    logits, plain, cotangent = verification.inputs(case_of(""))
    names = {"row first": {"first"}, "marginals": {"row_marginal", "col_marginal"}, "one marginal": {"col_marginal"}}
    for option in verification.OPTIONS:
        case = case_of(option)
        with_it = verification.inputs(Case(case.shape, case.dtype, case.std, 2, option))
        assert torch.equal(with_it[0], logits)
        assert torch.equal(with_it[2], cotangent)
        extra = {name: x for name, x in with_it[1].items() if name not in plain}
        assert set(extra) == names.get(option, {option})
        for x in extra.values():
            assert x in ("row", 1e-3) if not isinstance(x, Tensor) else x.flatten().unique().numel() > 1
        if option == "mask":
            assert not extra["mask"][0, 0].any()
            assert not extra["mask"][0, :, -1].any()
            assert extra["mask"].any()


def test_an_option_of_attention_is_one() -> None:
    """Beside the plain case the same query, key, value and cotangent, and the operands that the option names."""
    plain, cotangent = attention_verification._inputs(attention_case_of(""), "cpu")
    names = {
        "row first": {"first"}, "bias": {"attn_mask"}, "mask": {"attn_mask"},
        "padding": {"key_padding_mask", "query_padding_mask"}, "temperature": {"temperature"},
    }  # fmt: skip
    for option in attention_verification._OPTIONS:
        with_it, same = attention_verification._inputs(attention_case_of(option), "cpu")
        assert torch.equal(same, cotangent)
        assert all(torch.equal(with_it[name], plain[name]) for name in ("query", "key", "value"))
        extra = {name: x for name, x in with_it.items() if name not in plain}
        assert set(extra) == names[option]
        for name, x in extra.items():
            assert x == "row" if name == "first" else x.flatten().unique().numel() > 1
            if option in ("mask", "padding"):
                assert x.dtype == torch.bool
    mask = attention_verification._inputs(attention_case_of("mask"), "cpu")[0]["attn_mask"]
    assert not mask[0].any()
    assert not mask[:, -1].any()


@pytest.mark.parametrize("option", ["deepseek", "post pre", "shifted", "head"])
def test_quantities_of_a_layer(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result and each gradient, and an error in one alone."""
    case, called = MhcCase((3, 4, 5), torch.float32, 1.0, 20, option), mhc_verification._called
    results = {"h"} if option == "head" else {"h", "post", "comb", "streams"}
    operands = {"residual", "fn", "scale", "base"} | (set() if option == "head" else {"x"})
    operands |= {"weights", "comb"} if option in ("post pre", "shifted") else set()
    operands |= {"mixes"} if option == "shifted" else set()
    records = verify_mhc_case(case, CPU)
    assert missed(records) == set()
    assert {record.quantity for record in records} == results | {f"gradient of {name}" for name in operands}

    def with_off(result: str, operand: str) -> Call:
        def wrong(case: MhcCase, backend: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
            found = called(case, backend, {name: amplified(x) if name == operand else x for name, x in given.items()})
            return {name: shifted(x) if name == result else x for name, x in found.items()}

        return wrong

    for result in results:
        monkeypatch.setattr(mhc_verification, "_called", with_off(result, ""))
        assert missed(verify_mhc_case(case, CPU)) == {result}
    for operand in operands:
        monkeypatch.setattr(mhc_verification, "_called", with_off("", operand))
        assert missed(verify_mhc_case(case, CPU)) == {f"gradient of {operand}"}
