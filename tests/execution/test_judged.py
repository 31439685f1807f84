"""What judges calls that ``fastdsm verify`` leaves out: right results pass, and each kind of wrong one does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.execution import judged, judged_attention
from fastdsm._verify.attention import AttentionCase
from fastdsm._verify.newton import NewtonCase
from fastdsm._verify.sinkhorn import Case, Record, Target

TARGET = Target("torch", "cpu")
CASE = AttentionCase((1, 2, 1, 30, 20, 8, 5), torch.float32, 1.0, 3)
SINGLE, HALF = torch.float32, torch.float16
ATTENDED = {"output", "gradient of query", "gradient of key", "gradient of value"}
JUDGES = {
    "plan alone": partial(judged.plan_alone, Case((3, 4, 5), HALF, 2.0, 5)),
    "converged alone": partial(judged.converged_alone, NewtonCase((3, 5, 6), HALF, 2.0, 40)),
    "temperature": partial(judged.temperature, Case((3, 4, 5), SINGLE, 2.0)),
    "attention": partial(judged_attention.attention, CASE, first="row", precision="high"),
    "dropout": partial(judged_attention.attention, CASE, dropout=True),
    "sigma2 of attention": partial(judged_attention.sigma2, CASE),
}


def misses(judge: Callable[[Target], list[Record]]) -> set[str]:
    return {record.quantity for record in judge(TARGET) if not record.ok}


@pytest.mark.parametrize("name", JUDGES)
def test_right_results_pass(name: str) -> None:
    records = JUDGES[name](TARGET)
    assert [str(record) for record in records if not record.ok] == []
    assert max(record.share for record in records) > 0


def off(call: Callable[..., Any], by: float = 1.02) -> Callable[..., Any]:
    """What comes back, times ``by``."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = call(*arguments, **options)
        if isinstance(found, torch.Tensor):
            return found * by
        if hasattr(found, "_fields") or hasattr(found, "sigma2"):
            return type(found)(found.plan * by, found.sigma2 * by, *list(found)[2:])
        return found[0] * by, *found[1:]

    return wrong


@pytest.mark.parametrize(
    ("name", "module", "call", "missed"),
    [
        ("plan alone", judged, "sinkhorn", {"plan alone"}),
        ("converged alone", judged, "sinkhorn", {"plan alone"}),
        ("converged alone", judged, "sinkhorn_sigma2", {"plan beside sigma2", "sigma2"}),
        ("temperature", judged, "temperature_for_sigma2", {"sigma2 at the temperature"}),
        ("attention", judged_attention, "sinkhorn_attention", ATTENDED),
        ("dropout", judged_attention, "sinkhorn_attention", ATTENDED),
        (
            "sigma2 of attention",
            judged_attention,
            "sinkhorn_attention_sigma2",
            {"sigma2", "gradient of sigma2 in query", "gradient of sigma2 in key"},
        ),
    ],
)
def test_wrong_results_do_not(name: str, module: Any, call: str, missed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, call, off(getattr(module, call)))
    assert misses(JUDGES[name]) == missed


def test_a_temperature_that_is_not_reached_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "temperature_for_sigma2", lambda logits, *_, **__: (logits.new_full((3,), torch.nan), None))
    assert misses(JUDGES["temperature"]) == {"sigma2 at the temperature"}


def test_a_dropout_of_other_entries_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged_attention.torch, "manual_seed", lambda seed: None)
    assert "output" in misses(JUDGES["dropout"])


def test_products_in_tf32_have_operands_cut_to_ten_bits() -> None:
    x = torch.tensor([[1 + 2.0**-10 + 2.0**-11]])
    with judged_attention._TF32():
        assert (x @ x).item() == pytest.approx((1 + 2.0**-10) ** 2, abs=1e-7)
        assert (x.double() @ x.double()).item() == pytest.approx((1 + 2.0**-10 + 2.0**-11) ** 2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_of_attentions_sigma2_in_16_bits(backend: str, groups: int, dtype: torch.dtype) -> None:
    """Query heads that share a key head add to its gradient what has not been rounded."""
    case = AttentionCase((1, 2, groups, 30, 20, 24, 20), dtype, 2.0, 3, "bias")
    assert [record for record in judged_attention.sigma2(case, Target(backend, "cpu")) if not record.ok] == []
