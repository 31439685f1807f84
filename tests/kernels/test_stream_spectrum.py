"""sigma2 of plans of more than 256 lines by passes of two vectors: values and vectors against a float64 SVD.

Runs on the GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set. Every output starts as NaN.
"""

import pytest
import torch
from torch import Tensor

import fastdsm
from benchmarks.static.launches import recorded
from fastdsm import reference
from fastdsm.kernels import sigma2
from fastdsm.kernels.stream import spectrum as stream_spectrum

from .test_spectrum import DEVICE, EXACT, TOL, dsm, plans, pytestmark, truth

__all__ = ["pytestmark"]

FOUR_UNITS = 4 * torch.finfo(torch.float32).eps  # of the norm of a vector that was normalised in float32


def measure(
    plan: Tensor, row: Tensor | None = None, col: Tensor | None = None, mask: Tensor | None = None, tol: float = TOL
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, u2, v2) by the kernels, from buffers of NaN."""
    value, u2, v2 = (
        torch.full((plan.shape[0], *shape), torch.nan, device=DEVICE) for shape in ((), plan.shape[1:2], plan.shape[2:])
    )
    assert stream_spectrum.supports(plan)
    on = (None if x is None else x.to(DEVICE) for x in (row, col, mask))
    stream_spectrum.sigma2(plan.to(DEVICE), *on, value, u2, v2, tol)
    return value.cpu(), u2.cpu(), v2.cpu()


def check(plan: Tensor, row: Tensor | None = None, col: Tensor | None = None, mask: Tensor | None = None) -> None:
    """A lower bound within the tolerance, taken at its unit vectors."""
    expected = truth(plan, row, col, mask)
    value, u2, v2 = (x.double() for x in measure(plan, row, col, mask))
    assert bool((value <= expected * (1 + EXACT)).all())
    assert bool((value >= expected * (1 - TOL)).all())
    wide = [None if x is None else x.double() for x in (row, col)]
    M = reference.deflated_plan(plan.double(), *wide, mask)
    torch.testing.assert_close(torch.einsum("bn,bnm,bm->b", u2, M, v2), value, rtol=EXACT, atol=0)
    for vector in (u2, v2):
        torch.testing.assert_close(vector.norm(dim=-1), torch.ones_like(value), rtol=0, atol=FOUR_UNITS)


@pytest.mark.parametrize("n", [12, 33])
def test_hard_spectra(n: int) -> None:
    check(torch.stack(list(plans(n).values())).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [264, 301, 1032])
def test_every_dtype(m: int, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 21, m, generator=torch.Generator().manual_seed(m)) * 2
    check(reference.sinkhorn(logits, n_iters=20).to(dtype))


@pytest.mark.parametrize("m", [700, 2100, 4099, 4104, 8300])
def test_every_width(m: int) -> None:
    logits = torch.randn(1, 9, m, generator=torch.Generator().manual_seed(m)) * 2
    check(reference.sinkhorn(logits, n_iters=20))


def test_marginals_masks_and_lines_without_mass() -> None:
    logits, generator = torch.randn(2, 18, 270), torch.Generator().manual_seed(3)
    row, col = (torch.rand(2, lines, generator=generator) + 0.2 for lines in logits.shape[1:])
    row[0, 4], col[1, 9:80] = 0.0, 0.0
    col *= (row.sum(-1) / col.sum(-1)).unsqueeze(-1)
    mask = torch.rand(logits.shape, generator=generator) < 0.8
    mask[1, 3] = False
    for options in ({"row": row}, {"col": col}, {"mask": mask}, {"row": row, "col": col, "mask": mask}):
        names = {"row": "row_marginal", "col": "col_marginal", "mask": "mask"}
        plan = reference.sinkhorn(logits, n_iters=40, **{names[key]: x for key, x in options.items()})
        check(plan, **options)
    plan = reference.sinkhorn(logits, mask=mask)
    garbage = torch.where(mask, plan, torch.nan)
    assert torch.equal(measure(garbage, mask=mask)[0], measure(plan, mask=mask)[0])


def test_strides_order_of_sums_and_neighbours() -> None:
    plan = torch.stack([dsm(40, 2.0, seed) for seed in range(3)]).float()
    alone = measure(plan)
    assert all(torch.equal(x, y) for x, y in zip(measure(torch.stack([plan, plan], 1)[:, 1]), alone, strict=True))
    check(plan.mT.contiguous().mT)  # read along its columns
    check(torch.rand(40, 24, 3).permute(2, 1, 0)[..., ::2])  # no axis is contiguous, and no plan either
    expanded = measure(plan[:1].expand(3, -1, -1))
    assert all(torch.equal(x[2], y[0]) for x, y in zip(expanded, alone, strict=True))
    spoilt = plan.clone()
    spoilt[1, 3, 5] = torch.nan
    value, u2, v2 = measure(spoilt)
    assert bool(value[1].isnan())
    for found, whole in zip((value, u2, v2), alone, strict=True):
        assert torch.equal(found[::2], whole[::2])


def test_nothing_left_to_see() -> None:
    uniform = torch.full((1, 20, 300), 1 / 300)
    value, u2, v2 = measure(uniform)
    assert float(value) < 1e-7
    assert bool(torch.isfinite(u2).all() & torch.isfinite(v2).all())
    one = torch.zeros(1, 20, 300, dtype=torch.bool)
    one[0, 7, 11] = True
    value, u2, v2 = measure(one.float(), mask=one)
    assert [float(x.abs().max()) for x in (value, u2, v2)] == [0.0, 0.0, 0.0]
    assert [x.shape for x in measure(uniform[:0])] == [(0,), (0, 20), (0, 300)]


def test_public_call_and_its_gradient() -> None:
    logits = torch.randn(2, 14, 300, generator=torch.Generator().manual_seed(5))
    plan = reference.sinkhorn(logits).to(DEVICE).requires_grad_()
    weights = torch.tensor([1.0, -2.0], device=DEVICE)
    value = fastdsm.sigma2(plan, backend="triton")
    expected = fastdsm.sigma2(plan, backend="reference")
    torch.testing.assert_close(value, expected, rtol=EXACT, atol=0)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), plan)[0] for x in (value, expected))
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_a_pass_is_two_launches() -> None:
    plan = torch.empty(2, 300, 300)
    with recorded() as launches:
        assert sigma2(plan, None, None, None, TOL, plan.new_empty(2), plan.new_empty(2, 300), plan.new_empty(2, 300))
    names = [launch.configuration.kernel.fn.__name__ for launch in launches]
    assert names == ["_sigma2_stream_gram_fwd_kernel", "_sigma2_stream_reduce_fwd_kernel"] * (len(names) // 2)


def test_what_is_supported() -> None:
    entry = torch.zeros(1, 1, 1)
    assert stream_spectrum.supports(entry.expand(1, 70_000, 32_768))
    assert not stream_spectrum.supports(entry.expand(1, 300, 32_769))
    assert not stream_spectrum.supports(entry.double().expand(1, 300, 300))
