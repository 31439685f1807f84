"""What noise and LayerNorm do to detail that a stack has shrunk. Derived here; equalities hold on isotropic contractions.

**One noise.** A signal s in the mean-free space of dimension d = n - 1 meets noise nu z, z standard normal, and LayerNorm
projects the sum to the sphere. With SNR = |s|^2 / (nu^2 d) and delta = |s| / nu = sqrt(SNR d) the cosine to s is

    cos = (delta + z_1) / sqrt((delta + z_1)^2 + chi^2),   chi^2 of d - 1 degrees of freedom,

so T = sqrt(d - 1) cos / sqrt(1 - cos^2) has the noncentral t distribution with d - 1 degrees and noncentrality delta:
P(cos <= c) = E Phi(a chi - delta), a = c / sqrt(1 - c^2), an integral over the density of chi. Its mean is that of the
projected normal distribution; Kummer's function in its usual form, as an integral over t = sin^2 theta, becomes

    E cos = sqrt(2 / pi) delta int_0^(pi/2) exp(-delta^2 sin^2(theta) / 2) cos^d(theta) d theta.

For large d that is sqrt(SNR / (1 + SNR)). So the signal is half of what is left at SNR = 1, and has the cosine of pure noise,
1 / sqrt(d + 1), at SNR = 1 / d. Met at depth L under a contraction sigma, SNR0 has become SNR0 sigma^(2 L).

**Noise at every layer**, energy eta (relative to the normalised signal's 1, total over d), contraction sigma on all
mean-free directions, d large so that energies are their means:

- With LayerNorm each layer turns energy 1 into sigma^2 + eta and back into 1; the signal's share falls by
  sigma^2 / (sigma^2 + eta): cos^2 = (1 + eta / sigma^2)^(-L).
- Without it the signal has sigma^(2L), the noise eta (1 + sigma^2 + ... + sigma^(2L - 2)):
  SNR = sigma^(2L) (1 - sigma^2) / (eta (1 - sigma^(2L))).

At L = 1 they agree; LayerNorm is better from L = 2 on exactly if eta < 1 - sigma^2: it then amplifies what the stack has
shrunk before more noise comes. Without noise it only rescales.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .checks import as_float64, require, require_nonnegative, result_dtype

_NODES = 128
_REACH = 9.5  # standard deviations beyond which a normal tail is below 1e-20


def snr_threshold(cosine: float | Tensor = math.sqrt(0.5)) -> Tensor:
    """SNR at which the signal has this cosine after LayerNorm, in high dimension: c^2 / (1 - c^2).

    Args:
        cosine: in [0, 1), any shape. The default, 0.71, gives SNR 1: half of the energy is signal. 1 / sqrt(d + 1), the
            cosine that noise alone has, gives 1 / d: there detail of dimension d is undetectable.

    Returns:
        Like cosine, float32, or float64 for float64; no gradient.

    Raises:
        ValueError: a cosine outside [0, 1), where the value is on the CPU.
    """
    c = as_float64(cosine)
    require((c >= 0) & (c < 1), f"cosine must lie in [0, 1), got {cosine}")
    return (c.square() / (1 - c.square())).to(result_dtype(cosine))


def critical_depth(snr: float | Tensor, sigma2: float | Tensor, threshold: float | Tensor = 1.0) -> Tensor:
    """Depth at which one noise of the input's SNR ``snr`` leaves ``threshold``: log(snr / threshold) / (2 log 1/sigma2).

    Args:
        snr: > 0, of noise against the signal before any layer; the noise is met behind the layers.
        sigma2: >= 0, per layer. threshold: > 0, as from :func:`snr_threshold`. All broadcast.

    Returns:
        A real number of layers, float32, or float64 for float64: 0 where snr <= threshold, inf where sigma2 >= 1. No gradient.
        On P = J + sigma Q an equality, on other plans an upper bound.

    Raises:
        ValueError: values out of range, where they are on the CPU.
    """
    signal, layer, least = as_float64(snr), as_float64(sigma2), as_float64(threshold)
    require_nonnegative(layer)
    require((signal > 0) & (least > 0), f"snr and threshold must be > 0, got {snr} and {threshold}")
    room = (signal / least).log().clamp(min=0.0)
    depth = torch.where((layer >= 1) & (room > 0), torch.inf, room / (-2 * layer.clamp(max=1.0).log()))
    return torch.where(room == 0, 0.0, depth).to(result_dtype(snr, sigma2, threshold))


def layernorm_cosine(snr: float | Tensor, dim: int) -> Tensor:
    """Expected cosine between a signal and LayerNorm of signal plus white noise, exact in any dimension.

    The integral of the module's docstring, by Gauss-Legendre in float64: 1e-12 absolute. About sqrt(SNR / (1 + SNR)).

    Args:
        snr: |s|^2 / (nu^2 dim), >= 0, any shape. dim: of the mean-free space, n - 1, >= 1.

    Returns:
        Like snr, in [0, 1], float32, or float64 for float64; no gradient.

    Raises:
        ValueError: dim < 1, or a negative snr on the CPU.
    """
    delta = _noncentrality(snr, dim)
    nodes, weights = _gauss_legendre(delta)
    end = (_REACH / (delta.square() * (4 / math.pi**2) + dim).sqrt()).clamp(max=math.pi / 2).unsqueeze(-1)
    theta = end * (nodes + 1) / 2
    log_value = -(delta.unsqueeze(-1) * theta.sin()).square() / 2 + dim * theta.cos().clamp(min=1e-300).log()
    integral = (log_value.exp() * weights * (end / 2)).sum(-1)
    return (math.sqrt(2 / math.pi) * delta * integral).clamp(max=1.0).to(result_dtype(snr))


def layernorm_cosine_tail(snr: float | Tensor, dim: int, cosine: float | Tensor) -> Tensor:
    """P(cos <= cosine): how likely the signal is turned further than that. Exact, by the noncentral t distribution.

    The integral of the module's docstring over chi, by Gauss-Legendre in float64: 1e-12 absolute.

    Args:
        snr, dim: as for :func:`layernorm_cosine`. cosine: in (-1, 1), broadcastable to snr.

    Returns:
        Probabilities, float32, or float64 for float64; no gradient.

    Raises:
        ValueError: dim < 1, a negative snr or a cosine outside (-1, 1), where the value is on the CPU.
    """
    delta, c = _noncentrality(snr, dim), as_float64(cosine)
    require(c.abs() < 1, f"cosine must lie in (-1, 1), got {cosine}")
    dtype = result_dtype(snr, cosine)
    if dim == 1:
        return torch.special.ndtr(-delta + 0.0 * c).to(dtype)
    nodes, weights = _gauss_legendre(delta)
    k = dim - 1
    low, high = max(math.sqrt(k) - _REACH, 0.0), math.sqrt(k) + _REACH
    chi = low + (high - low) * (nodes + 1) / 2
    log_density = (k - 1) * chi.log() - chi.square() / 2 - (k / 2 - 1) * math.log(2) - math.lgamma(k / 2)
    slope = (c / (1 - c.square()).sqrt()).unsqueeze(-1)
    below = torch.special.ndtr(slope * chi - delta.unsqueeze(-1))
    return (below * log_density.exp() * weights * ((high - low) / 2)).sum(-1).clamp(0.0, 1.0).to(dtype)


def cosine_with_layernorm(sigma2: float | Tensor, noise: float | Tensor, depth: int | Tensor) -> Tensor:
    """Cosine of the signal after ``depth`` layers of contraction, noise and LayerNorm: (1 + noise / sigma2^2)^(-depth / 2).

    Args:
        sigma2: > 0. noise: energy per layer relative to the normalised signal, >= 0. depth: layers, >= 0. All broadcast.

    Returns:
        float32, or float64 for float64; no gradient. Holds in high dimension for P = J + sigma Q, as derived above.

    Raises:
        ValueError: values out of range, where they are on the CPU.
    """
    s, eta, L = _noisy_stack(sigma2, noise, depth)
    return (-L / 2 * (eta / s.square()).log1p()).exp().to(result_dtype(sigma2, noise))


def snr_without_layernorm(sigma2: float | Tensor, noise: float | Tensor, depth: int | Tensor) -> Tensor:
    """SNR (energies) after ``depth`` layers without LayerNorm: sigma^(2L) (1 - sigma^2) / (noise (1 - sigma^(2L))).

    Arguments, dtype and errors as for :func:`cosine_with_layernorm`; its cosine is sqrt(SNR / (1 + SNR)). inf without noise or
    at depth 0; at sigma2 = 1 the limit 1 / (noise depth).
    """
    s, eta, L = _noisy_stack(sigma2, noise, depth)
    signal = s.pow(2 * L)
    layers = torch.where(s == 1, L, (1 - signal) / torch.where(s == 1, 1.0, 1 - s.square()))
    return (signal / (eta * layers)).to(result_dtype(sigma2, noise))


def layernorm_helps(sigma2: float | Tensor, noise: float | Tensor) -> Tensor:
    """Whether LayerNorm keeps more signal from two layers on: noise < 1 - sigma2^2. bool; arguments as above."""
    s, eta, _ = _noisy_stack(sigma2, noise, 1)
    return eta < 1 - s.square()


def _noisy_stack(sigma2: float | Tensor, noise: float | Tensor, depth: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s, eta, L = as_float64(sigma2), as_float64(noise), as_float64(depth)
    require(s > 0, f"sigma2 must be > 0, got {sigma2}")
    require((eta >= 0) & (L >= 0), f"noise and depth must be >= 0, got {noise} and {depth}")
    return s, eta, L


def _noncentrality(snr: float | Tensor, dim: int) -> Tensor:
    if dim < 1:
        raise ValueError(f"dim must be >= 1, the dimension n - 1 of the mean-free space, got {dim}")
    value = as_float64(snr)
    require(value >= 0, f"snr must be >= 0, got {snr}")
    return (value * dim).sqrt()


def _gauss_legendre(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.from_numpy(nodes).to(like.device), torch.from_numpy(weights).to(like.device)
