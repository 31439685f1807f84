import math

import pytest
import torch

from fastdsm.diagnostics import depth_bound, effective_depth, entropy
from fastdsm.reference import sigma2, sinkhorn


def rows_by_hand(plan, order):
    values = []
    for row in plan.tolist():
        total = math.fsum(row)
        if total == 0:
            continue
        p = [x / total for x in row]
        if order == 1:
            values.append(-math.fsum(x * math.log(x) for x in p if x > 0))
        else:
            values.append(-math.log(math.fsum(x * x for x in p)))
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(1, 5), (4, 4), (3, 7)])
def test_entropy_by_hand(order, shape):
    plan = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    plan[0, 0] = 0.0
    expected = rows_by_hand(plan, order)
    assert entropy(plan, order, normalized=False).item() == pytest.approx(expected, rel=1e-14)
    assert entropy(plan, order).item() == pytest.approx(expected / math.log(shape[1]), rel=1e-14)


@pytest.mark.parametrize("order", [1, 2])
def test_entropy_of_known_plans(order):
    assert entropy(torch.eye(6), order).item() == 0.0
    assert entropy(torch.full((6, 6), 1 / 6), order).item() == pytest.approx(1.0, abs=1e-6)
    assert entropy(torch.ones(3, 1), order).item() == 1.0
    assert entropy(torch.ones(2, 3, 4, 5, dtype=torch.bfloat16), order).shape == (2, 3)
    assert entropy(torch.zeros(2, 2), order).isnan()


@pytest.mark.parametrize("order", [1, 2])
def test_entropy_skips_empty_rows_and_their_gradient_is_zero(order):
    plan = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    padded = torch.cat([plan, torch.zeros(2, 5, dtype=torch.float64)]).requires_grad_()
    value = entropy(padded, order)
    assert value.item() == pytest.approx(entropy(plan, order).item(), rel=1e-14)
    value.backward()
    assert padded.grad.isfinite().all()
    assert (padded.grad[4:] == 0).all()
    assert padded.grad[:4].abs().min() > 0


@pytest.mark.parametrize("order", [1, 2])
def test_entropy_gradcheck(order):
    plan = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
    assert torch.autograd.gradcheck(lambda p: entropy(p, order), plan.requires_grad_())


def test_renyi_entropy_counts_the_squares_of_the_singular_values():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    plan = sinkhorn(logits, n_iters=300)
    by_rows = sum(math.exp(-entropy(row[None], 2, normalized=False).item()) for row in plan)
    assert by_rows == pytest.approx(torch.linalg.svdvals(plan).square().sum().item(), rel=1e-10)


def test_entropy_is_no_proxy_for_sigma2():
    n = 64
    plan = torch.block_diag(torch.ones(1, 1), torch.full((n - 1, n - 1), 1 / (n - 1)))
    assert entropy(plan) > 0.97
    assert sigma2(plan).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_depth_is_the_least_power_below_eps(dtype):
    values = torch.tensor([1e-30, 0.001, 0.1, 0.3, 0.7, 0.9, 0.99], dtype=dtype)
    for eps in (2**-9, 0.05):
        depth = effective_depth(values, eps)
        assert depth.dtype == dtype
        for s, found in zip(values.double().tolist(), depth.tolist(), strict=True):
            least = next(k for k in range(1, 2000) if s**k <= eps)
            assert found == least


def test_effective_depth_at_the_ends_and_on_exact_powers():
    values = torch.tensor([0.0, 2**-9, 1.0, 1.3, math.nan])
    assert effective_depth(values)[:4].tolist() == [1.0, 1.0, math.inf, math.inf]
    assert effective_depth(values)[4].isnan()
    for k in range(1, 40):
        assert effective_depth(0.1, 0.1**k).item() == k
        assert effective_depth(torch.tensor(0.5), 2.0**-k).item() == k
    assert effective_depth(torch.full((3, 1), 0.5), torch.tensor([0.5, 0.25])).tolist() == [[1.0, 2.0]] * 3


def test_depth_bound_is_the_first_layer_where_the_product_is_below_eps():
    stack = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    stack[2, 0, 0], stack[1, 1, 1] = 0.0, 1.5
    for eps in (0.3, 2**-9, 1e-9):
        product = stack.cumprod(0)
        found = depth_bound(stack, eps)
        for index in torch.cartesian_prod(torch.arange(5), torch.arange(3)).tolist():
            column = product[:, index[0], index[1]].tolist()
            assert found[tuple(index)].item() == next((k + 1.0 for k, x in enumerate(column) if x <= eps), math.inf)


def test_depth_bound_of_equal_layers_is_effective_depth():
    values = torch.tensor([0.05, 0.5, 0.8, 0.95])
    stack = values.expand(200, 4)
    assert torch.equal(depth_bound(stack), effective_depth(values))
    assert depth_bound(values[:1].expand(2, 1)).item() == math.inf


def test_depth_bound_with_a_nan_layer():
    stack = torch.tensor([[0.5, 0.5], [math.nan, 0.5], [0.5, math.nan]])
    assert depth_bound(stack, 0.3).isnan().tolist() == [True, False]
    assert depth_bound(stack, 0.3)[1].item() == 2.0


def test_detail_is_below_eps_at_the_bound():
    logits = torch.randn(12, 6, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    plans = sinkhorn(logits, n_iters=3000)
    depth = int(depth_bound(sigma2(plans)).item())
    product = torch.eye(6, dtype=torch.float64)
    for plan in plans[:depth]:
        product = plan @ product
    assert 1 <= depth < 12
    assert torch.linalg.matrix_norm(product - 1 / 6, ord=2) <= 2**-9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: entropy(torch.ones(2, 2, dtype=torch.int64)), TypeError, r"floating-point.*got torch.int64"),
        (lambda: entropy([[1.0]]), TypeError, r"floating-point.*got list"),
        (lambda: entropy(torch.ones(3)), ValueError, r"\(\.\.\., n, m\), got \(3,\)"),
        (lambda: entropy(torch.ones(2, 2), order=3), ValueError, r"order must be 1 .* got 3"),
        (lambda: effective_depth(0.5, eps=1.0), ValueError, r"eps must lie in \(0, 1\), got 1.0"),
        (lambda: effective_depth(torch.tensor([-0.5])), ValueError, r"sigma2 must be >= 0, got -0.5"),
        (lambda: depth_bound(torch.tensor(0.5)), ValueError, r"\(layers, \.\.\.\).*got \(\)"),
        (lambda: depth_bound(torch.tensor([0.5]), eps=0.0), ValueError, r"eps must lie in \(0, 1\), got 0.0"),
        (lambda: depth_bound(torch.tensor([-1.0])), ValueError, r"sigma2 must be >= 0, got -1.0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
