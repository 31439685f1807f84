"""Laws of noise and LayerNorm against Monte-Carlo with nn.functional.layer_norm, on P = J + sigma Q, scipy and mpmath."""

from __future__ import annotations

import math

import mpmath  # torch depends on it
import pytest
import torch
from torch import Tensor

from fastdsm import diagnostics

ERRORS = 4.5  # standard errors that a Monte-Carlo mean may be off


def isotropic(n: int, sigma: float) -> Tensor:
    """J + sigma Q, Q a random orthogonal matrix of the mean-free space."""
    ones = torch.full((n, 1), n**-0.5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.randn(n, n - 1, dtype=torch.float64)], 1)).Q[:, 1:]
    rotation = torch.linalg.qr(torch.randn(n - 1, n - 1, dtype=torch.float64)).Q
    return ones @ ones.T + sigma * basis @ rotation @ basis.T


def signal(n: int) -> Tensor:
    s = torch.randn(n, dtype=torch.float64)
    s = s - s.mean()
    return s / s.norm()


def cosines(s: Tensor, snr: float, samples: int) -> Tensor:
    n = len(s)
    noise = torch.randn(samples, n, dtype=torch.float64) * (s.square().sum() / (snr * (n - 1))).sqrt()
    out = torch.nn.functional.layer_norm(s + noise, (n,), eps=0.0)
    return (out @ s) / (out.norm(dim=-1) * s.norm())


def close_in_mean(samples: Tensor, expected: float, slack: float = 0.0) -> None:
    error = abs(samples.mean().item() - expected)
    assert error <= ERRORS * samples.std().item() / math.sqrt(len(samples)) + slack


@pytest.mark.parametrize(("dim", "samples"), [(1, 40000), (2, 40000), (5, 40000), (60, 20000), (1200, 2000)])
@pytest.mark.parametrize("snr", [0.01, 1.0, 9.0])
def test_cosine_after_layernorm(dim: int, samples: int, snr: float) -> None:
    found = cosines(signal(dim + 1), snr, samples)
    close_in_mean(found, diagnostics.layernorm_cosine(snr, dim).item(), slack=1e-7)
    for c in (-0.2, 0.1, 0.5, 0.9):
        close_in_mean((found <= c).double(), diagnostics.layernorm_cosine_tail(snr, dim, c).item(), slack=0.5 / samples)


@pytest.mark.parametrize("dim", [2, 3, 4, 17, 400, 5000])
def test_tail_is_the_noncentral_t_distribution(dim: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    c = torch.linspace(-0.9, 0.95, 23, dtype=torch.float64)
    for snr in (0.0, 1 / dim, 0.3, 1.0):
        t = c * math.sqrt(dim - 1) / (1 - c.square()).sqrt()
        expected = torch.from_numpy(stats.nct.cdf(t.numpy(), dim - 1, math.sqrt(snr * dim)))
        found = diagnostics.layernorm_cosine_tail(torch.tensor(snr, dtype=torch.float64), dim, c)
        known = expected.isfinite()
        assert known.sum() >= 15
        torch.testing.assert_close(found[known], expected[known], rtol=0.0, atol=1e-9)


def by_mpmath(snr: float, dim: int, cosine: float) -> tuple[float, float]:
    """E cos and P(cos <= cosine) from their definitions, to 20 digits; integrals are cut where the integrand is below 1e-25."""
    with mpmath.workdps(25):
        delta, k = mpmath.sqrt(mpmath.mpf(snr) * dim), dim - 1
        end = min(mpmath.pi / 2, 12 / mpmath.sqrt(delta**2 * 4 / mpmath.pi**2 + dim))
        weight = mpmath.quad(lambda t: mpmath.exp(-((delta * mpmath.sin(t)) ** 2) / 2) * mpmath.cos(t) ** dim, [0, end])
        a = mpmath.mpf(cosine) / mpmath.sqrt(1 - mpmath.mpf(cosine) ** 2)
        if k == 0:
            return float(mpmath.sqrt(2 / mpmath.pi) * delta * weight), float(mpmath.ncdf(-delta))
        log_scale = (mpmath.mpf(k) / 2 - 1) * mpmath.log(2) + mpmath.loggamma(mpmath.mpf(k) / 2)

        def density(x: mpmath.mpf) -> mpmath.mpf:
            return (
                mpmath.exp((k - 1) * mpmath.log(x) - x**2 / 2 - log_scale) if x else mpmath.mpf(k == 1) * mpmath.exp(-log_scale)
            )

        middle = mpmath.sqrt(k)
        ends = [max(middle - 12, mpmath.mpf(0)), middle, middle + 12]
        tail = mpmath.quad(lambda x: mpmath.ncdf(a * x - delta) * density(x), ends)
        return float(mpmath.sqrt(2 / mpmath.pi) * delta * weight), float(tail)


@pytest.mark.parametrize("dim", [1, 2, 3, 17, 400, 5000])
def test_quadrature_has_the_digits_it_states(dim: int) -> None:
    for snr, cosine in ((0.01, 0.1), (1.0, 0.6), (25.0, 0.97)):
        mean, tail = by_mpmath(snr, dim, cosine)
        wide = torch.tensor(snr, dtype=torch.float64)
        assert diagnostics.layernorm_cosine(wide, dim).item() == pytest.approx(mean, rel=0, abs=1e-12)
        assert diagnostics.layernorm_cosine_tail(wide, dim, cosine).item() == pytest.approx(tail, rel=0, abs=1e-12)


def test_cosine_is_the_integral_of_its_tail_and_has_the_stated_limit() -> None:
    c = torch.linspace(-1 + 1e-9, 1 - 1e-9, 8001, dtype=torch.float64)
    for dim, snr in ((3, 0.7), (50, 0.2)):
        tail = diagnostics.layernorm_cosine_tail(torch.tensor(snr, dtype=torch.float64), dim, c)
        mean = 1 - torch.trapezoid(tail, c)
        assert diagnostics.layernorm_cosine(torch.tensor(snr, dtype=torch.float64), dim).item() == pytest.approx(
            mean.item(), abs=1e-7
        )
    for snr in (0.1, 1.0, 10.0):
        limit = math.sqrt(snr / (1 + snr))
        errors = [abs(diagnostics.layernorm_cosine(snr, dim).item() - limit) for dim in (100, 1000, 10000)]
        assert errors[0] < 0.01
        assert errors[2] < errors[1] < errors[0]
    assert diagnostics.layernorm_cosine(0.0, 10).item() == 0.0
    assert diagnostics.layernorm_cosine(1e6, 10).item() == pytest.approx(1.0, abs=1e-5)


def test_thresholds() -> None:
    assert diagnostics.snr_threshold().item() == pytest.approx(1.0)
    assert diagnostics.snr_threshold(1 / math.sqrt(101)).item() == pytest.approx(1 / 100, rel=1e-5)
    c = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    snr = diagnostics.snr_threshold(c)
    torch.testing.assert_close(diagnostics.layernorm_cosine(snr, 200000), c, rtol=1e-4, atol=0.0)


def test_critical_depth_on_an_isotropic_stack() -> None:
    n, sigma, snr = 1025, 0.8, 50.0
    P, x = isotropic(n, sigma), signal(n)
    depth = diagnostics.critical_depth(snr, sigma).item()
    noise = (x.square().sum() / (snr * (n - 1))).sqrt()  # nu: SNR at the input
    for layer in range(1, 20):
        x = P @ x
        x = x - x.mean()
        left = (x.square().sum() / (noise.square() * (n - 1))).item()
        assert (left >= 1.0) == (layer <= depth)
    at_threshold = cosines(signal(n), snr * sigma ** (2 * depth), 2000)
    close_in_mean(at_threshold, math.sqrt(0.5), slack=2 / n)
    assert diagnostics.critical_depth(0.5, 0.9).item() == 0.0
    assert diagnostics.critical_depth(2.0, torch.tensor([1.0, 0.0])).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("eta", [0.02, 0.3, 1.5])
def test_noise_at_every_layer(eta: float) -> None:
    """P = J + sigma Q in dimension 1,024, six layers, with and without LayerNorm; the laws hold up to O(1 / d)."""
    n, sigma, depth, samples = 1025, 0.7, 6, 150
    d = n - 1
    P, s = isotropic(n, sigma), signal(n)
    clean = s.clone()
    plain = normalised = s.expand(samples, n)
    for _ in range(depth):
        clean = P @ clean
        noise = torch.randn(2, samples, n, dtype=torch.float64) * math.sqrt(eta / d)
        plain = plain @ P.T + noise[0]
        mixed = torch.nn.functional.layer_norm(normalised @ P.T + noise[1], (n,), eps=0.0)
        normalised = mixed / math.sqrt(n)
    direction = clean / clean.norm()

    def cosine(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return (x @ direction) / x.norm(dim=-1)

    with_norm = diagnostics.cosine_with_layernorm(sigma, eta, depth).item()
    snr = diagnostics.snr_without_layernorm(sigma, eta, depth).item()
    close_in_mean(cosine(normalised), with_norm, slack=3 / d)
    close_in_mean(cosine(plain), math.sqrt(snr / (1 + snr)), slack=3 / d)
    assert diagnostics.layernorm_helps(sigma, eta).item() == (with_norm > math.sqrt(snr / (1 + snr)))


def test_where_layernorm_helps() -> None:
    for sigma in (0.3, 0.8, 0.99):
        crossover = 1 - sigma**2
        for depth in (2, 5, 40):
            for eta, helps in ((crossover * 0.95, True), (crossover * 1.05, False)):
                eta64 = torch.tensor(eta, dtype=torch.float64)
                squared = diagnostics.cosine_with_layernorm(sigma, eta64, depth).square()
                assert (squared / (1 - squared) > diagnostics.snr_without_layernorm(sigma, eta64, depth)).item() == helps
                assert diagnostics.layernorm_helps(sigma, eta).item() == helps
    assert diagnostics.snr_without_layernorm(0.5, 0.0, 3).item() == math.inf
    assert diagnostics.snr_without_layernorm(1.0, 0.1, 5).item() == pytest.approx(2.0)
    one = diagnostics.cosine_with_layernorm(0.5, 0.1, 1).square()
    torch.testing.assert_close(one / (1 - one), diagnostics.snr_without_layernorm(0.5, 0.1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnostics.snr_threshold(1.0), r"cosine must lie in \[0, 1\), got 1.0"),
        (lambda: diagnostics.critical_depth(0.0, 0.5), "snr and threshold must be > 0"),
        (lambda: diagnostics.critical_depth(1.0, -0.5), "sigma2 must be >= 0"),
        (lambda: diagnostics.layernorm_cosine(1.0, 0), "dim must be >= 1"),
        (lambda: diagnostics.layernorm_cosine(-1.0, 5), "snr must be >= 0, got -1.0"),
        (lambda: diagnostics.layernorm_cosine_tail(1.0, 5, 1.0), r"cosine must lie in \(-1, 1\)"),
        (lambda: diagnostics.cosine_with_layernorm(0.0, 0.1, 3), "sigma2 must be > 0"),
        (lambda: diagnostics.snr_without_layernorm(0.5, -0.1, 3), "noise and depth must be >= 0"),
        (lambda: diagnostics.random_sigma2(-1.0, 4), "std must be >= 0"),
        (lambda: diagnostics.random_sigma2(1.0, 0), "n and m must be >= 1"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
