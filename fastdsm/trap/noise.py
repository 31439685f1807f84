"""LayerNorm and noise: measured cosines against the exact law, the threshold, and where LayerNorm helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diagnostics import cosine_with_layernorm, layernorm_cosine, layernorm_helps, snr_without_layernorm
from .result import ACCENT, DARK, SECOND, THIRD, Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _SAMPLES, _SIGMA, _DEPTH = 257, 400, 0.8, 10
_NOISES = (0.1, 1 - _SIGMA**2, 1.0)


def run() -> Result:
    """One noise in front of LayerNorm, and noise at every layer of P = J + sigma Q."""
    draw_from = torch.Generator().manual_seed(4)
    d = _SIZE - 1
    signal = _detail(torch.randn(_SIZE, generator=draw_from, dtype=torch.float64))
    single = []
    for snr in torch.logspace(-3, 2, 11, dtype=torch.float64):
        noisy = signal + torch.randn(_SAMPLES, _SIZE, generator=draw_from, dtype=torch.float64) / (snr * d).sqrt()
        out = nn.functional.layer_norm(noisy, (_SIZE,), eps=0.0)
        single.append((float(snr), number((out @ signal / out.norm(dim=-1)).mean()), number(layernorm_cosine(snr, d))))
    stack = [(eta, *_stack(signal, eta, draw_from)) for eta in _NOISES]
    rows: list[tuple[float | str, ...]] = [("one noise, SNR", f"{snr:.3g}", "", measured, law) for snr, measured, law in single]
    for eta, measured, law in stack:
        for k, way in enumerate(("with LayerNorm", "without")):
            rows.append((f"noise {eta:.2f} at every layer", way, _DEPTH, number(measured[k, -1]), number(law[k, -1])))
    verdicts = ", ".join(
        f"{eta:.2f}: {'with' if measured[0, -1] > measured[1, -1] else 'without'}"
        f" (law: {'with' if layernorm_helps(_SIGMA, eta) else 'without'})"
        for eta, measured, _ in stack
        if eta != _NOISES[1]
    )
    text = (
        f"A signal of dimension {d} under white noise, then LayerNorm, {_SAMPLES} draws: the mean cosine to the signal follows "
        "the exact law; it is 0.71 at SNR 1, and that of noise alone at SNR 1 / d. Behind a stack of layers P = J + 0.8 Q with "
        "fresh noise at each, LayerNorm keeps more of the signal than none where the noise's energy is below 1 − sigma2² = "
        f"{_NOISES[1]:.2f}, as much there, and less above. Better after {_DEPTH} layers, by energy of the noise: {verdicts}."
    )

    def draw(axes: Sequence[Axes]) -> None:
        snr, measured, law = (list(x) for x in zip(*single, strict=True))
        axes[0].plot(snr, law, "-", color=SECOND, label="exact law")
        axes[0].plot(snr, measured, "o", color=DARK, label="measured")
        axes[0].axvline(1.0, color=ACCENT, linewidth=1, linestyle=":")
        axes[0].axvline(1 / d, color=ACCENT, linewidth=1, linestyle=":")
        axes[0].set(xscale="log", xlabel="SNR (dotted: 1 / d and 1)", ylabel="cosine after LayerNorm")
        axes[0].legend(frameon=False)
        layers = range(1, _DEPTH + 1)
        for (eta, found, predicted), colour in zip(stack, (ACCENT, DARK, THIRD), strict=True):
            for k, marker in enumerate(("o", "x")):
                axes[1].plot(layers, predicted[k], "-" if k == 0 else "--", color=colour, linewidth=1)
                label = f"noise {eta:.2f}, {('with', 'without')[k]} LayerNorm"
                axes[1].plot(layers, found[k], marker, color=colour, markersize=5, label=label)
        axes[1].set(xlabel="layer", ylabel="cosine (lines: law)", ylim=(0, 1))
        axes[1].legend(frameon=False, fontsize=7)

    columns = ("case", "SNR or way", "layers", "cosine measured", "cosine by the law")
    return Result("noise", "LayerNorm and noise", text, columns, rows, 2, draw)


def _stack(signal: Tensor, eta: float, draw_from: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean cosines (2, depth), measured and predicted, with LayerNorm and without."""
    n = len(signal)
    mixing = _isotropic(n, draw_from)
    plain = normalised = signal.expand(_SAMPLES, n)
    direction, measured, law = signal, [], []
    for layer in range(1, _DEPTH + 1):
        direction = _detail(mixing @ direction)
        noise = torch.randn(2, _SAMPLES, n, generator=draw_from, dtype=torch.float64) * math.sqrt(eta / (n - 1))
        plain = plain @ mixing.T + noise[0]
        normalised = nn.functional.layer_norm(normalised @ mixing.T + noise[1], (n,), eps=0.0) / math.sqrt(n)
        measured.append([(_detail(x) @ direction).mean() for x in (normalised, plain)])
        snr = number(snr_without_layernorm(_SIGMA, eta, layer))
        law.append([number(cosine_with_layernorm(_SIGMA, eta, layer)), math.sqrt(snr / (1 + snr))])
    return torch.tensor(measured).T, torch.tensor(law).T


def _detail(x: Tensor) -> Tensor:
    """Without its mean, of unit length."""
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True)


def _isotropic(n: int, draw_from: torch.Generator) -> Tensor:
    """J + sigma Q, Q orthogonal on the mean-free space."""
    first = torch.cat(
        [torch.ones(n, 1, dtype=torch.float64), torch.randn(n, n - 1, generator=draw_from, dtype=torch.float64)], 1
    )
    basis = torch.linalg.qr(first).Q[:, 1:]
    rotation = torch.linalg.qr(torch.randn(n - 1, n - 1, generator=draw_from, dtype=torch.float64)).Q
    return 1 / n + _SIGMA * basis @ rotation @ basis.T
