"""Forward mode, and any nesting of modes: against differences of the float64 oracle's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp

import fastdsm
from fastdsm import reference
from tests.tolerances import assert_within

Function = Callable[..., Tensor]
MASK = torch.tensor([[True, False, True, True], [True, True, True, True], [True, True, True, False]])
BIASED = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
SHARED: dict[str, Any] = {"n_iters": 4, "mask": MASK}


class Case(NamedTuple):
    call: Function
    oracle: Function
    inputs: tuple[Tensor, ...]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def cases() -> dict[str, Case]:
    """Every public call, with the same from the oracle and inputs that all carry tangents."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(1)
    x, square, q, k, v = normal(2, 3, 4), normal(2, 4, 4), normal(1, 2, 3, 2), normal(1, 2, 3, 2), normal(1, 2, 3, 2)
    tau, row, col, f0 = normal(2).exp(), 1 + torch.rand(3).double(), 1 + torch.rand(4).double(), normal(2, 3)
    plan = reference.sinkhorn(square, n_iters=50)
    assert isinstance(plan, Tensor)
    bias, padding = normal(3, 3), torch.tensor([[False, True, False]])
    torch.random.set_rng_state(generator)

    def of(module: Any, **options: Any) -> Function:
        return lambda a: module.sinkhorn(a, **options)

    def weighed(module: Any) -> Function:
        def call(a: Tensor, tau: Tensor, f0: Tensor, r: Tensor, c: Tensor) -> Tensor:
            found, info = module.sinkhorn(
                a, temperature=tau, f0=f0, row_marginal=r.expand(2, 3), col_marginal=(c * (r.sum() / c.sum())).expand(2, 4),
                return_info=True, **SHARED,
            )  # fmt: skip
            return torch.cat([found.flatten(), info.f.flatten(), info.g.flatten()])

        return call

    def attended(module: Any) -> Function:
        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor) -> Tensor:
            out = module.sinkhorn_attention(
                q, k, v, bias.expand(1, 2, 3, 3), temperature=tau.unsqueeze(0), key_padding_mask=padding, first="row"
            )
            return out

        return call

    long = {"n_iters": 400}
    return {
        "sweeps": Case(of(fastdsm, n_iters=5), of(reference, n_iters=5), (x,)),
        "rows first, no sweep": Case(of(fastdsm, first="row", n_iters=0), of(reference, first="row", n_iters=0), (x,)),
        "everything": Case(weighed(fastdsm), weighed(reference), (x, tau, f0, row, col)),
        "tol": Case(of(fastdsm, n_iters=50, tol=1e-3), of(reference, n_iters=50, tol=1e-3), (x,)),
        "newton": Case(
            lambda a, t, r: fastdsm.sinkhorn(a, solver="newton", temperature=t, row_marginal=r, mask=MASK),
            lambda a, t, r: reference.sinkhorn(a, temperature=t, row_marginal=r.expand(2, 3), mask=MASK, **long),
            (x, tau, row),
        ),
        "implicit": Case(of(fastdsm, grad="implicit", first="row", **long), of(reference, first="row", **long), (x,)),
        "log": Case(
            lambda a: fastdsm.log_sinkhorn(a, n_iters=5, temperature=0.1),
            lambda a: reference.log_sinkhorn(a, n_iters=5, temperature=0.1),
            (x,),
        ),
        "sigma2": Case(fastdsm.sigma2, reference.sigma2, (plan,)),
        "sigma2 by power": Case(lambda p: fastdsm.sigma2(p, method="power"), reference.sigma2, (plan,)),
        "sinkhorn_sigma2": Case(
            lambda a: fastdsm.sinkhorn_sigma2(a, n_iters=5, mask=MASK).sigma2,
            lambda a: reference.sinkhorn_sigma2(a, n_iters=5, mask=MASK).sigma2,
            (x,),
        ),
        "newton's sigma2": Case(
            lambda a, t: fastdsm.sinkhorn_sigma2(a, solver="newton", temperature=t).sigma2,
            lambda a, t: reference.sinkhorn_sigma2(a, temperature=t, **long).sigma2,
            (square, tau),
        ),
        "round_to_birkhoff": Case(
            fastdsm.round_to_birkhoff, lambda p: fastdsm.round_to_birkhoff(p), (square.softmax(-1) * tau[:, None, None],)
        ),
        "attention": Case(attended(fastdsm), attended(reference), (q, k, v, bias, tau)),
        "attention of one head, by a mask, with tol": Case(
            lambda *a: fastdsm.sinkhorn_attention(*a, BIASED, tol=1e-2, n_iters=9),
            lambda q, *a: reference.sinkhorn_attention(q, *a, BIASED.expand(1, 2, 3, 3), tol=1e-2, n_iters=9),
            (q, k, v),
        ),
        "implicit attention": Case(
            lambda *a: fastdsm.sinkhorn_attention(*a, tol=1e-12, grad="implicit", **long),
            lambda *a: reference.sinkhorn_attention(*a, **long),
            (q, k, v),
        ),
        "attention's sigma2": Case(
            lambda *a: fastdsm.sinkhorn_attention_sigma2(*a, accuracy=1e-10),
            lambda *a: reference.sinkhorn_attention_sigma2(*a, n_iters=3),
            (q, k),
        ),
    }  # fmt: skip


CASES = cases()


def tangents_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in inputs)


def along(function: Function, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Callable[[Any], Tensor]:
    """The function on a line."""
    return lambda s: function(*(x + s * t for x, t in zip(inputs, tangents, strict=True)))


def dual(function: Function, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents)))


@pytest.mark.parametrize("name", CASES)
def test_tangents(name: str) -> None:
    call, oracle, inputs = CASES[name]
    tangents = tangents_of(inputs)
    line, h = along(oracle, inputs, tangents), 1e-5
    expected = (line(h) - line(-h)) / (2 * h)
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            value, tangent = dual(call, inputs, tangents)
            torch.testing.assert_close(value, call(*inputs), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(tangent, expected, **close)
    torch.testing.assert_close(jvp(call, inputs, tangents)[1], expected, **close)
    several = tuple(torch.stack([t, -2 * t]) for t in tangents)
    found = torch.vmap(lambda *t: jvp(call, inputs, t)[1])(*several)
    torch.testing.assert_close(found, torch.stack([expected, -2 * expected]), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(jacfwd(along(call, inputs, tangents))(torch.zeros((), dtype=torch.float64)), expected, **close)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_by_any_nesting(name: str) -> None:
    call, oracle, inputs = CASES[name]
    tangents = tangents_of(inputs)
    exact, line, h = along(oracle, inputs, tangents), along(call, inputs, tangents), 1e-4
    expected = (exact(h) - 2 * exact(0.0) + exact(-h)) / h**2
    at = torch.zeros((), dtype=torch.float64)
    for nest in (
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
    ):
        torch.testing.assert_close(nest(line)(at), expected, rtol=1e-5, atol=1e-5)
    leaf = at.clone().requires_grad_()
    found = torch.autograd.grad(line(leaf).sum(), leaf, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(found, leaf)[0], expected.sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_cotangent_with_a_tangent(name: str) -> None:
    """Forward mode over a backward whose forward knew of none, and in place of it a backward's, of cotangents that are zero."""
    call, _, inputs = CASES[name]
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    out = call(*leaves)
    cotangent, direction = torch.randn_like(out), torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, direction, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, leaves, forward_ad.make_dual(cotangent, direction))
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(x).tangent for x in found), expected)
    tangents = tangents_of(inputs)
    _, twice = torch.autograd.functional.jvp(call, inputs, tangents)
    torch.testing.assert_close(twice, jvp(call, inputs, tangents)[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["sweeps", "newton", "sinkhorn_sigma2"])
def test_gradcheck(name: str) -> None:
    call, _, inputs = CASES[name]
    leaves = tuple(x[:1, :3, :3].clone().requires_grad_() if x.dim() > 2 else x.clone().requires_grad_() for x in inputs)
    if name == "newton":
        leaves, call = leaves[:1], lambda a: fastdsm.sinkhorn(a, solver="newton")
    elif name == "sinkhorn_sigma2":
        call = lambda a: fastdsm.sinkhorn_sigma2(a, n_iters=3).sigma2  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True)


def test_hessians() -> None:
    x = normal(3, 3)

    def loss(project: Any) -> Function:
        return lambda a: (project.sinkhorn(a, n_iters=5) ** 3).sum()

    expected = jacrev(jacrev(loss(reference)))(x)
    torch.testing.assert_close(torch.func.hessian(loss(fastdsm))(x), expected)
    found = torch.autograd.functional.hessian(loss(fastdsm), x, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("solver", ["sinkhorn", "newton"])
def test_values_and_tangents_keep_the_policy(solver: str, backend: str, dtype: torch.dtype) -> None:
    x, tangent = (5 * torch.randn(2, 4, 6, 6)).to(dtype)
    plain, truth = (
        dual(lambda a: reference.sinkhorn(a, solver=solver), (x.to(wide),), (tangent.to(wide),))
        for wide in (torch.float32, torch.float64)
    )
    found = dual(lambda a: fastdsm.sinkhorn(a, solver=solver, n_iters=20, backend=backend), (x,), (tangent,))
    assert found[0].dtype == found[1].dtype == dtype
    assert_within(found[0], truth[0], plain[0].to(dtype))
    assert_within(found[1], truth[1], plain[1].to(dtype), cotangent=tangent)


def test_what_is_not_differentiable_carries_no_tangent() -> None:
    x = normal(3, 4, 4)
    with forward_ad.dual_level():
        a = forward_ad.make_dual(x, torch.randn_like(x))
        _, info = fastdsm.sinkhorn(a, tol=1e-3, return_info=True)
        spectrum = fastdsm.sigma2(a.exp(), return_vectors=True)
        fixed = [info.residual, info.converged, info.sweeps, *spectrum[1:], *fastdsm.sigma2_bounds(a.exp())]
        assert all(forward_ad.unpack_dual(y).tangent is None for y in fixed)
        assert forward_ad.unpack_dual(info.f).tangent is not None
        assert forward_ad.unpack_dual(spectrum[0]).tangent is not None
        assert forward_ad.unpack_dual(fastdsm.sinkhorn(x)).tangent is None


def test_a_bad_matrix_and_masked_entries_spoil_no_other() -> None:
    x, tangent = torch.randn(2, 3, 4, 4)
    x[0, 0, 0], x[1, 2, 3] = torch.inf, torch.nan
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[1, 2, 3] = False
    for options in ({"n_iters": 5}, {"solver": "newton"}):
        value, found = dual(lambda a, o=options: fastdsm.sinkhorn(a, mask=mask, **o), (x,), (tangent,))
        assert found is not None
        assert bool(value[0].isnan().all())
        assert bool(found[1:].isfinite().all())
        assert bool((found[1, 2, 3] == 0).all())


def test_what_lies_on_padded_lines_is_never_used() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 3)
    padding = torch.tensor([[False, False, True, False]])
    spoilt = [x.masked_fill(padding[:, None, :, None], torch.nan) for x in (k, v)]
    tangents = tangents_of((q, k, v))
    expected, found = (
        dual(lambda *x: fastdsm.sinkhorn_attention(*x, key_padding_mask=padding), (q, *others), tangents)
        for others in ((k, v), spoilt)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("lines", [0, 2])
def test_nothing_to_project(lines: int) -> None:
    shape = (0, 2, 3, 2) if lines else (1, 2, 0, 2)
    q = torch.empty(shape)
    value, tangent = dual(lambda a: fastdsm.sinkhorn_attention(a, a, a), (q,), (q,))
    assert value.shape == shape
    assert tangent is None or tangent.shape == shape
    x = torch.empty(0, 3, 3)
    for options in ({}, {"solver": "newton"}):
        assert dual(lambda a, o=options: fastdsm.sinkhorn_sigma2(a, **o).sigma2, (x,), (x,))[0].shape == (0,)


def test_dropout_is_a_clear_error() -> None:
    q = torch.randn(1, 2, 4, 3)
    with pytest.raises(NotImplementedError, match=r'forward-mode.*dropout_p=0.*backend="reference"'):
        dual(lambda a: fastdsm.sinkhorn_attention(a, a, a, dropout_p=0.5), (q,), (q,))


@pytest.mark.parametrize("name", ["sweeps", "newton", "sigma2", "attention"])
def test_compiled(name: str) -> None:
    """Inside a compiled function, and around one."""
    call, _, inputs = CASES[name]
    torch._dynamo.reset()
    tangents = tangents_of(inputs)
    _, expected = jvp(call, inputs, tangents)
    compiled = torch.compile(call, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs))
    torch.testing.assert_close(dual(compiled, inputs, tangents)[1], expected)
    inside = torch.compile(lambda x, t: jvp(call, x, t)[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(inputs, tangents), expected)
