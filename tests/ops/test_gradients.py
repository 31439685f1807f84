"""Gradients: the adjoint of the PyTorch path against autograd through the oracle, to first and second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastdsm
from fastdsm import reference
from fastdsm._verify.sinkhorn import budget, gradient_size, half_ulp

from ..tolerances import assert_within


def gradient(call: object, logits: Tensor, cotangent: Tensor, **options: object) -> Tensor:
    """Of sum(plan * cotangent) in the logits."""
    leaf = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(call(leaf, **options), leaf, cotangent)  # type: ignore[operator]
    return found


def check(logits: Tensor, **options: object) -> None:
    cotangent = torch.randn(logits.shape).to(logits.dtype)
    truth, plain = (
        gradient(reference.sinkhorn, logits.to(dtype), cotangent.to(dtype), **options)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within(gradient(fastdsm.sinkhorn, logits, cotangent, **options), truth, plain, cotangent=cotangent)


@pytest.mark.parametrize("std", [0.1, 1.0, 8.0, 50.0, 200.0])
@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (300, 2, 2), (3, 4, 4), (300, 4, 4), (700, 8, 5), (4, 16, 16), (3, 33, 20), (2, 64, 64)]
)
def test_sizes_and_scales(shape: tuple[int, ...], std: float) -> None:
    for n_iters in (0, 1, 3, 20, 100):
        check(torch.randn(shape) * std, n_iters=n_iters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    check((torch.randn(300, 4, 4) * 2).to(dtype))
    check((torch.randn(4, 20, 20) * 2).to(dtype), first="row")


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("batch", [2, 200])
def test_every_operand(first: str, batch: int) -> None:
    n, m = 4, 5
    logits = torch.randn(batch, n, m, dtype=torch.float64)
    row, col = torch.rand(batch, n, dtype=torch.float64) + 0.2, torch.rand(batch, m, dtype=torch.float64) + 0.2
    row = row.index_fill(1, torch.tensor([2]), 0.0)
    mask = (torch.rand(batch, n, m) > 0.2) | (torch.arange(m) == 0) | (torch.arange(n) == 0).unsqueeze(-1)
    operands = {
        "temperature": torch.rand(batch, dtype=torch.float64) + 0.5,
        "f0": torch.randn(batch, n if first == "col" else m, dtype=torch.float64),
    }
    both = {"row_marginal": row, "col_marginal": col * row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True)}
    cotangent = torch.randn_like(logits)
    for extra in (both, {"row_marginal": row}, {"col_marginal": col}, {}):
        for n_iters in (1, 6):
            leaves = {"logits": logits, **operands, **extra}
            gradients = []
            for call in (fastdsm.sinkhorn, reference.sinkhorn):
                copies = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
                rest = dict(copies)
                plan = call(rest.pop("logits"), first=first, n_iters=n_iters, mask=mask, **rest)
                gradients.append(torch.autograd.grad(plan, list(copies.values()), cotangent))
            for name, found, truth in zip(leaves, *gradients, strict=True):
                torch.testing.assert_close(found, torch.where(leaves[name] == 0, 0.0, truth), msg=lambda s, n=name: f"{n}: {s}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("shape", [(40, 4, 4), (4, 20, 17)])
def test_of_a_temperature(shape: tuple[int, int, int], std: float, dtype: torch.dtype) -> None:
    """The sum of products far larger than itself is taken in float64 on a CPU: what is left is one rounding to float32.

    s of the policy for float64 is the size of these products, of the gradient in logits / temperature with logits.
    """
    finite, cotangent = (torch.randn(shape) * std).to(dtype), torch.randn(shape).to(dtype)
    logits = finite.masked_fill(torch.rand(shape) < 0.05, -torch.inf)
    tau = torch.rand(shape[0]) + 0.5

    def gradient_of(call: object, logits: Tensor, inside: torch.dtype, n_iters: int) -> Tensor:
        leaf = tau.to(inside).requires_grad_()
        plan = call(logits, temperature=leaf, n_iters=n_iters)  # type: ignore[operator]
        return torch.autograd.grad(plan, leaf, cotangent.to(plan.dtype))[0]

    for n_iters in (1, 20):
        truth, plain = (gradient_of(reference.sinkhorn, logits.to(x), x, n_iters) for x in (torch.float64, torch.float32))
        found = gradient_of(fastdsm.sinkhorn, logits, torch.float32, n_iters)
        size = gradient_size(truth, cotangent) * (finite.abs().amax((-2, -1)) / tau).amax().item()
        allowed = budget(truth, plain, torch.float64, size=size)
        assert ((found.double() - truth).abs() <= allowed + half_ulp(truth.abs() + allowed, torch.float32)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"solver": "newton"}, {"first": "row", "tol": 1e-3}], ids=str)
@pytest.mark.parametrize(("backend", "size"), [("torch", 4), ("torch", 40), ("triton", 4), ("triton", 16)])
def test_of_sigma2_in_16_bits(backend: str, size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """The vectors are those of the plan before it is rounded: the gradient is rounded once."""
    logits = (torch.randn(4, size, size) * 2).to(dtype)
    weights = torch.tensor([1.0, -0.5, 2.0, 0.7])

    def gradient_of(call: Callable[..., Any], logits: Tensor, **more: Any) -> Tensor:
        leaf = logits.clone().requires_grad_()
        value = call(leaf, **more).sigma2
        return torch.autograd.grad(value, leaf, weights.to(value.dtype))[0]

    truth, plain = (gradient_of(reference.sinkhorn_sigma2, x, **options) for x in (logits.double(), logits.float()))
    found = gradient_of(fastdsm.sinkhorn_sigma2, logits, backend=backend, **options)
    assert found.dtype == dtype
    assert_within(found, truth, plain, cotangent=truth)


@pytest.mark.parametrize("batch", [5, 200])
def test_of_the_sweeps_done(batch: int) -> None:
    scale = torch.linspace(0.2, 5, batch, dtype=torch.float64)
    logits = torch.randn(batch, 4, 4, dtype=torch.float64) * scale[:, None, None]
    cotangent = torch.randn_like(logits)
    options = {"tol": 1e-5, "n_iters": 50}
    torch.testing.assert_close(
        gradient(fastdsm.sinkhorn, logits, cotangent, **options),
        gradient(reference.sinkhorn, logits, cotangent, **options),
    )


def test_a_log_domain_problem_with_stops() -> None:
    row = torch.tensor([1.0, 1e-15, 0.5, 1e-3], dtype=torch.float64).expand(6, 4)
    logits = torch.randn(6, 4, 4, dtype=torch.float64) * torch.linspace(0.2, 5, 6, dtype=torch.float64)[:, None, None]
    cotangent = torch.randn_like(logits)
    options = {"tol": 1e-4, "n_iters": 30, "row_marginal": row}
    torch.testing.assert_close(
        gradient(fastdsm.sinkhorn, logits, cotangent, **options),
        gradient(reference.sinkhorn, logits, cotangent, **options),
    )


def test_masked_entries_ignore_what_the_loss_does_there() -> None:
    logits = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1], mask[2, 3] = False, False
    plan = fastdsm.sinkhorn(logits, mask=mask)
    entropy = -(plan * plan.log()).masked_fill(~mask, 0.0).sum()
    (found,) = torch.autograd.grad(entropy, logits)
    assert bool(found.isfinite().all())
    assert bool((found[:, ~mask] == 0).all())


def test_numerically() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    row = (torch.rand(2, 3, dtype=torch.float64) + 0.3).requires_grad_()
    f0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def call(logits: Tensor, temperature: Tensor, row: Tensor, f0: Tensor) -> tuple[Tensor, Tensor]:
        found = fastdsm.sinkhorn_sigma2(logits, n_iters=4, temperature=temperature, row_marginal=row, f0=f0)
        return found.plan, found.sigma2

    assert gradcheck(call, (logits, temperature, row, f0))
    assert gradgradcheck(call, (logits, temperature, row, f0))


def test_double_backward_of_a_mixed_loss() -> None:
    """A loss with a constant cotangent beside a varying one: where once-differentiable Functions go silently wrong."""
    seconds = []
    logits = torch.randn(3, 4, 4, dtype=torch.float64)
    for call in (fastdsm.sinkhorn, reference.sinkhorn):
        leaf = logits.clone().requires_grad_()
        plan = call(leaf, n_iters=6)
        loss = (plan * torch.arange(4.0)).sum() + (plan**3).sum()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        seconds.append(torch.autograd.grad((first**2).sum(), leaf)[0])
    torch.testing.assert_close(*seconds)


def test_unrolled_gradient_takes_no_matrix_per_sweep() -> None:
    """What autograd saves is the input alone; of few matrices on a CPU sweeps too, of at most 10 MiB."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        for shape in ((4097, 4, 4), (257, 16, 16), (33, 128, 128)):
            logits = torch.randn(shape, requires_grad=True)
            saved.clear()
            fastdsm.sinkhorn(logits)
            assert sum(x.numel() for x in saved) == logits.numel()
        for shape in ((4096, 4, 4), (256, 16, 16), (15, 64, 64)):
            logits = torch.randn(shape, requires_grad=True)
            saved.clear()
            fastdsm.sinkhorn(logits)
            assert logits.numel() < sum(x.numel() for x in saved) <= (10 << 20) // 4 + logits.numel()


def test_a_backward_takes_memory_for_the_sweeps_done() -> None:
    """Not for those that were allowed: a thousand million of them."""
    logits = torch.randn(3, 5, 5, requires_grad=True)
    gradients = []
    for n_iters in (200, 10**9):
        plan = fastdsm.sinkhorn(logits, n_iters=n_iters, tol=1e-3)
        gradients += torch.autograd.grad(plan.square().sum(), logits)
    assert torch.equal(*gradients)
