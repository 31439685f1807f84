"""The sweeps of the attention kernels, interpreted, against dense float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.static.launches import recorded
from fastdsm._ops.problem import Attention, Potentials
from fastdsm.kernels.attention import launch as attention

from ..attention_cases import AXES, BRAIN, DOUBLE, HALF, OPTIONS, SINGLE, Case, case, empty
from ..tolerances import assert_within


def check_lse(c: Case) -> None:
    for over, dim, like in (("cols", -1, c.f), ("rows", -2, c.g)):
        truth, plain = (c.exponent(dtype).logsumexp(dim) for dtype in (DOUBLE, SINGLE))
        excluded = truth == -torch.inf
        for online in (True, False):
            out = empty(*like.shape, dtype=DOUBLE)
            attention.lse(c.problem, over, c.at, online, out)
            assert (out[excluded] == -torch.inf).all()
            assert_within(out[~excluded].float(), truth[~excluded], plain[~excluded])


@pytest.mark.parametrize("option", OPTIONS)
def test_lse(option: str) -> None:
    check_lse(case(option))


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_lse_of_16_bits(dtype: torch.dtype, option: str) -> None:
    check_lse(case(option, dtype))


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 40, 20), (40, 1, 3), (33, 34, 8)])
def test_lse_of_any_size(n: int, m: int, d: int) -> None:
    check_lse(case("plain", SINGLE, n, m, d, columns_first=False))


@pytest.mark.parametrize("over", AXES)
def test_a_large_lse_is_kept_beyond_float32(over: str) -> None:
    """Logits near 300 that the base 2 holds exactly: a float32 store would round by 1e-5."""
    eye, zero = torch.eye(8).expand(1, 2, 8, 8), torch.zeros(1, 2, 8)
    problem = Attention(eye, eye * 433.0, 1.0, math.log2(math.e))
    out = empty(1, 2, 8, dtype=DOUBLE)
    attention.lse(problem, over, Potentials(zero, zero, zero, zero, True), True, out)
    assert (out - 433.0 * math.log(2.0)).abs().max() < 1e-6


@pytest.mark.parametrize("over", AXES)
@pytest.mark.parametrize("count", [3, 322, 775])
def test_the_logarithm_of_a_sum_is_no_coarser_than_the_sum(count: int, over: str) -> None:
    """Of terms of 1. The machine's own log2 errs by up to 2^-22 (PTX ISA, ``lg2.approx``); rounded to float32, 8.3 by 2^-21."""
    lines, streams = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, count, 1)
    query, key = (lines, streams) if over == "cols" else (streams, lines)
    at = Potentials(*(x.squeeze(-1) for x in (query, key, query, key)), True)
    for online in (True, False):
        out = empty(1, 1, 2, dtype=DOUBLE)
        attention.lse(Attention(query, key, 1.0), over, at, online, out)
        assert (out - math.log(count)).abs().max() <= 2.0**-22 * math.log(2.0)


@pytest.mark.parametrize("over", AXES)
def test_heads_that_are_not_active_keep_their_result(over: str) -> None:
    c = case()
    active = torch.tensor([[True, False, True, False], [False, True, True, True]])
    full, some = (torch.full_like(c.f if over == "cols" else c.g, 7.0) for _ in range(2))
    attention.lse(c.problem, over, c.at, True, full)
    attention.lse(c.problem, over, c.at, True, some, active)
    assert torch.equal(some[active], full[active])
    assert (some[~active] == 7).all()


def check_sweep(c: Case, over: str) -> None:
    dim, lines, others = (-1, c.f, c.g) if over == "cols" else (-2, c.g, c.f)
    active = torch.ones(lines.shape[:2], dtype=torch.bool)
    for online in (True, False):
        out, other = empty(*lines.shape, dtype=DOUBLE), empty(*others.shape, dtype=DOUBLE)
        assert attention.sweep(c.problem, over, c.at, online, out, other, active)
        sums = []
        for dtype in (DOUBLE, SINGLE):
            y = c.exponent(dtype)
            line = y.logsumexp(dim, keepdim=True)
            sums.append((line.squeeze(dim), (y - line.nan_to_num(neginf=0.0)).logsumexp(-3 - dim)))
        for found, truth, plain in zip((out, other), *sums, strict=True):
            excluded = truth == -torch.inf
            assert (found[excluded] == -torch.inf).all()
            assert_within(found[~excluded].float(), truth[~excluded], plain[~excluded])


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("option", ["plain", "strided", "padding", "temperature"])
@pytest.mark.parametrize("over", AXES)
def test_a_sweep_in_one_pass(dtype: torch.dtype, option: str, over: str) -> None:
    check_sweep(case(option, dtype, columns_first=over == "cols"), over)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (200, 3, 5), (70, 130, 20), (3, 300, 80)])
def test_a_sweep_in_one_pass_of_any_size(n: int, m: int, d: int) -> None:
    check_sweep(case("plain", BRAIN, n, m, d), "cols")


def test_a_sweep_in_one_pass_of_long_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WHOLE_PROGRAMS", 16)
    c = case("plain", BRAIN, 200, 6, 5)
    check_sweep(c, "cols")
    with recorded() as launches:
        attention.sweep(c.problem, "cols", c.at, True, empty(*c.f.shape, dtype=DOUBLE), c.g, torch.ones(2, 4, dtype=torch.bool))
    tiles = {launch.arguments["chunk"] // launch.configuration.constants["BLOCK_S"] for launch in launches}
    assert tiles in ({3}, {2})  # 2 of Hopper's, which are larger


def test_a_sweep_in_one_pass_leaves_other_heads_alone() -> None:
    c = case("plain", BRAIN)
    active = torch.tensor([[True, False, True, False], [False, True, True, True]])
    results = [(empty(*c.f.shape, dtype=DOUBLE), empty(*c.g.shape, dtype=DOUBLE)) for _ in range(2)]
    c.problem.query[~active] = torch.nan
    for found, mask in zip(results, (torch.ones_like(active), active), strict=True):
        assert attention.sweep(c.problem, "cols", c.at, False, *found, mask)
    for full, some in zip(*results, strict=True):
        assert full[active].isfinite().all()
        assert torch.equal(full[active], some[active])


@pytest.mark.parametrize(("option", "dtype", "m", "d"), [("mask", BRAIN, 33, 16), ("plain", SINGLE, 33, 16),
                                                         ("plain", HALF, 513, 16), ("plain", HALF, 33, 129)])  # fmt: skip
def test_what_one_pass_does_not_serve_is_left_alone(option: str, dtype: torch.dtype, m: int, d: int) -> None:
    c = case(option, dtype, 5, m, d)
    out, other = torch.full_like(c.f, 7.0), torch.full_like(c.g, 7.0)
    assert not attention.sweep(c.problem, "cols", c.at, True, out, other, torch.ones(2, 4, dtype=torch.bool))
    assert (out == 7).all()
    assert (other == 7).all()


@pytest.mark.parametrize("columns_first", [True, False])
def test_potentials_are_added_in_one_order_whichever_side_is_streamed(columns_first: bool) -> None:
    """One entry a line, beside one base so large, and the other so small, that another order would round it differently."""
    mask = torch.eye(33, dtype=torch.bool).expand(1, 1, 33, 33)
    query, key, zero = torch.ones(1, 1, 33, 1), torch.rand(1, 1, 33, 1), torch.zeros(1, 1, 33)
    at = Potentials(torch.randn(1, 1, 33) * 1e4, torch.randn(1, 1, 33), zero, zero, columns_first)
    outs = [empty(1, 1, 33, dtype=DOUBLE) for _ in AXES]
    for over, out in zip(AXES, outs, strict=True):
        attention.lse(Attention(query, key, 1.0, mask=mask), over, at, True, out)
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


@pytest.mark.parametrize("where", ["query", "key"])
def test_poison_stays_in_its_head(where: str) -> None:
    c = case()
    clean, touched = (empty(*c.f.shape, dtype=DOUBLE) for _ in range(2))
    attention.lse(c.problem, "cols", c.at, False, clean)
    getattr(c.problem, where)[0, 1, 3, 2] = torch.nan
    attention.lse(c.problem, "cols", c.at, False, touched)
    poisoned = torch.zeros(2, 4, dtype=torch.bool)
    poisoned[0, 1 if where == "query" else slice(2, 4)] = True
    assert torch.equal(clean[~poisoned], touched[~poisoned])
    assert touched[poisoned].isnan().any(-1).all()


@pytest.mark.parametrize(("precision", "expected"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_is_multiplied_as_pytorch_is_told(precision: str, expected: str) -> None:
    c, before = case(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with recorded() as launches:
            attention.lse(c.problem, "cols", c.at, True, empty(*c.f.shape, dtype=DOUBLE))
    finally:
        torch.set_float32_matmul_precision(before)
    assert [launch.configuration.constants["PRECISION"] for launch in launches] == [expected]
