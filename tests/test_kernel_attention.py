"""The attention kernels, interpreted, against dense float64 formulas; and their machine code against the promised numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.static.compilation import compile_configuration, disassemble, kernel_name
from benchmarks.static.launches import recorded
from fastdsm.kernels import attention
from fastdsm.kernels.configuration import Configuration
from fastdsm.problem import Attention, Dropout, Potentials, Terms

from .tolerances import assert_within
from .uninterpreted import rows_of

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
AXES = ("cols", "rows")
OPTIONS = ("plain", "bias", "half bias", "broadcast bias", "mask", "padding", "temperature", "strided", "everything")


def make(option: str = "plain", dtype: torch.dtype = SINGLE, n: int = 17, m: int = 33, d: int = 16) -> Attention:
    """Two batches, four query heads, two key heads; NaN lies under every mask and padding."""
    b, h, g = 2, 4, 2
    every = option == "everything"
    problem = Attention(torch.randn(b, h, n, d).to(dtype), torch.randn(b, g, m, d).to(dtype), d**-0.5, 0.7)
    if option == "strided" or every:  # (B, N, H, d) storage, and lines that are no whole vectors
        query = torch.randn(b, n, h, d + 1).to(dtype)[..., 1:].transpose(1, 2)
        key = torch.randn(b, m, g, 2 * d).to(dtype)[..., ::2].transpose(1, 2)
        problem = replace(problem, query=query, key=key)
    if option == "bias" or every:
        bias = torch.randn(b, h, m, n).mT
        bias[0, 1, 3, :] = -torch.inf
        problem = replace(problem, bias=bias)
    if option == "half bias":
        problem = replace(problem, bias=torch.randn(b, h, n, m).to(HALF))
    if option == "broadcast bias":
        problem = replace(problem, bias=torch.randn(1, h, 1, m).to(dtype).expand(b, h, n, m))
    if option == "mask" or every:
        mask = torch.rand(b, 1, n, m) < 0.7
        mask[1, :, 2], mask[0, :, :, 4] = False, False
        problem = replace(problem, mask=mask.expand(b, h, n, m))
        if problem.bias is not None:
            problem.bias[~problem.mask] = torch.nan
    if option == "padding" or every:
        query_padding, key_padding = torch.rand(b, n) < 0.2, torch.rand(b, m) < 0.2
        query_padding[1, 0], key_padding[0, m - 1] = True, True
        problem = replace(problem, query_padding=query_padding, key_padding=key_padding)
        problem.query.masked_fill_(query_padding[:, None, :, None], torch.nan)
        problem.key.masked_fill_(key_padding[:, None, :, None], torch.nan)
        if problem.bias is not None:
            problem.bias.masked_fill_(key_padding[:, None, None, :], torch.nan)
    if option == "temperature" or every:
        problem = replace(problem, temperature=torch.rand(b, h) + 0.5)
    return problem


def heads(x: Tensor, problem: Attention) -> Tensor:
    """(B, G, ...) repeated to the query heads."""
    return x.repeat_interleave(problem.query.shape[1] // problem.key.shape[1], 1)


def groups(x: Tensor, problem: Attention) -> Tensor:
    """(B, H, ...) summed over the query heads of each key head."""
    return x.unflatten(1, (problem.key.shape[1], -1)).sum(2)


def logits(problem: Attention, dtype: torch.dtype) -> Tensor:
    """S (B, H, N, M) in ``dtype``."""
    query, key, padding = problem.query, problem.key, torch.zeros((), dtype=torch.bool)
    if problem.query_padding is not None and problem.key_padding is not None:
        query = query.masked_fill(problem.query_padding[:, None, :, None], 0)
        key = key.masked_fill(problem.key_padding[:, None, :, None], 0)
        padding = problem.query_padding[:, None, :, None] | problem.key_padding[:, None, None, :]
    tau = problem.temperature[..., None, None] if isinstance(problem.temperature, Tensor) else problem.temperature
    s = query.to(dtype) @ heads(key, problem).to(dtype).mT * problem.scale
    if problem.bias is not None:
        s = s + problem.bias.to(dtype)
    s = s / tau
    if problem.mask is not None:
        s = s.masked_fill(~problem.mask, -torch.inf)
    return s.masked_fill(padding, -torch.inf)


@dataclass
class Case:
    """A problem, and potentials of a plan whose rows are exact."""

    problem: Attention
    at: Potentials

    @property
    def f(self) -> Tensor:
        return self.at.f_base.double() + self.at.f_fine

    @property
    def g(self) -> Tensor:
        return self.at.g_base.double() + self.at.g_fine

    def exponent(self, dtype: torch.dtype) -> Tensor:
        """S + f + g in the order that is promised."""
        return exponent(self.problem, self.at, dtype)

    def plan(self, dtype: torch.dtype) -> Tensor:
        return self.exponent(dtype).exp()


def exponent(problem: Attention, at: Potentials, dtype: torch.dtype) -> Tensor:
    f, f_fine, g, g_fine = (x.to(dtype) for x in (at.f_base, at.f_fine, at.g_base, at.g_fine))
    first, last = (g[:, :, None], f[..., None]) if at.columns_first else (f[..., None], g[:, :, None])
    return ((logits(problem, dtype) + first) + last) + (f_fine[..., None] + g_fine[:, :, None])


def case(
    option: str = "plain", dtype: torch.dtype = SINGLE, n: int = 17, m: int = 33, d: int = 16, columns_first: bool = True
) -> Case:
    problem = make(option, dtype, n, m, d)
    s = logits(problem, DOUBLE)
    g = -s.logsumexp(-2)
    g = torch.where(g == torch.inf, 0.0, g)
    f = -(s + g[:, :, None]).logsumexp(-1)
    f = torch.where(f == torch.inf, 0.0, f)
    f_base, g_base = ((x + torch.randn_like(x) * 0.3).float() for x in (f, g))
    return Case(problem, Potentials(f_base, g_base, (f - f_base).float(), (g - g_base).float(), columns_first))


def empty(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


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
    assert {launch.arguments["chunk"] // launch.configuration.constants["BLOCK_S"] for launch in launches} == {3}


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
    """One entry a line, and bases so large that another order would round it differently."""
    mask = torch.eye(33, dtype=torch.bool).expand(1, 1, 33, 33)
    query, key, zero = torch.ones(1, 1, 33, 1), torch.rand(1, 1, 33, 1), torch.zeros(1, 1, 33)
    f = torch.randn(1, 1, 33) * 1e4
    at = Potentials(f, -f + torch.randn(1, 1, 33), zero, zero, columns_first)
    outs = [empty(1, 1, 33, dtype=DOUBLE) for _ in AXES]
    for over, out in zip(AXES, outs, strict=True):
        attention.lse(Attention(query, key, 1.0, mask=mask), over, at, False, out)
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


def values(problem: Attention, e: int, dtype: torch.dtype, side: str) -> Tensor:
    """Vectors on the keys (B, G, M, e) or on the queries (B, H, N, e), NaN on padding."""
    lines = problem.key if side == "key" else problem.query
    padding = problem.key_padding if side == "key" else problem.query_padding
    x = torch.randn(*lines.shape[:3], e).to(dtype)
    return x if padding is None else x.masked_fill(padding[:, None, :, None], torch.nan)


def product(plan: Tensor, x: Tensor, problem: Attention, over: str) -> Tensor:
    """What ``apply`` is to leave, in the dtype of the plan."""
    x = x.nan_to_num(0.0).to(plan.dtype)
    return plan @ heads(x, problem) if over == "cols" else groups(plan.mT @ x, problem)


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
def test_tiles_of_hopper(dtype: torch.dtype, columns_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps, the last one ragged."""
    monkeypatch.setattr(Configuration, "on", lambda self, device: self.own or self)
    c = case("plain", dtype, 70, 90, columns_first=columns_first)
    check_apply(c, 8, dtype, SINGLE)
    check_attend(c, 8)
    check_gradient(c, 8, (2,))


@pytest.mark.parametrize(("kind", "dtype"), [("plain", HALF), ("everything", BRAIN)])
def test_features_beyond_a_program_of_hopper(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs have fewer features than their block."""
    monkeypatch.setattr(Configuration, "on", lambda self, device: self.own or self)
    c = case(kind, dtype, 70, 33, 200)
    check_apply(c, 72, dtype, SINGLE)
    check_apply(c, 72, SINGLE, SINGLE)
    check_gradient(c, 72, (2,))


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


def factors(c: Case, dropout: Dropout) -> Tensor:
    """Z (B, H, N, M), by applying the plan to the identity."""
    b, h, n, _ = c.problem.query.shape
    m = c.problem.key.shape[2]
    out = empty(b, h, n, m)
    eye = torch.eye(m).expand(b, c.problem.key.shape[1], m, m)
    attention.apply(c.problem, "cols", c.at, eye, dropout, out)
    return (out / c.plan(DOUBLE) * (1 - dropout.p)).nan_to_num(0.0).round() / (1 - dropout.p)


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


def test_gradient_of_many_terms() -> None:
    check_gradient(case("plain", SINGLE, 9, 12), counts=(18, 1, 2))


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


def _machine_code() -> list[dict[str, Any]]:
    """Numbers for sm_90 of what bfloat16 of 64 features launches, plain. In a process of its own: see ``rows``."""
    rows = []
    for configuration in attention.configurations():
        constants = configuration.constants
        if configuration.label.startswith("bf16") and constants["BLOCK_D"] == 64 and not constants.get("ENTRIES", False):
            if constants.get("HAS_DROPOUT", False) or "sm_90" not in configuration.targets:
                continue
            resources, sass = disassemble(compile_configuration(configuration, "sm_90").cubin)
            row = {"kernel": kernel_name(configuration), "kind": constants.get("KIND", ""), **asdict(resources)}
            logits = constants["BLOCK_L"] * constants["BLOCK_S"] // (32 * configuration.num_warps)
            rows.append({**row, "exponentials": sass.count("MUFU.EX2") / logits, "hgmma": sass.count("HGMMA")})
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of("test_kernel_attention", "_machine_code")


def test_no_kernel_spills_and_all_use_tensor_cores(rows: list[dict[str, Any]]) -> None:
    assert len({row["kernel"] for row in rows}) == 7
    assert [row for row in rows if row["stack"] or row["local"] or not row["hgmma"]] == []


def test_a_half_sweep_takes_one_exponential_per_logit(rows: list[dict[str, Any]]) -> None:
    taken = [row["exponentials"] for row in rows if row["kind"] in ("bounded", "weighted") or "attend" in row["kernel"]]
    assert len(taken) == 5
    assert set(taken) == {1.0}


def test_a_whole_sweep_takes_no_more(rows: list[dict[str, Any]]) -> None:
    taken = [row["exponentials"] for row in rows if "whole" in row["kernel"]]
    assert len(taken) == 6
    assert set(taken) == {1.0}
