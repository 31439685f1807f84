"""Bad input: the error's type, and that it says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastdsm

from ..tolerances import assert_within

x = torch.zeros(2, 3, 4)
CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: fastdsm.sinkhorn([[1.0]]),
        TypeError,
        r"logits must be a torch.Tensor of shape \(\.\.\., n, m\), got list",
    ),
    (lambda: fastdsm.sinkhorn(x.int()), TypeError, r"logits must be float16.*got torch.int32; convert"),
    (lambda: fastdsm.sinkhorn(x.to(torch.complex64)), TypeError, r"float64, got torch.complex64"),
    (lambda: fastdsm.sinkhorn(x[0, 0]), ValueError, r"shape \(\.\.\., n, m\), got \(4,\)"),
    (lambda: fastdsm.round_to_birkhoff(x[:, :0]), ValueError, r"n >= 1 and m >= 1, got \(2, 0, 4\)"),
    (lambda: fastdsm.sinkhorn(x, n_iters=-1), ValueError, r"n_iters must be >= 0, got -1"),
    (lambda: fastdsm.sinkhorn(x, n_iters=2.0), TypeError, r"n_iters must be an int >= 0, got 2.0 of type float"),
    (lambda: fastdsm.sinkhorn(x, n_iters=True), TypeError, r"n_iters must be an int"),
    (lambda: fastdsm.sinkhorn(x, temperature=0.0), ValueError, r"temperature must be > 0 and finite, got 0.0"),
    (lambda: fastdsm.sinkhorn(x, temperature=float("nan")), ValueError, r"temperature must be > 0 and finite, got nan"),
    (lambda: fastdsm.sinkhorn(x, temperature=float("inf")), ValueError, r"temperature must be > 0 and finite, got inf"),
    (lambda: fastdsm.sinkhorn(x.to_sparse()), TypeError, r"logits must be a dense tensor, got a sparse_coo one"),
    (lambda: fastdsm.sinkhorn(torch.nested.as_nested_tensor([x, x])), TypeError, r"must be a dense tensor, got a nested one"),
    (
        lambda: fastdsm.sinkhorn_attention(*[x.to_sparse()] * 3),
        TypeError,
        r"query must be a dense tensor, got a sparse_coo one",
    ),
    (lambda: fastdsm.sinkhorn(x, temperature="hot"), TypeError, r"a float or a tensor, got str"),
    (lambda: fastdsm.sinkhorn(x, temperature=torch.tensor([1.0, -2.0])), ValueError, r"> 0 everywhere, got -2.0"),
    (lambda: fastdsm.sinkhorn(x, temperature=torch.ones(2, 1)), ValueError, r"batch shape \(2,\) \(no trailing ones"),
    (lambda: fastdsm.sinkhorn(x, temperature=torch.ones(2, dtype=torch.int64)), TypeError, r"floating-point.*int64"),
    (lambda: fastdsm.sinkhorn(x, first="rows"), ValueError, r"first must be one of 'col', 'row', got 'rows'"),
    (lambda: fastdsm.sinkhorn(x, tol=-1.0), ValueError, r"tol must be None or >= 0.*got -1.0"),
    (lambda: fastdsm.sinkhorn(x, tol=float("nan")), ValueError, r"tol must be None or >= 0"),
    (
        lambda: fastdsm.sinkhorn(x, f0=torch.zeros(2, 4)),
        ValueError,
        r"f0 must have shape \(\.\.\., 3\), one entry per row, got \(2, 4\)",
    ),
    (
        lambda: fastdsm.sinkhorn(x, first="row", f0=torch.zeros(2, 3)),
        ValueError,
        r"f0 .* \(\.\.\., 4\), one entry per column",
    ),
    (
        lambda: fastdsm.sinkhorn(x, f0=torch.zeros(5, 3)),
        ValueError,
        r"f0 must be broadcastable to \(2, 3\), got \(5, 3\)",
    ),
    (
        lambda: fastdsm.sinkhorn(x, row_marginal=torch.ones(4)),
        ValueError,
        r"row_marginal must have shape \(\.\.\., 3\)",
    ),
    (
        lambda: fastdsm.sinkhorn(x, row_marginal=[1, 1, 1]),
        TypeError,
        r"row_marginal must be a floating-point tensor.*got list",
    ),
    (
        lambda: fastdsm.sinkhorn(x, col_marginal=torch.tensor([1.0, 1, 1, -0.5])),
        ValueError,
        r"col_marginal must be >= 0 everywhere, got -0.5",
    ),
    (
        lambda: fastdsm.sinkhorn(x, row_marginal=torch.tensor([1.0, torch.nan, 1])),
        ValueError,
        r"row_marginal must be >= 0 everywhere, got nan",
    ),
    (
        lambda: fastdsm.sinkhorn(x, row_marginal=torch.ones(3), col_marginal=torch.ones(4)),
        ValueError,
        r"equal totals.*difference is -1.0",
    ),
    (
        lambda: fastdsm.sinkhorn(x, mask=torch.ones(3, 4)),
        TypeError,
        r"mask must be a bool tensor, True where.*got torch.float32",
    ),
    (
        lambda: fastdsm.sinkhorn(x, mask=torch.ones(4, 3, dtype=torch.bool)),
        ValueError,
        r"mask must be broadcastable to \(2, 3, 4\), got \(4, 3\)",
    ),
    (lambda: fastdsm.sinkhorn(x, solver="fast"), ValueError, r"solver must be one of 'sinkhorn', 'newton', got 'fast'"),
    (lambda: fastdsm.sinkhorn(x, grad="exact"), ValueError, r"grad must be one of 'unrolled', 'implicit', got 'exact'"),
    (
        lambda: fastdsm.sinkhorn(x, solver="newton", grad="unrolled"),
        ValueError,
        r'grad="unrolled" is the gradient of sweeps.*use grad="implicit"',
    ),
    (lambda: fastdsm.sinkhorn_sigma2(x, solver="newton", grad="unrolled"), ValueError, r'use grad="implicit"'),
    (
        lambda: fastdsm.sinkhorn(x, backend="cuda"),
        ValueError,
        r"backend must be one of 'auto', 'triton', 'torch', 'reference'",
    ),
    (
        lambda: fastdsm.sinkhorn(x, f0=torch.zeros(3, device="meta")),
        ValueError,
        r"f0 must be on the device of the matrices, cpu, got meta",
    ),
    (
        lambda: fastdsm.sinkhorn(x, temperature=torch.ones(2, device="meta")),
        ValueError,
        r"temperature must be on the device",
    ),
    (lambda: fastdsm.sinkhorn_sigma2(x, solver="fast"), ValueError, r"solver must be one of"),
    (lambda: fastdsm.sigma2(x.long()), TypeError, r"plan must be float16.*got torch.int64"),
    (
        lambda: fastdsm.sigma2(x, method="svd"),
        ValueError,
        r"method must be one of 'auto', 'jacobi', 'squaring', 'lanczos', 'power'",
    ),
    (lambda: fastdsm.sigma2(x, tol=0.0), ValueError, r"tol must be > 0.*got 0.0"),
    (lambda: fastdsm.sigma2(x, max_iters=0), ValueError, r"max_iters must be >= 1, got 0"),
    (lambda: fastdsm.sigma2(torch.zeros(9, 9), method="jacobi"), ValueError, r"min\(n, m\) <= 8, got \(9, 9\); use"),
    (lambda: fastdsm.sigma2(x, v0=torch.ones(4)), ValueError, r'start of method="power" alone, got method=\'auto\''),
    (lambda: fastdsm.sigma2(x, backend="reference", return_vectors=True), ValueError, r"gives no vectors"),
    (lambda: fastdsm.sigma2_bounds(x[0, 0]), ValueError, r"plan must have shape"),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_totals_agree_to_a_ten_thousandth(scale: float) -> None:
    """Of each matrix by itself, relative to the larger."""
    row, col = torch.full((2, 3), 4 * scale), torch.full((2, 4), 3 * scale)
    for apart in (5e-5, -5e-5):
        fastdsm.sinkhorn(x, row_marginal=row, col_marginal=torch.stack([col[0], col[1] * (1 + apart)]))
    for apart in (2e-4, -2e-4):
        with pytest.raises(ValueError, match="equal totals"):
            fastdsm.sinkhorn(x, row_marginal=row, col_marginal=torch.stack([col[0], col[1] * (1 + apart)]))


def test_kernels_on_a_cpu_tensor_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a CUDA tensor, got one on cpu; use"):
        fastdsm.sinkhorn(x, backend="triton")


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_numbers_of_numpy(kind: Any) -> None:
    logits = torch.randn(2, 4, 4)
    expected = fastdsm.sinkhorn(logits, n_iters=7, temperature=0.5)
    for temperature in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(fastdsm.sinkhorn(logits, n_iters=kind(7), temperature=temperature), expected)
    leaf = logits.requires_grad_()
    fastdsm.sinkhorn(leaf, n_iters=kind(7), temperature=np.float32(0.5)).square().sum().backward()
    assert leaf.grad is not None
    fastdsm.sinkhorn_attention(leaf, leaf, leaf, n_iters=kind(2), temperature=np.float32(0.5))
    fastdsm.temperature_for_sigma2(logits.detach(), 0.5, n_iters=kind(7))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("shape", [(2, 0, 3), (3, 0), (0, 0), (0, 4, 0), (2, 5, 0)], ids=str)
def test_no_rows_or_no_columns(shape: tuple[int, ...], backend: str) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    plan, info = fastdsm.sinkhorn(logits, return_info=True, backend=backend)
    assert plan.shape == shape
    assert info.converged.all()
    assert (info.residual == 0).all()
    assert (info.sweeps == 0).all()
    assert (info.f.shape, info.g.shape) == (shape[:-1], (*shape[:-2], shape[-1]))
    plan.sum().backward()
    assert logits.grad.shape == shape
    found = fastdsm.sinkhorn_sigma2(logits, backend=backend)
    assert found.sigma2.shape == shape[:-2]
    assert (found.sigma2 == 0).all()
    assert (fastdsm.sigma2(plan, backend=backend) == 0).all()
    assert all((x == 0).all() and x.shape == shape[:-2] for x in fastdsm.sigma2_bounds(plan, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(("n", "m"), [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("lead", [(2, 3), (2, 2, 3), ()], ids=str)
def test_attention_without_lines(lead: tuple[int, ...], n: int, m: int, backend: str) -> None:
    """As scaled_dot_product_attention: no queries give nothing, no keys zeros."""
    query, key = torch.randn(*lead, n, 8), torch.randn(*lead, m, 8)
    paddings = {"query_padding_mask": torch.zeros(n, dtype=torch.bool), "key_padding_mask": torch.zeros(m)}
    for options in ({}, paddings):
        out = fastdsm.sinkhorn_attention(query, key, key, backend=backend, **options)
        assert out.shape == (*lead, n, 8)
        assert (out == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_marginals_whose_totals_logits_part(backend: str) -> None:
    """What is left of the columns is ten times what is left of the rows: bounded, and rows are exact, after any sweeps."""
    options: dict[str, Any] = {"row_marginal": torch.tensor([1.0, 9.0]), "col_marginal": torch.tensor([5.0, 5.0])}
    logits = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])
    for n_iters in (1, 8, 40):
        plan, plain = (fastdsm.sinkhorn(logits, n_iters=n_iters, backend=by, **options) for by in (backend, "reference"))
        assert_within(plan, torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64), plain)
    mask = logits.isfinite()
    for marginals in (options, {"row_marginal": 1.0, "col_marginal": 1.0}):  # a mask's lines are known
        with pytest.raises(ValueError, match="equal totals"):
            fastdsm.sinkhorn(logits, mask=mask, backend=backend, **marginals)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", ["col", "row"])
def test_marginals_rounded_to_16_bits_share_the_rows_total(dtype: torch.dtype, first: str) -> None:
    row, col = torch.randn(200, 9).softmax(-1).to(dtype), torch.randn(200, 7).softmax(-1).to(dtype)
    apart = (row.double().sum(-1) - col.double().sum(-1)).abs()
    assert (apart > 1e-4).any()
    logits = torch.randn(200, 9, 7)
    plan, info = fastdsm.sinkhorn(logits, row_marginal=row, col_marginal=col, first=first, n_iters=200, return_info=True)
    assert info.residual.max() < 1e-5
    assert (plan.sum((-2, -1)) - row.float().sum(-1)).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"equal totals \(to 0.0[03]"):
        fastdsm.sinkhorn(logits, row_marginal=row, col_marginal=1.2 * col, first=first)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_marginals_that_are_scaled(first: str, masked: bool, backend: str) -> None:
    row, col = torch.rand(2, 4, dtype=torch.float64) + 0.2, torch.rand(2, 5, dtype=torch.float64) + 0.2
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    if masked:
        mask[:, 2], mask[:, :, 3] = False, False
    shares = [(x * m).sum(-1, keepdim=True) for x, m in ((row, mask.any(-1)), (col, mask.any(-2)))]
    row, col = (x / share for x, share in zip((row, col), shares, strict=True))
    logits, cotangent = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)

    def loss(row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        plan = fastdsm.sinkhorn(logits, row_marginal=row, col_marginal=col, first=first, mask=mask, n_iters=6, backend=backend)
        return (plan * cotangent).sum()

    assert torch.autograd.gradcheck(loss, (row.requires_grad_(), col.requires_grad_()), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("first", ["col", "row"])
def test_lines_without_mass_have_no_gradient(first: str) -> None:
    row, col = torch.tensor([1.0, 0.0, 2.0], requires_grad=True), torch.tensor([0.0, 1.5, 1.5], requires_grad=True)
    plan = fastdsm.sinkhorn(torch.randn(3, 3), row_marginal=row, col_marginal=col, first=first)
    of_row, of_col = torch.autograd.grad(plan, (row, col), torch.randn(3, 3))
    assert of_row[1] == of_col[0] == 0
    assert of_row.any() or of_col.any()


def test_totals_that_cannot_be_looked_at_give_nan() -> None:
    logits, row, col = torch.randn(3, 4, 4), torch.ones(3, 4), torch.ones(3, 4)
    col[1] *= 1.1
    call = torch.compile(lambda c: fastdsm.sinkhorn(logits, row_marginal=row, col_marginal=c), backend="aot_eager")
    found = call(col)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[::2], fastdsm.sinkhorn(logits[::2], row_marginal=row[::2], col_marginal=col[::2]))


@pytest.mark.parametrize("first", ["col", "row"])
def test_numbers_as_marginals(first: str) -> None:
    """Of every line: a fifth and a third where rows and columns share mass 1, and in every call that takes marginals."""
    logits = torch.randn(3, 5, 3)
    row, col = torch.full((3, 5), 0.2), torch.full((3, 3), 1 / 3)
    for backend in ("torch", "reference"):
        expected = fastdsm.sinkhorn(logits, row_marginal=row, col_marginal=col, first=first, backend=backend)
        for one, other in ((0.2, 1 / 3), (row, 1 / 3), (np.float32(0.2), col)):
            plan = fastdsm.sinkhorn(logits, row_marginal=one, col_marginal=other, first=first, backend=backend)
            torch.testing.assert_close(plan, expected)
    numbers: dict[str, Any] = {"row_marginal": 0.2, "col_marginal": 1 / 3}
    tensors: dict[str, Any] = {"row_marginal": row, "col_marginal": col}
    for call in (
        lambda **x: fastdsm.sinkhorn_sigma2(logits, **x).sigma2,
        lambda **x: fastdsm.sigma2(expected, **x),
        lambda **x: fastdsm.sigma2_bounds(expected, **x)[1],
        lambda **x: fastdsm.temperature_for_sigma2(logits, 0.3, **x)[0],
        lambda **x: fastdsm.round_to_birkhoff(expected, **x),
    ):
        torch.testing.assert_close(call(**numbers), call(**tensors), equal_nan=True)
    torch.testing.assert_close(fastdsm.sinkhorn(logits, col_marginal=1.0).sum((-2, -1)), torch.full((3,), 3.0))
    twice = [fastdsm.sinkhorn(logits, row_marginal=x) for x in (1.0, 2.0)]
    torch.testing.assert_close(twice[1], 2.0 * twice[0])
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4] = False
    torch.testing.assert_close(
        fastdsm.sinkhorn(logits, row_marginal=0.2, mask=mask), fastdsm.sinkhorn(logits, row_marginal=row, mask=mask)
    )
    with pytest.raises(ValueError, match="equal totals"):
        fastdsm.sinkhorn(logits, row_marginal=1.0, col_marginal=1.0)
    with pytest.raises(TypeError, match="or a number, got bool"):
        fastdsm.sinkhorn(logits, row_marginal=True)
