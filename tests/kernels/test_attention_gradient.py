"""The attention kernels of the gradient, interpreted, against dense float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdsm._ops.problem import Attention, Dropout, Terms
from fastdsm.kernels.attention import launch as attention

from ..attention_cases import BRAIN, DOUBLE, HALF, OPTIONS, SINGLE, Case, case, empty, exponent, factors, groups, heads, values
from ..tolerances import assert_within


def some_terms(c: Case, counts: tuple[int, ...]) -> Terms:
    """A segment at the plan's potentials and others near them."""
    b, h, n, m = *c.f.shape, c.g.shape[2]
    near = [replace(c.at, f_fine=c.at.f_fine + 0.2 * s, g_fine=c.at.g_fine - 0.1 * s) for s in range(len(counts))]
    return Terms(c.at, near, torch.randn(b, h, sum(counts), n), torch.randn(b, h, sum(counts), m), list(counts))


def derivative(c: Case, terms: Terms, value: Tensor, grad_out: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dS (B, H, N, M)."""
    products = grad_out.nan_to_num(0.0).to(dtype) @ heads(value.nan_to_num(0.0), c.problem).to(dtype).mT
    dS = c.plan(dtype) * products * (1.0 if z is None else z.to(dtype))
    start = 0
    for at, count in zip(terms.segments, terms.counts, strict=True):
        x, y = (v[:, :, start : start + count].to(dtype) for v in (terms.x, terms.y))
        dS = dS - exponent(c.problem, at, dtype).exp() * (x.mT @ y)
        start += count
    return dS


def gradients(problem: Attention, dS: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    """What ``gradient`` is to leave; ``shape``: of the bias."""
    tau = problem.temperature
    dS = dS / (tau.to(dS.dtype)[..., None, None] if isinstance(tau, Tensor) else tau)
    query, key = (x.nan_to_num(0.0).to(dS.dtype) for x in (problem.query, problem.key))
    return {
        "query": dS @ heads(key, problem) * problem.scale,
        "key": groups(dS.mT @ query, problem) * problem.scale,
        "bias": dS.sum_to_size(shape),
    }


def check_gradient(
    c: Case, e: int = 5, counts: tuple[int, ...] = (1, 3), dropout: Dropout | None = None, bias: tuple[int, ...] = (0, 0, 0, 0)
) -> None:
    """``bias``: 1 in the dimensions that the bias is expanded over."""
    problem, dtype = c.problem, c.problem.query.dtype
    value, grad_out = values(problem, e, dtype, "key"), values(problem, e, dtype, "query")
    z = None if dropout is None else factors(c, dropout)
    terms = some_terms(c, counts)
    full = (*problem.query.shape[:3], problem.key.shape[2])
    shape = torch.Size(1 if one else size for one, size in zip(bias, full, strict=True))
    truth, plain = (gradients(problem, derivative(c, terms, value, grad_out, z, kind), shape) for kind in (DOUBLE, SINGLE))
    for which, like in (("query", problem.query), ("key", problem.key), ("bias", None)):
        out = empty(*shape) if like is None else empty(*like.shape, dtype=dtype)
        attention.gradient(problem, which, terms, value, grad_out, dropout, out)
        assert_within(out, truth[which], plain[which], cotangent=grad_out.nan_to_num(0.0))


@pytest.mark.parametrize("option", OPTIONS)
def test_gradient(option: str) -> None:
    check_gradient(case(option))


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_gradient_of_16_bits(dtype: torch.dtype) -> None:
    check_gradient(case("everything", dtype, columns_first=False), 8, (2,))


@pytest.mark.parametrize("expanded", [(1, 0, 0, 0), (1, 1, 0, 0), (0, 1, 1, 0), (1, 1, 0, 1), (0, 0, 1, 1)])
def test_gradient_of_an_expanded_bias(expanded: tuple[int, ...]) -> None:
    check_gradient(case(n=5, m=40), bias=expanded)


def test_gradient_with_dropout() -> None:
    check_gradient(case("everything"), dropout=Dropout(0.3, torch.tensor([5])))


@pytest.mark.parametrize(("n", "m", "d", "e"), [(1, 1, 1, 1), (3, 34, 3, 270)])
def test_gradient_of_any_size(n: int, m: int, d: int, e: int) -> None:
    check_gradient(case("plain", SINGLE, n, m, d), e, ())


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("columns_first", [True, False])
@pytest.mark.usefixtures("hopper")
def test_gradient_on_tiles_of_hopper(dtype: torch.dtype, columns_first: bool) -> None:
    """Several steps, the last one ragged."""
    check_gradient(case("plain", dtype, 70, 90, columns_first=columns_first), 8, (2,))


@pytest.mark.parametrize(("kind", "dtype"), [("plain", HALF), ("everything", BRAIN)])
@pytest.mark.usefixtures("hopper")
def test_gradient_of_features_beyond_a_program_of_hopper(kind: str, dtype: torch.dtype) -> None:
    """Some programs have fewer features than their block."""
    check_gradient(case(kind, dtype, 70, 33, 200), 72, (2,))


def test_gradient_of_many_terms() -> None:
    check_gradient(case("plain", SINGLE, 9, 12), counts=(18, 1, 2))


@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
def test_line_sums_of_products(option: str, dtype: torch.dtype) -> None:
    c = case(option, dtype, columns_first=option == "plain")
    value, grad_out = values(c.problem, 5, dtype, "key"), values(c.problem, 5, dtype, "query")
    dropout = Dropout(0.3, torch.tensor([5])) if option == "everything" else None
    z = None if dropout is None else factors(c, dropout)
    dS = [derivative(c, Terms(c.at, [], c.f, c.g, []), value, grad_out, z, kind) for kind in (DOUBLE, SINGLE)]
    for over, dim, like in (("cols", -1, c.f), ("rows", -2, c.g)):
        out = empty(*like.shape)
        attention.products(c.problem, over, c.at, value, grad_out, dropout, out)
        assert_within(out, *(x.sum(dim) for x in dS), cotangent=grad_out.nan_to_num(0.0))
