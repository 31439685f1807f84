"""sigma2 of given plans by squaring and by Lanczos: values, vectors and certified bounds against a float64 SVD.

Runs on the GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set. Every output starts as NaN.
"""

import math
import os

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastdsm import reference
from fastdsm._ops.marginals import marginals, marginals_of, valid_entries
from fastdsm._ops.problem import compute_dtype
from fastdsm.kernels.common.bases import UNIT
from fastdsm.kernels.common.configuration import Configuration, finite_jit
from fastdsm.kernels.spectrum import launch as spectrum
from fastdsm.kernels.spectrum.lanczos import lanczos_sigma2

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
DEVICE = "cpu" if INTERPRETED else "cuda"
TOL = 1e-4  # what fastdsm.sigma2 promises by default, relative
EXACT = 2e-6  # what float32 leaves where the largest singular value stands apart


def complement(n: int, seed: int) -> Tensor:
    """Orthogonal on the mean-free vectors of n entries, 0 on the constant one."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.cat([torch.ones(n, 1).double(), torch.randn(n, n - 1, generator=generator).double()], 1)
    basis = torch.linalg.qr(basis)[0][:, 1:]
    turn = torch.linalg.qr(torch.randn(n - 1, n - 1, generator=generator).double())[0]
    return basis @ turn @ basis.T


def dsm(n: int, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return reference.sinkhorn(std * torch.randn(n, n, generator=generator).double(), n_iters=100)


def plans(n: int) -> dict[str, Tensor]:
    """Doubly-stochastic plans whose spectra are the hard ones, float64 (n, n)."""
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double()
    projector = torch.eye(n).double() - 1 / n
    rank_one = torch.outer(projector @ noise[0], projector @ noise[1])
    return {
        "random": dsm(n, 1.0, 1),
        "sharp": dsm(n, 6.0, 2),
        "near-permutation": 0.999 * torch.eye(n).double().roll(1, 0) + 0.001 / n,
        "permutation": torch.eye(n).double()[torch.randperm(n, generator=torch.Generator().manual_seed(n))],
        "near-uniform": 1 / n + 1e-3 * projector @ noise @ projector / n,
        "tiny": 1 / n + 1e-5 * rank_one / rank_one.norm(),
        "isotropic": 1 / n + 0.3 * complement(n, n) / n,
        "isotropic, tiny": 1 / n + 1e-5 * complement(n, n),
    }


def truth(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> Tensor:
    """sigma2 in float64 of the plan as stored."""
    row, col = (None if x is None else x.double() for x in (row, col))
    return reference.sigma2(plan.double(), row_marginal=row, col_marginal=col, mask=mask)


def measure(
    plan: Tensor,
    row: Tensor | None = None,
    col: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, u2, v2) by the kernel, from buffers of NaN."""
    dtype = compute_dtype(plan.dtype)
    value, u2, v2 = (
        torch.full((plan.shape[0], *shape), torch.nan, dtype=dtype, device=DEVICE)
        for shape in ((), plan.shape[1:2], plan.shape[2:])
    )
    assert spectrum.supports(plan)
    on = [None if x is None else x.to(DEVICE) for x in (row, col, mask)]
    spectrum.sigma2(plan.to(DEVICE), *on, value, u2, v2)
    return value.cpu(), u2.cpu(), v2.cpu()


def enclose(
    plan: Tensor,
    row: Tensor | None = None,
    col: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(lower, upper) by the kernel, from buffers of NaN."""
    lower, upper = torch.full((2, plan.shape[0]), torch.nan, dtype=compute_dtype(plan.dtype), device=DEVICE)
    on = [None if x is None else x.to(DEVICE) for x in (row, col, mask)]
    spectrum.sigma2_bounds(plan.to(DEVICE), *on, lower, upper)
    return lower.cpu(), upper.cpu()


def assert_spectrum(
    plan: Tensor,
    row: Tensor | None = None,
    col: Tensor | None = None,
    mask: Tensor | None = None,
    tol: float = TOL,
) -> None:
    """Value within tol of the truth, the bounds around it, the vectors a unit pair that attains the value."""
    expected = truth(plan, row, col, mask)
    value, u2, v2 = measure(plan, row, col, mask)
    error = (value.double() - expected).abs() / expected
    assert error.max() <= tol, error
    lower, upper = enclose(plan, row, col, mask)
    fine = 1e-13 * expected  # of the SVD itself
    assert (lower.double() <= expected + fine).all()
    assert (upper.double() >= expected - fine).all()

    valid = valid_entries(mask, plan, row, col)
    r, c = marginals(valid, row, col, compute_dtype(plan.dtype))
    matrix = reference.deflated(plan.masked_fill(~valid, 0.0).double(), r.double(), c.double())
    attained = torch.einsum("bi,bij,bj->b", u2.double(), matrix, v2.double())
    assert ((attained - value).abs() <= 4e-6 * value).all()
    for vector, marginal in ((u2, r), (v2, c)):
        assert ((vector.norm(dim=-1) - 1).abs() <= 2e-6).all()
        assert (vector[marginal == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 7, 16, 29])
def test_squaring_on_hard_spectra(n: int, dtype: torch.dtype) -> None:
    plan = torch.stack(list(plans(n).values())).to(dtype)
    assert_spectrum(plan)
    lower, upper = enclose(plan)
    assert (upper <= 1.001 * lower).all(), upper / lower


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, slice(None)), (torch.float64, slice(0, None, 4))])
def test_squaring_of_the_largest_tile(dtype: torch.dtype, chosen: slice) -> None:
    plan = torch.stack(list(plans(64).values())[chosen]).to(dtype)
    assert_spectrum(plan)
    lower, upper = enclose(plan)
    assert (upper <= 1.001 * lower).all(), upper / lower


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 4])
def test_bounds_at_every_share_of_a_binade(n: int, dtype: torch.dtype) -> None:
    """Powers of two are taken out of M and of each square: which ones goes with the size of M."""
    away = dsm(n, 1.0, 1) - 1 / n
    assert_spectrum(torch.stack([1 / n + 2.0 ** (-k / 8) * away for k in range(8)]).to(dtype))


@pytest.mark.parametrize("n", [4, 23])
def test_squaring_is_exact_with_a_gap(n: int) -> None:
    chosen = plans(n)
    plan = torch.stack([chosen["tiny"], chosen["permutation"], chosen["isotropic"]]).float()
    assert_spectrum(plan, tol=EXACT)


@pytest.mark.parametrize(("n", "names"), [(65, ("tiny", "permutation", "isotropic, tiny")), (130, ("permutation",))])
def test_lanczos_on_hard_spectra(n: int, names: tuple[str, ...]) -> None:
    assert_spectrum(torch.stack([plans(n)[name] for name in names]).float())


def test_lanczos_resolves_a_cluster() -> None:
    """Many singular values within a percent of the first, where a test by Ritz gaps stops 1e-3 early."""
    assert_spectrum(dsm(66, 8.0, 3)[None].float())


def test_lanczos_in_float64_and_half() -> None:
    assert_spectrum(dsm(65, 1.0, 4)[None], tol=1e-7)
    assert_spectrum(dsm(65, 1.0, 5)[None].half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_plans_are_measured_as_stored(dtype: torch.dtype) -> None:
    assert_spectrum(torch.stack([dsm(6, 1.0, seed) for seed in range(3)]).to(dtype), tol=EXACT)


def options(n: int, m: int, kind: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(n * m)
    row = torch.rand(3, n, generator=generator) + 0.2
    col = torch.rand(3, m, generator=generator) + 0.2
    row[0, 0], col[1, -1] = 0.0, 0.0
    mask = torch.rand(3, n, m, generator=generator) < 0.7
    mask[2, 1], mask[:, :, 0] = False, False
    chosen = {
        "plain": {},
        "mask": {"mask": mask},
        "row": {"row": row},
        "col": {"col": col, "mask": mask},
        "both": {"row": row, "col": col * (row.sum(-1) / col.sum(-1))[:, None]},
    }[kind]
    return {key: x if x.dtype == torch.bool else x.to(dtype) for key, x in chosen.items()}


@pytest.mark.parametrize(
    ("n", "m", "kind"),
    [(n, m, kind) for n, m in ((4, 7), (19, 12)) for kind in ("plain", "mask", "row", "col", "both")]
    + [(70, 12, "col"), (12, 66, "both")],
)
def test_masks_and_marginals(n: int, m: int, kind: str) -> None:
    given = options(n, m, kind, torch.float32)
    logits = torch.randn(3, n, m, generator=torch.Generator().manual_seed(m)).double()
    double = {key: x if x.dtype == torch.bool else x.double() for key, x in given.items()}
    named = {"row": "row_marginal", "col": "col_marginal", "mask": "mask"}
    plan = reference.sinkhorn(logits, n_iters=30, **{named[key]: x for key, x in double.items()}).float()
    if "mask" in given:
        plan = torch.where(given["mask"], plan, torch.nan)  # what lies under a mask is never used
    assert_spectrum(plan, **given)


@pytest.mark.parametrize("n", [5, 65])
def test_any_strides(n: int) -> None:
    plan = torch.stack([dsm(n, 1.0, seed) for seed in range(2)]).float()
    wide = torch.full((n, 2, 2 * n), torch.nan)
    strided = wide.permute(1, 2, 0)[:, ::2]
    strided.copy_(plan)
    row = torch.linspace(0.5, 1.5, n).expand(2, n)
    assert_spectrum(strided, row=row)
    assert torch.equal(measure(strided, row=row)[0], measure(plan, row=row.contiguous())[0])


@pytest.mark.parametrize(("n", "bad"), [(4, torch.nan), (11, torch.inf), (65, torch.nan)])
def test_what_is_not_finite_stays_in_its_matrix(n: int, bad: float) -> None:
    plan = torch.stack([dsm(n, 1.0, seed) for seed in range(3)]).float()
    clean = [*measure(plan), *enclose(plan)]
    plan[1, n - 1, 0] = bad
    for before, after in zip(clean, [*measure(plan), *enclose(plan)], strict=True):
        assert after[1].isnan().all()
        assert torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(("n", "m"), [(1, 5), (6, 1), (1, 1), (1, 70), (66, 1)])
def test_one_line_has_no_second_singular_value(n: int, m: int) -> None:
    plan = torch.rand(2, n, m, generator=torch.Generator().manual_seed(n + m))
    row = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) + 0.1
    for result in (*measure(plan), *measure(plan, row=row), *enclose(plan), *enclose(plan, row=row)):
        assert (result == 0).all()


@pytest.mark.parametrize("n", [6, 65])
def test_all_masked_is_zero(n: int) -> None:
    plan = torch.full((1, n, n), torch.nan)
    mask = torch.zeros(1, n, n, dtype=torch.bool)
    for result in (*measure(plan, mask=mask), *enclose(plan, mask=mask)):
        assert (result == 0).all()


def test_uniform_plan_is_zero() -> None:
    plan = torch.full((1, 8, 8), 0.125)
    assert all((result == 0).all() for result in measure(plan))
    assert all((result == 0).all() for result in enclose(plan))


@finite_jit
def _logits_sigma2_fwd_kernel(
    logits_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    f_ptr,
    row_base_ptr,
    g_ptr,
    col_base_ptr,
    sigma2_ptr,
    n: tl.int32,
    m: tl.int32,
    scale: tl.float32,
    tol: tl.float32,
    COLS: tl.constexpr,
):
    """sigma2 from logits and potentials, as a Sinkhorn kernel asks for it at its end."""
    j = tl.arange(0, COLS)
    c = tl.load(col_ptr + j, mask=j < m, other=0.0)
    g = tl.load(g_ptr + j, mask=j < m, other=0.0)
    col_base = tl.load(col_base_ptr + j, mask=j < m, other=0.0)
    potentials = (f_ptr, row_base_ptr, g, col_base, scale)
    value = lanczos_sigma2(logits_ptr, m, 1, mask_ptr, m, 1, 1, row_ptr, potentials, c, n, m, tol, 64, 8, True)
    tl.store(sigma2_ptr, value)


@pytest.mark.interpreter
def test_lanczos_from_logits_and_potentials() -> None:
    n, m, temperature = 20, 27, 0.7
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[3], mask[:, 5] = False, False
    logits = torch.randn(n, m, generator=torch.Generator().manual_seed(2))
    plan, info = reference.sinkhorn(logits.double(), mask=mask, temperature=temperature, n_iters=50, return_info=True)
    expected = reference.sigma2(plan, mask=mask)
    r, c = marginals_of(logits, None, None, mask)
    configuration = Configuration(
        _logits_sigma2_fwd_kernel, {"mask_ptr": "u8"} | dict.fromkeys(("logits_ptr",), "fp32"), {"COLS": 32}, 4, 1
    )
    value = torch.full((1,), torch.nan, device=DEVICE)
    on = {
        "logits_ptr": logits.masked_fill(~mask, torch.nan),
        "mask_ptr": mask.view(torch.uint8),
        "row_ptr": r,
        "col_ptr": c,
    }
    on |= {"sigma2_ptr": value}
    for name, base, potential in (("f_ptr", "row_base_ptr", info.f), ("g_ptr", "col_base_ptr", info.g)):
        whole = potential.round()
        on |= {base: (whole / UNIT.value).float(), name: ((potential - whole) * math.log2(math.e)).float()}
    on = {name: x.to(DEVICE) for name, x in on.items()}
    configuration.launch(1, **on, n=n, m=m, scale=1 / (temperature * UNIT.value), tol=1e-4)
    assert abs(float(on["sigma2_ptr"]) - float(expected)) <= EXACT * float(expected)


def test_vectors_are_optional_and_an_empty_batch_is_nothing() -> None:
    plan = torch.stack([dsm(5, 1.0, seed) for seed in range(2)]).float().to(DEVICE)
    value = torch.full((2,), torch.nan, device=DEVICE)
    spectrum.sigma2(plan, None, None, None, value)
    assert torch.equal(value.cpu(), measure(plan)[0])
    spectrum.sigma2(plan[:0], None, None, None, value[:0])


def test_what_is_supported() -> None:
    assert spectrum.supports(torch.empty(0, 256, 1))
    assert not spectrum.supports(torch.empty(1, 257, 4))
    assert not spectrum.supports(torch.empty(1, 4, 4, dtype=torch.int32))
    assert len({configuration.label for configuration in spectrum.configurations()}) == len(spectrum.configurations())
