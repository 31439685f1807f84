"""grad="implicit": against the limit of the unrolled gradient, the float64 oracle and finite differences, to second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastdsm
from fastdsm import reference
from fastdsm._verify.sinkhorn import gradient_size
from fastdsm.pytorch import laplacian

Call = Callable[..., Any]


def gradients(call: Call, leaves: dict[str, Tensor], cotangent: Tensor, **options: object) -> dict[str, Tensor]:
    """Of sum(plan * cotangent) in every leaf."""
    copies = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    rest = dict(copies)
    plan = call(rest.pop("logits"), **rest, **options)
    return dict(zip(copies, torch.autograd.grad(plan, list(copies.values()), cotangent.to(plan.dtype)), strict=True))


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (9, 7)])
def test_the_limit_of_the_sweeps_gradient(size: tuple[int, int], first: str) -> None:
    """Autograd through 300 sweeps of the oracle knows nothing of fixed points. Marginals one by one and together."""
    n, m = size
    row, col = torch.rand(5, n, dtype=torch.float64) + 0.3, torch.rand(5, m, dtype=torch.float64) + 0.3
    row[:, 1] = 0.0
    col = col * (row.sum(-1) / col.sum(-1)).unsqueeze(-1)
    mask = torch.ones(n, m, dtype=torch.bool)
    mask[0, 2] = False
    base = {"logits": torch.randn(5, n, m, dtype=torch.float64), "temperature": torch.rand(5, dtype=torch.float64) + 0.7}
    cotangent = torch.randn(5, n, m, dtype=torch.float64)
    for extra in ({}, {"row_marginal": row}, {"col_marginal": col}, {"row_marginal": row, "col_marginal": col}):
        leaves, options = base | extra, {"first": first, "mask": mask}
        truth = gradients(reference.sinkhorn, leaves, cotangent, n_iters=300, **options)
        for how in ({"solver": "newton"}, {"grad": "implicit", "n_iters": 300}):
            found = gradients(fastdsm.sinkhorn, leaves, cotangent, **how, **options)
            for name, slope in found.items():
                expected = torch.where(leaves[name] == 0, 0.0, truth[name])
                torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-9, msg=lambda s, n=name: f"{n}: {s}")


@pytest.mark.parametrize("size", [4, 16, 40])
def test_float32_against_the_float64_limit(size: int) -> None:
    """At logit std 2, within 1e-4 of the gradient's largest entry, every matrix by itself."""
    logits = torch.randn(1000 if size == 4 else 40, size, size) * 2
    cotangent = torch.randn_like(logits)
    truth = gradients(reference.sinkhorn, {"logits": logits.double()}, cotangent, solver="newton")["logits"]
    found = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, solver="newton")["logits"]
    error = (found.double() - truth).abs().amax((-2, -1)) / truth.abs().amax((-2, -1))
    assert error.max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    leaves = {"logits": (torch.randn(20, 4, 4) * 2).to(dtype), "temperature": torch.rand(20) + 0.5}
    cotangent = torch.randn(20, 4, 4).to(dtype)
    wide = {name: x.double() for name, x in leaves.items()}
    truth = gradients(reference.sinkhorn, wide, cotangent, solver="newton")
    found = gradients(fastdsm.sinkhorn, leaves, cotangent, solver="newton")
    assert found["logits"].dtype == dtype
    torch.testing.assert_close(found["logits"], truth["logits"].to(dtype))
    torch.testing.assert_close(found["temperature"], truth["temperature"].float(), rtol=1e-4, atol=1e-5)


def test_near_permutations() -> None:
    """Logit std 8: plans whose sigma2 is 1 but for less than float32 sees keep the gradient of the oracle."""
    logits = torch.randn(200, 4, 4) * 8
    cotangent = torch.randn_like(logits)
    truth = gradients(reference.sinkhorn, {"logits": logits.double()}, cotangent, solver="newton")["logits"]
    found = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, solver="newton", n_iters=40)["logits"]
    assert (found.double() - truth).abs().max() <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize(
    ("size", "how"), [((3, 4), {"solver": "newton"}), ((8, 7), {"solver": "newton"}), ((2, 3), {"grad": "implicit"})]
)
def test_numerically(size: tuple[int, int], how: dict[str, Any]) -> None:
    n, m = size
    logits = torch.randn(1, n, m, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    row = (torch.rand(1, n, dtype=torch.float64) + 0.3).requires_grad_()

    def call(logits: Tensor, temperature: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        found = fastdsm.sinkhorn_sigma2(logits, temperature=temperature, row_marginal=row, tol=1e-13, n_iters=200, **how)
        return found.plan, found.sigma2

    assert gradcheck(call, (logits, temperature, row))
    if n < 8:
        assert gradgradcheck(call, (logits, temperature, row), atol=1e-4)


def test_double_backward_of_a_mixed_loss() -> None:
    """Against the oracle's autograd, and that against 60 unrolled sweeps; a constant cotangent beside a varying one."""
    seconds = []
    logits = torch.randn(3, 4, 4, dtype=torch.float64)
    for call, options in (
        (fastdsm.sinkhorn, {"solver": "newton"}),
        (reference.sinkhorn, {"solver": "newton"}),
        (reference.sinkhorn, {"n_iters": 60}),
    ):
        leaf = logits.clone().requires_grad_()
        plan = call(leaf, **options)
        (first,) = torch.autograd.grad((plan * torch.arange(4.0)).sum() + (plan**3).sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad((first**2).sum(), leaf)[0])
    torch.testing.assert_close(seconds[0], seconds[1])
    torch.testing.assert_close(seconds[1], seconds[2], rtol=1e-6, atol=1e-8)


def test_f0_has_no_gradient_and_masks_are_never_read() -> None:
    logits = torch.randn(3, 4, 4, requires_grad=True)
    f0 = torch.randn(3, 4, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1], mask[2, 3] = False, False
    plan = fastdsm.sinkhorn(logits, f0=f0, mask=mask, solver="newton")
    entropy = -(plan * plan.log()).masked_fill(~mask, 0.0).sum()  # NaN cotangent under the mask
    slope, start = torch.autograd.grad(entropy, (logits, f0))
    assert bool(slope.isfinite().all())
    assert bool((slope[:, ~mask] == 0).all())
    assert bool((start == 0).all())


@pytest.mark.parametrize("size", [4, 12])
def test_a_broken_matrix_stays_alone(size: int) -> None:
    logits = torch.randn(40, size, size)
    cotangent = torch.randn_like(logits)
    clean = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, solver="newton")["logits"]
    logits[1, 0, 0] = torch.nan
    for how in ({"solver": "newton"}, {"grad": "implicit", "n_iters": 100}):
        found = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, **how)["logits"]
        assert bool(found[1].isnan().all())
        keep = torch.arange(40) != 1
        torch.testing.assert_close(found[keep], clean[keep], rtol=1e-5, atol=1e-6)


def test_the_error_of_what_has_not_converged() -> None:
    """What the docstring says: it shrinks with the residual, and plans far from converged are differentiated wrongly."""
    logits, cotangent = torch.randn(200, 4, 4, dtype=torch.float64), torch.randn(200, 4, 4, dtype=torch.float64)
    limit = gradients(reference.sinkhorn, {"logits": logits}, cotangent, solver="newton")["logits"]
    errors = []
    for n_iters in (1, 3, 10, 100):
        found = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, grad="implicit", n_iters=n_iters)["logits"]
        errors.append((found - limit).abs().max())
    assert errors[0] > 1e-2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


@pytest.mark.parametrize(
    ("backend", "shape"),
    [("torch", (20, 4, 4)), ("torch", (10, 9, 7)), ("torch", (4, 16, 16)), ("triton", (20, 4, 4)), ("triton", (3, 9, 7))],
)
def test_of_a_residual_that_a_newton_step_squares(backend: str, shape: tuple[int, ...]) -> None:
    """Plans that sweeps leave at 1e-3 have the gradient of the fixed point.

    k = residual / (1 - sigma2^2) is the error of the potentials, k^2 what a Newton step leaves of it, and of the gradient
    that over 1 - sigma2^2; without the step it would be k over that. Logits rounded to u add what ``_verify.newton`` derives.
    """
    for std in (0.5, 1.0):
        logits, cotangent = torch.randn(shape) * std, torch.randn(shape)
        truth = gradients(reference.sinkhorn, {"logits": logits.double()}, cotangent, solver="newton")["logits"]
        options = {"n_iters": 100, "tol": 1e-3, "backend": backend}
        found = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, grad="implicit", **options)["logits"]
        residual = fastdsm.sinkhorn(logits, return_info=True, **options)[1].residual.double()
        assert residual.max() > 5e-5
        gap = 1 - reference.sigma2(reference.sinkhorn(logits.double(), solver="newton")).square()
        k, u = residual / gap, 2 * torch.finfo(torch.float32).eps * logits.abs().amax().item() / gap
        allowed = (k.square() + u) / gap * gradient_size(truth, cotangent)
        assert ((found.double() - truth).abs().amax((-2, -1)) <= allowed).all()


def test_condition_number() -> None:
    """A logit moves no entry by more than 1 / (1 - sigma2^2) times the largest; and some by a share that shows."""
    worst = []
    for std in (1.0, 4.0):
        logits = torch.randn(300, 2, 2, dtype=torch.float64) * std
        jacobian = torch.vmap(torch.func.jacrev(lambda x: fastdsm.sinkhorn(x, solver="newton")))(logits)
        plan = fastdsm.sinkhorn(logits, solver="newton")
        gap = 1 - reference.sigma2(plan) ** 2
        direct = plan.amax((-2, -1))
        amplified = jacobian.flatten(-2).flatten(1, 2).abs().amax((-2, -1)) / direct
        assert bool((amplified <= 1 / gap).all())
        worst.append(amplified.max())
    assert worst[1] > 0.1


def test_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, cotangent = torch.randn(3, 20, 20) * 2, torch.randn(3, 20, 20)
    truth = gradients(reference.sinkhorn, {"logits": logits.double()}, cotangent, solver="newton")["logits"]
    monkeypatch.setattr(laplacian, "DIRECT_MAX_SIDE", 6)
    found = gradients(fastdsm.sinkhorn, {"logits": logits}, cotangent, solver="newton")["logits"]
    torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-5)


def test_the_oracle_as_a_backend() -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for how in ({"solver": "newton"}, {"grad": "implicit", "n_iters": 60}):
        found, expected = (fastdsm.sinkhorn_sigma2(logits, backend=x, **how) for x in ("reference", "auto"))
        torch.testing.assert_close(found.plan, expected.plan)
        slopes = [torch.autograd.grad(x.sigma2.sum(), logits)[0] for x in (found, expected)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(5, 4, 4), (2, 20, 40), (1, 70, 70)])
@pytest.mark.parametrize("first", ["col", "row"])
def test_a_plan_is_the_same_without_its_information(backend: str, shape: tuple[int, ...], first: str) -> None:
    logits = torch.randn(shape)
    options = {"n_iters": 8, "tol": 1e-4, "grad": "implicit", "first": first, "backend": backend}
    assert torch.equal(fastdsm.sinkhorn(logits, **options), fastdsm.sinkhorn(logits, return_info=True, **options)[0])


def curvature(logits: Tensor, cotangent: Tensor, direction: Tensor, **options: Any) -> Tensor:
    """The derivative of the gradient along ``direction``, by double backward."""
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fastdsm.sinkhorn(leaf, **options), leaf, cotangent, create_graph=True)
    return torch.autograd.grad(slope, leaf, direction)[0]


def central_curvature(logits: Tensor, cotangent: Tensor, direction: Tensor, mask: Tensor | None) -> Tensor:
    """The same of the fixed point, in float64, by central differences of the gradient."""
    h, options = 1e-4, {"solver": "newton", "n_iters": 200, "mask": mask}
    ends = ({"logits": logits.double() + x * direction.double()} for x in (h, -h))
    up, down = (gradients(fastdsm.sinkhorn, x, cotangent.double(), **options)["logits"] for x in ends)
    return (up - down) / (2 * h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["row of one", "triangular", "block", "no support"])
def test_second_derivatives_where_a_mask_forces_zeros(kind: str, dtype: torch.dtype) -> None:
    """Entries that fall to 0 though no mask takes them out cut the columns into parts, each of which is free by itself."""
    mask = torch.ones(6, 6, dtype=torch.bool)
    if kind == "row of one":
        mask[0, 1:] = False
    elif kind == "triangular":
        mask = mask.tril()
    else:
        mask[:3, 3 if kind == "block" else 2 :] = False
    logits, cotangent, direction = torch.randn(3, 20, 6, 6, dtype=dtype)
    truth = central_curvature(logits, cotangent, direction, mask)
    for n_iters, allowed in ((20, 1e-5), (3, 2e-2), (1, 2.0)):
        found = curvature(logits, cotangent, direction, solver="newton", n_iters=n_iters, mask=mask)
        assert ((found - truth).abs() <= allowed).all()


@pytest.mark.parametrize("std", [30.0, 100.0])
@pytest.mark.parametrize("size", [4, 8])
def test_second_derivatives_of_what_has_not_converged(size: int, std: float) -> None:
    """Finite, of the size of logits' curvature, in matrices of a batch that know nothing of each other."""
    logits, cotangent, direction = torch.randn(3, 20, size, size) * torch.tensor([std, 1.0, 1.0])[:, None, None, None]
    logits[0] = torch.randn(size, size)
    for options in ({"solver": "newton", "n_iters": 2}, {"grad": "implicit", "n_iters": 1}, {"grad": "implicit"}):
        found = curvature(logits, cotangent, direction, **options)
        assert (found.abs() < 20).all()
        alone = curvature(logits[:1], cotangent[:1], direction[:1], **options)
        torch.testing.assert_close(found[:1], alone)
        broken = logits.clone()
        broken[1] = torch.nan
        again = curvature(broken, cotangent, direction, **options)
        assert again[1].isnan().all()
        torch.testing.assert_close(again[2:], found[2:])


def test_second_derivatives_near_the_limit() -> None:
    """Their error falls with the residual, as that of the gradient does."""
    logits, cotangent, direction = torch.randn(3, 200, 4, 4, dtype=torch.float64)
    truth, errors = central_curvature(logits, cotangent, direction, None), []
    for n_iters in (1, 3, 10, 100):
        errors.append((curvature(logits, cotangent, direction, grad="implicit", n_iters=n_iters) - truth).abs().max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7
