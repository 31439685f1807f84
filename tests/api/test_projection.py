"""fastdsm.sinkhorn on the PyTorch path against the oracle: values, options, layouts, isolation, edge cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdsm
from fastdsm import reference
from fastdsm.pytorch import chunk

from ..tolerances import assert_within

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = (
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 4),
    (5, 5),
    (7, 7),
    (8, 8),
    (16, 16),
    (31, 31),
    (64, 64),
    (100, 100),
    (3, 7),
    (40, 9),
)


def check(logits: Tensor, **options: object) -> None:
    """The call's plan within budget of the oracle's."""
    truth, plain = (reference.sinkhorn(logits.to(dtype), **options) for dtype in (torch.float64, torch.float32))
    assert_within(fastdsm.sinkhorn(logits, backend="torch", **options), truth, plain)


@pytest.mark.parametrize("std", [0.1, 1.0, 8.0, 50.0, 200.0])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_scales(size: tuple[int, int], std: float) -> None:
    logits = torch.randn(3, *size) * std
    for n_iters in (1, 3, 20, 100):
        check(logits, n_iters=n_iters)


@pytest.mark.parametrize("n_iters", [1, 20])
def test_the_largest_kernel_size(n_iters: int) -> None:
    check(torch.randn(2, 256, 256) * 5, n_iters=n_iters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [5, 300])
def test_dtypes_in_both_layouts(dtype: torch.dtype, batch: int) -> None:
    logits = (torch.randn(batch, 4, 6) * 3).to(dtype)
    plan = fastdsm.sinkhorn(logits, backend="torch")
    assert plan.dtype == dtype
    check(logits)


@pytest.mark.parametrize("first", ["col", "row"])
def test_the_side_normalised_last_is_exact(first: str) -> None:
    plan = fastdsm.sinkhorn(torch.randn(7, 5, 9, dtype=torch.float64) * 3, first=first, n_iters=2)
    sums = plan.sum(-1 if first == "col" else -2)
    torch.testing.assert_close(sums, torch.full_like(sums, 1.0 if first == "col" else 5 / 9))
    check(torch.randn(7, 5, 9) * 3, first=first, n_iters=2)


@pytest.mark.parametrize("batch", [3, 400])
@pytest.mark.parametrize("first", ["col", "row"])
def test_options_together(batch: int, first: str) -> None:
    n, m = 5, 6
    logits = torch.randn(batch, n, m) * 2
    row, col = torch.rand(batch, n) + 0.1, torch.rand(m) + 0.1
    col = col * row.sum(-1, keepdim=True) / col.sum()
    mask = torch.rand(n, m) > 0.2
    check(logits, first=first, row_marginal=row, col_marginal=col)
    check(logits, first=first, row_marginal=row)
    check(logits, first=first, col_marginal=col)
    check(logits, first=first, mask=mask.expand(logits.shape), temperature=torch.rand(batch) + 0.5)
    check(logits, first=first, f0=torch.randn(batch, n if first == "col" else m) * 3, temperature=0.3)
    check(logits, first=first, n_iters=0, row_marginal=row)


def test_uneven_marginals_sweep_in_the_log_domain() -> None:
    """b beyond 2^45 leaves no sweep in the scaling domain."""
    row = torch.tensor([1.0, 1e-15, 0.5, 1e-9])
    check(torch.randn(6, 4, 4) * 30, row_marginal=row.expand(6, 4))


def test_a_tiny_column_marginal_whose_line_has_one_entry() -> None:
    """Row 0 has no other entry, so that every sweep multiplies its factor by r / c: every sweep is a log sweep."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0] = torch.arange(5) == 2
    mask[1:, 2] = False
    row, col = torch.full((4,), 0.25), torch.tensor([0.3, 0.2, 1e-10, 0.3, 0.2])
    for n_iters in (6, 20):
        check(torch.randn(2, 4, 5) * 2, n_iters=n_iters, row_marginal=row, col_marginal=col, mask=mask)


def test_adversarial_patterns_over_many_sweeps() -> None:
    n = 12
    index = torch.arange(n, dtype=torch.float32)
    distance = (index[:, None] - index).abs()
    arrow = torch.where((index[:, None] == 0) | (index == 0) | (distance == 0), 0.0, -80.0)
    triangular = torch.where(index[:, None] >= index, 0.0, -200.0)
    no_support = torch.zeros(n, n).index_fill(0, torch.arange(3), -300.0).index_fill(1, torch.arange(2), 0.0)
    rank_one = 50 * torch.randn(n, 1) + 50 * torch.randn(1, n)
    offset = torch.randn(n, n) + 1e4
    band = torch.where(distance <= 1, 0.0, -1e3)
    patterns = torch.stack([arrow, triangular, no_support, rank_one, offset, band, torch.randn(n, n) * 2000])
    check(patterns, n_iters=100)
    crowded = torch.where((index == 0) | (index[:, None] == 0), 0.0, -110.0)  # what float32 has dropped is needed at last
    check(torch.stack([*patterns[:4].clamp(-120.0, 120.0), crowded]), n_iters=100)  # float32 serves these by itself


def test_minus_infinity_is_a_mask() -> None:
    logits = torch.randn(4, 6, 5)
    mask = torch.rand(4, 6, 5) > 0.3
    mask[0, 2], mask[1, :, 3] = False, False
    by_mask = fastdsm.sinkhorn(logits, mask=mask)
    by_logits = fastdsm.sinkhorn(logits.masked_fill(~mask, -torch.inf))
    assert torch.equal(by_mask, by_logits)
    assert bool((by_mask[0, 2] == 0).all())
    assert bool((by_mask[1, :, 3] == 0).all())
    check(logits, mask=mask)


def test_padding_changes_nothing() -> None:
    logits = torch.randn(2, 5, 5, dtype=torch.float64)
    padded = torch.full((2, 8, 8), torch.nan, dtype=torch.float64)
    padded[:, :5, :5] = logits
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:5, :5] = True
    torch.testing.assert_close(fastdsm.sinkhorn(padded, mask=mask)[:, :5, :5], fastdsm.sinkhorn(logits))


@pytest.mark.parametrize("batch", [4, 300])
@pytest.mark.parametrize("n_iters", [0, 1, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_matrix_stays_alone(batch: int, n_iters: int, bad: float) -> None:
    logits = torch.randn(batch, 4, 4)
    clean, (with_info, _) = (fastdsm.sinkhorn(logits, n_iters=n_iters, return_info=asked) for asked in (False, True))
    logits[1, 2, 3] = bad
    logits[1, 0, 0] = -torch.inf
    broken, info = fastdsm.sinkhorn(logits, n_iters=n_iters, return_info=True)
    assert bool(info.residual[1].isnan())
    assert not bool(info.converged[1])
    keep = torch.arange(batch) != 1
    for found, before in ((fastdsm.sinkhorn(logits, n_iters=n_iters), clean), (broken, with_info)):
        assert bool(found[1].isnan().all())
        assert torch.equal(found[keep], before[keep])


def test_everything_masked_gives_zeros() -> None:
    logits = torch.randn(3, 4, 4, requires_grad=True)
    found = fastdsm.sinkhorn_sigma2(logits, mask=torch.zeros(4, 4, dtype=torch.bool))
    assert bool((found.plan == 0).all())
    assert bool((found.sigma2 == 0).all())
    (gradient,) = torch.autograd.grad(found.plan.sum(), logits)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4, 3), (4, 4), (2, 1, 3, 4, 4)])
def test_batch_shapes(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    found = fastdsm.sinkhorn_sigma2(logits)
    assert found.plan.shape == shape
    assert found.sigma2.shape == found.residual.shape == found.sweeps.shape == shape[:-2]
    assert found.f.shape == shape[:-1]
    assert found.g.shape == (*shape[:-2], shape[-1])
    assert torch.autograd.grad(found.plan.sum() + found.sigma2.sum(), logits)[0].shape == shape


def test_info_is_the_plan_s_own() -> None:
    logits = torch.randn(9, 6, 4, dtype=torch.float64)
    plan, info = fastdsm.sinkhorn(logits, n_iters=7, return_info=True)
    torch.testing.assert_close((logits + info.f.unsqueeze(-1) + info.g.unsqueeze(-2)).exp(), plan)
    torch.testing.assert_close((plan.sum(-2) / 1.5 - 1).abs().amax(-1), info.residual)
    assert info.sweeps.dtype == torch.int32
    assert info.sweeps.tolist() == [7] * 9
    assert torch.equal(info.converged, info.residual <= 1e-12)


@pytest.mark.parametrize("batch", [6, 200])
def test_each_matrix_stops_by_itself(batch: int) -> None:
    logits = torch.randn(batch, 4, 4, dtype=torch.float64) * torch.linspace(0.1, 6, batch, dtype=torch.float64)[:, None, None]
    plan, info = fastdsm.sinkhorn(logits, n_iters=60, tol=1e-6, return_info=True)
    expected, known = reference.sinkhorn(logits, n_iters=60, tol=1e-6, return_info=True)
    assert torch.equal(info.sweeps, known.sweeps)
    assert info.sweeps.unique().numel() > 4
    torch.testing.assert_close(plan, expected)
    assert torch.equal(info.converged, known.converged)


@pytest.mark.parametrize("shape", [(3, 4, 6), (300, 4, 6), (3, 30, 20), (300, 12, 9), (2, 9, 1)])
def test_all_stop_after_the_first_sweep(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape) * 1e-3
    plan, info = fastdsm.sinkhorn(logits, tol=1e-2, return_info=True)
    assert bool((info.sweeps == 1).all())
    assert bool((info.residual <= 1e-2).all())
    check(logits, tol=1e-2)
    assert plan.sum() == pytest.approx(shape[0] * shape[1])


def test_results_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(100, 8, 8) * 4
    whole = fastdsm.sinkhorn(logits, backend="torch")
    monkeypatch.setattr(chunk, "_FORWARD_ENTRIES", ((8, 64 * 32 * 8),))
    torch.testing.assert_close(fastdsm.sinkhorn(logits, backend="torch"), whole, rtol=0, atol=5e-7)


def test_outputs_never_alias_inputs_and_inputs_stay() -> None:
    logits = torch.randn(300, 4, 4)
    kept = logits.clone()
    plan = fastdsm.sinkhorn(logits, n_iters=0)
    assert plan.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()
    fastdsm.sinkhorn(logits)
    assert torch.equal(logits, kept)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    batch=st.sampled_from([1, 2, 700]),
    transposed=st.booleans(),
    step=st.integers(1, 3),
    expanded=st.booleans(),
    n_iters=st.integers(0, 30),
)
def test_any_strides(n: int, m: int, batch: int, transposed: bool, step: int, expanded: bool, n_iters: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + m)
    shape = (batch * step, m, n) if transposed else (batch * step, n, m)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = base[:1].expand(batch, -1, -1) if expanded else base[::step]
    logits = logits.mT if transposed else logits
    found = fastdsm.sinkhorn(logits, n_iters=n_iters)
    torch.testing.assert_close(found, reference.sinkhorn(logits, n_iters=n_iters))
    assert found.is_contiguous()


def test_the_oracle_as_a_backend() -> None:
    logits = torch.randn(3, 4, 5)
    assert torch.equal(fastdsm.sinkhorn(logits, backend="reference"), reference.sinkhorn(logits))
    assert torch.equal(fastdsm.sinkhorn_sigma2(logits, backend="reference").sigma2, reference.sinkhorn_sigma2(logits).sigma2)
