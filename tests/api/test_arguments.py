"""Bad input: the error's type, and that it says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdsm

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
    (lambda: fastdsm.sinkhorn(x[:, :0]), ValueError, r"n >= 1 and m >= 1, got \(2, 0, 4\)"),
    (lambda: fastdsm.sinkhorn(x, n_iters=-1), ValueError, r"n_iters must be >= 0, got -1"),
    (lambda: fastdsm.sinkhorn(x, n_iters=2.0), TypeError, r"n_iters must be an int >= 0, got 2.0 of type float"),
    (lambda: fastdsm.sinkhorn(x, n_iters=True), TypeError, r"n_iters must be an int"),
    (lambda: fastdsm.sinkhorn(x, temperature=0.0), ValueError, r"temperature must be > 0, got 0.0"),
    (lambda: fastdsm.sinkhorn(x, temperature=float("nan")), ValueError, r"temperature must be > 0, got nan"),
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
    (lambda: fastdsm.sigma2(x, max_iters=-3), ValueError, r"max_iters must be >= 0, got -3"),
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
