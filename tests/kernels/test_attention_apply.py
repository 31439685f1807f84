"""The attention kernels that multiply by the plan, interpreted, against dense float64 formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastdsm._ops.problem import Dropout
from fastdsm.kernels.attention import launch as attention

from ..attention_cases import AXES, BRAIN, DOUBLE, HALF, OPTIONS, SINGLE, Case, case, empty, factors, product, values
from ..tolerances import assert_within


def check_apply(c: Case, e: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for over in AXES:
        x = values(c.problem, e, dtype, "key" if over == "cols" else "query")
        lines = c.problem.query if over == "cols" else c.problem.key
        out = empty(*lines.shape[:3], e, dtype=out_dtype)
        attention.apply(c.problem, over, c.at, x, None, out)
        assert_within(out, *(product(c.plan(kind), x, c.problem, over) for kind in (DOUBLE, SINGLE)))


@pytest.mark.parametrize("option", OPTIONS)
def test_apply(option: str) -> None:
    check_apply(case(option), 5, SINGLE, SINGLE)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("x_dtype", ["same", SINGLE])
@pytest.mark.parametrize("out_dtype", ["same", SINGLE])
def test_apply_of_16_bits(dtype: torch.dtype, x_dtype: torch.dtype | str, out_dtype: torch.dtype | str) -> None:
    kinds = (dtype if kind == "same" else kind for kind in (x_dtype, out_dtype))
    check_apply(case("everything", dtype, columns_first=False), 8, *kinds)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("columns_first", [True, False])
@pytest.mark.usefixtures("hopper")
def test_tiles_of_hopper(dtype: torch.dtype, columns_first: bool) -> None:
    """Several steps, the last one ragged."""
    c = case("plain", dtype, 70, 90, columns_first=columns_first)
    check_apply(c, 8, dtype, SINGLE)
    check_attend(c, 8)


@pytest.mark.parametrize(("kind", "dtype"), [("plain", HALF), ("everything", BRAIN)])
@pytest.mark.usefixtures("hopper")
def test_features_beyond_a_program_of_hopper(kind: str, dtype: torch.dtype) -> None:
    """Some programs have fewer features than their block."""
    c = case(kind, dtype, 70, 33, 200)
    check_apply(c, 72, dtype, SINGLE)
    check_apply(c, 72, SINGLE, SINGLE)


@pytest.mark.parametrize(("n", "m", "d", "e"), [(1, 1, 1, 1), (40, 3, 5, 17), (3, 40, 20, 40)])
def test_apply_of_any_size(n: int, m: int, d: int, e: int) -> None:
    check_apply(case("plain", SINGLE, n, m, d), e, SINGLE, SINGLE)


@pytest.mark.parametrize("power", [60, -60])
def test_float16_vectors_meet_plans_beyond_its_range(power: int) -> None:
    c = case("plain", HALF)
    x = values(c.problem, 8, HALF, "key")
    far = Case(c.problem, replace(c.at, f_base=c.at.f_base + power * math.log(2.0)))
    out = empty(*c.problem.query.shape[:3], 8)
    attention.apply(c.problem, "cols", far.at, x, None, out)
    truth, plain = (product(far.plan(kind), x, c.problem, "cols") * 2.0**-power for kind in (DOUBLE, SINGLE))
    assert_within(out * 2.0**-power, truth, plain)


def check_attend(c: Case, e: int) -> None:
    value = values(c.problem, e, c.problem.query.dtype, "key")
    sums = [c.exponent(kind) for kind in (DOUBLE, SINGLE)]
    truth, plain = (s.logsumexp(-1) for s in sums)
    excluded = truth == -torch.inf
    for online in (True, False):
        out, line = empty(*c.problem.query.shape[:3], e, dtype=value.dtype), empty(*c.f.shape, dtype=DOUBLE)
        attention.attend(c.problem, c.at, online, value, None, out, line)
        assert (line[excluded] == -torch.inf).all()
        assert_within(line[~excluded].float(), truth[~excluded], plain[~excluded])
        assert_within(out, *(product(s.softmax(-1).nan_to_num(0.0), value, c.problem, "cols") for s in sums))


@pytest.mark.parametrize("option", OPTIONS)
def test_attend(option: str) -> None:
    check_attend(case(option), 5)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_attend_of_16_bits(dtype: torch.dtype, option: str) -> None:
    check_attend(case(option, dtype), 40)


def test_dropout_draws_each_entry_alike_in_both_orientations() -> None:
    c = case()
    dropout = Dropout(0.3, torch.tensor([1 << 40]))
    z = factors(c, dropout)
    kept = z > 0
    assert z[kept].unique().tolist() == pytest.approx([1 / 0.7])
    assert abs(kept.double().mean() - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    assert not torch.equal(kept[0, 0], kept[0, 1]), "heads draw their own"
    assert not torch.equal(kept, factors(c, replace(dropout, seed=torch.tensor([1]))) > 0)
    x = torch.randn(*c.problem.query.shape[:3], 5)
    out = empty(*c.problem.key.shape[:3], 5)
    attention.apply(c.problem, "rows", c.at, x, dropout, out)
    assert_within(out, *(product(z.to(kind) * c.plan(kind), x, c.problem, "rows") for kind in (DOUBLE, SINGLE)))


def test_attend_drops_the_product_alone() -> None:
    c = case("everything")
    dropout = Dropout(0.5, torch.tensor([3]))
    value = values(c.problem, 4, SINGLE, "key")
    out, line = empty(*c.problem.query.shape[:3], 4), empty(*c.f.shape, dtype=DOUBLE)
    attention.attend(c.problem, c.at, False, value, dropout, out, line)
    sums = [c.exponent(kind) for kind in (DOUBLE, SINGLE)]
    z = factors(c, dropout)
    plans = [s.softmax(-1).nan_to_num(0.0) for s in sums]
    assert_within(out, *(product(z.to(p.dtype) * p, value, c.problem, "cols") for p in plans))
    truth, plain = (s.logsumexp(-1) for s in sums)
    used = truth > -torch.inf
    assert_within(line[used].float(), truth[used], plain[used])


def test_everything_dropped_is_zero() -> None:
    c = case()
    out = empty(*c.problem.query.shape[:3], 2)
    attention.apply(c.problem, "cols", c.at, values(c.problem, 2, SINGLE, "key"), Dropout(1.0, torch.tensor([3])), out)
    assert (out == 0).all()


@pytest.mark.parametrize("option", OPTIONS)
def test_weigh(option: str) -> None:
    c = case(option)
    for over, like, result in (("cols", c.g, c.f), ("rows", c.f, c.g)):
        w, out = torch.randn(like.shape), empty(*result.shape)
        attention.weigh(c.problem, over, c.at, w, out)
        plans = [c.plan(kind) if over == "cols" else c.plan(kind).mT for kind in (DOUBLE, SINGLE)]
        assert_within(out, *((plan @ w.to(plan.dtype)[..., None])[..., 0] for plan in plans))
